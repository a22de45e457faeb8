"""The table and the plot of a comparison."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from micro_dit.evaluation.isoflop import flops_to_reach, grouped, mean_curve, plot_isoflop, results_table


def result(name: str, budget: float, loss: float, **fields: Any) -> dict[str, Any]:
    measures = {"heldout_loss": loss, "heldout_loss/sigma=0.5": loss}
    common = dict(name=name, budget=budget, flops=budget, parameters=1_230_000, images=4567, measures=measures)
    return common | fields


def test_table_has_means_and_deviations_with_the_best_recipe_first() -> None:
    results = [result("a", 1e12, 0.5), result("b", 1e12, 0.3), result("a", 1e12, 0.7), result("a", 2e12, 0.25)]
    assert [(name, budget, len(group)) for name, budget, group in grouped(results)] == [
        ("b", 1e12, 1), ("a", 1e12, 2), ("a", 2e12, 1),
    ]  # fmt: skip
    assert results_table(results).splitlines() == [
        "| FLOPs | recipe | parameters | images | seeds | held-out loss |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1e+12 | b | 1.23 M | 4,567 | 1 | 0.3 |",
        "| 1e+12 | a | 1.23 M | 4,567 | 2 | 0.6 ± 0.14 |",
        "| 2e+12 | a | 1.23 M | 4,567 | 1 | 0.25 |",
    ]


def test_table_has_seconds_and_the_fraction_of_flops_to_reach_the_baseline() -> None:
    results = [
        result("base", 1e12, 0.5, training_seconds=1000, curve=[[2.5e11, 0.9], [5e11, 0.7], [1e12, 0.5]]),
        result("base", 1e12, 0.5, training_seconds=2000.4, curve=[[2.5e11, 0.7], [5e11, 0.5], [1e12, 0.5]]),
        result("fast", 1e12, 0.4, training_seconds=7, curve=[[2.5e11, 0.7], [1e12, 0.3]]),
        result("slow", 1e12, 0.6, curve=[[2.5e11, 0.7], [1e12, 0.6]]),
        result("early", 1e12, 0.7, training_seconds=7),
        result("fast", 2e12, 0.3, training_seconds=7, curve=[[2e12, 0.3]]),
    ]
    assert [line.split(" | ", 6)[-1] for line in results_table(results, "base").splitlines()] == [
        "seconds | fraction of FLOPs to reach base |",
        "--- | --- |",
        "7 | 0.50 |",
        "1,500 | 1.00 |",
        "– | not reached |",
        "7 | – |",
        "7 | – |",
    ]
    for baseline in (None, "early", "absent"):
        assert "reach" not in results_table(results, baseline)


def test_mean_curve_has_the_flops_that_all_runs_share() -> None:
    runs = [
        result("a", 4.0, 0.5, curve=[[1, 0.9], [2, 0.7], [4, 0.5]]),
        result("a", 4.0, 0.5, curve=[[2, 0.5], [3, 0.4], [4, 0.3]]),
        result("a", 4.0, 0.9),
    ]
    assert mean_curve(runs) == [(2, pytest.approx(0.6)), (4, pytest.approx(0.4))]
    assert mean_curve(runs[2:]) == []
    assert mean_curve([result("a", 4.0, 0.5, curve=[])]) == []


def test_flops_to_reach_a_loss_are_interpolated_logarithmically() -> None:
    curve = [(100, 1.0), (10_000, 0.5), (20_000, 0.6), (40_000, 0.2)]
    assert flops_to_reach(curve, 0.75) == pytest.approx(1000)
    assert flops_to_reach(curve, 0.5) == pytest.approx(10_000)  # the first crossing
    assert flops_to_reach(curve, 0.4) == pytest.approx(20_000 * 2**0.5)
    assert flops_to_reach(curve, 0.2) == pytest.approx(40_000)
    assert flops_to_reach(curve, 1.5) == 100
    assert flops_to_reach(curve, 0.1) is None
    assert flops_to_reach([], 0.1) is None


@pytest.mark.parametrize("curve", [{}, {"curve": []}, {"curve": [[5e11, 0.9], [1e12, 0.5]]}])
def test_results_with_and_without_curves_are_plotted(tmp_path: Path, curve: dict[str, Any]) -> None:
    results = [result("a", 1e12, 0.5, **curve), result("a", 2e12, 0.4, **curve), result("b", 1e12, 0.6)]
    plot_isoflop(results, tmp_path / "mixed.png")
    plot_isoflop(results[:1], tmp_path / "single.png")
    only_images = [result("a", 1e12, 0.5, **curve) | {"measures": {"latent_frechet": 3.0}}]
    plot_isoflop(only_images, tmp_path / "images.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.size[0] > image.size[1]


def test_first_panel_has_a_line_for_each_recipe_and_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: figures.append(self) or path.touch())
    curve = [[5e11, 0.9], [1e12, 0.5]]
    runs = [result("a", 1e12, 0.5, curve=curve), result("b", 1e12, 0.6), result("a", 2e12, 0.4, curve=[[2e12, 0.4]])]
    plot_isoflop(runs, tmp_path / "plot.png")
    panel = figures[0].axes[0]
    assert panel.get_xscale() == "log"
    lines = {tuple(map(tuple, line.get_xydata())): line for line in panel.lines if line.get_marker() == "o"}
    assert set(lines) == {((5e11, 0.9), (1e12, 0.5)), ((1e12, 0.6),), ((2e12, 0.4),)}
    small, large = lines[(5e11, 0.9), (1e12, 0.5)], lines[((2e12, 0.4),)]
    assert small.get_color() == large.get_color()
    assert small.get_linewidth() < large.get_linewidth()
    assert small.get_alpha() < large.get_alpha() == 1
