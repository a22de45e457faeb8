"""The plot of a run's losses and learning rate."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micro_dit.errors import UserError
from micro_dit.training import curves
from micro_dit.training.curves import plot_curves


def run_metrics(last: int = 600) -> list[dict[str, Any]]:
    metrics = []
    for step in range(10, last + 1, 10):
        loss = 0.3 + math.exp(-step / 100)
        metrics.append({"step": step, "time": 0.0, "loss": loss, "learning_rate": 1e-4})
        if step % 100 == 0:
            heldout = {"heldout_loss": loss + 0.1, "heldout_loss_ema": loss, "heldout_loss/sigma=0.5": 0.2}
            metrics.append({"step": step} | heldout)
    return metrics


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves_are_plotted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curves.{suffix}"
    plot_curves(run_metrics(), path, phases=[("masked", 0, 400), ("unmasked", 400, 600)], title="a run")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == "png":
        with Image.open(path) as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    else:
        assert path.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    "metrics",
    [
        [{"step": 1, "loss": 0.5}],
        [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 0.0}],
        [{"step": 5, "loss": -1.0}, {"step": 6, "loss": 100.0}],
    ],
)
def test_unusual_metrics_can_be_plotted(tmp_path: Path, metrics: Any) -> None:
    plot_curves(metrics, tmp_path / "curves.png", phases=[("short", 1, 2)])
    assert (tmp_path / "curves.png").exists()


def test_metrics_without_losses_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'loss'"):
        plot_curves([{"step": 1, "loss": math.nan}, {"step": 2, "heldout_loss": 1.0}], tmp_path / "curves.png")


def test_smoothing_preserves_a_straight_line_and_reduces_noise() -> None:
    line = np.linspace(5, 1, 600)
    assert np.allclose(curves._smooth(line)[:-10], line[:-10])
    noise = np.random.default_rng(0).normal(size=6000)
    assert curves._smooth(noise)[200:-200].std() < 0.1
    assert curves._smooth(np.array([3.0])).tolist() == [3.0]


def test_series_skip_values_that_are_not_finite() -> None:
    steps, values = curves._series([{"step": 1, "a": 2.0}, {"step": 2, "a": math.nan}, {"step": 3, "b": 1.0}], "a")
    assert steps.tolist() == [1]
    assert values.tolist() == [2.0]


def test_plotting_does_not_change_matplotlib_settings(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_curves(run_metrics(100), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
