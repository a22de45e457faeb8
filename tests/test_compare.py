"""Comparisons at equal FLOPs: how budgets become steps, and that runs are made once."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micro_dit import compare as command
from micro_dit.compare import compare, fit_steps, plan_runs, read_config
from micro_dit.encoders.image import load_image_encoder
from micro_dit.encoders.info import ImageEncoderInfo
from micro_dit.errors import UserError
from micro_dit.evaluation.evaluate_model import Stopped
from micro_dit.evaluation.isoflop import grouped, results_table
from tests.helpers import tiny

BUDGET = 2e8
CONFIG_FILE = """
from tests.helpers import tiny

def get_config(kind="deferred"):
    config = tiny.get_config({shards!r})
    config.name, config.model.use_patch_mixer = kind, kind == "deferred"
    config.phases = (dict(tiny.MASKED), dict(tiny.UNMASKED))
    if kind == "short":
        config.phases = (tiny.MASKED | dict(ema_decay=0.9),)
    config.data.update(vae="openmoji_vae", heldout="validation", heldout_images=4)
    return config
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config file for shards that say they went through the embedded autoencoder."""
    folder = tmp_path_factory.mktemp("compare")
    encoder = load_image_encoder("openmoji_vae")
    vae = ImageEncoderInfo(encoder.name, encoder.fingerprint, encoder.channels, encoder.downsample)
    shards = tiny.write_shards(folder / "shards", vae=vae)
    (folder / "recipes.py").write_text(CONFIG_FILE.format(shards=str(shards)))
    return str(folder / "recipes.py")


# ---- Budgets ---------------------------------------------------------------------------------------------------------


def test_steps_come_to_the_budget_less_a_part_of_a_step() -> None:
    generator = np.random.default_rng(0)
    for _ in range(2000):
        phases = generator.integers(1, 5)
        steps, costs = (generator.integers(1, 10 ** generator.integers(1, 6), phases).tolist() for _ in range(2))
        budget = sum(costs) * float(generator.choice([1.0, 1.5, 10.0, 1234.5]))
        fitted = fit_steps(steps, costs, budget)
        assert min(fitted) >= 1
        assert budget - costs[-1] < sum(n * c for n, c in zip(fitted, costs, strict=True)) <= budget


def test_phases_keep_their_shares_and_beginnings(file: str) -> None:
    assert fit_steps([1000, 200], [3, 7], 4400) == [1000, 200]
    assert fit_steps([1000, 200], [3, 7], 2200) == [500, 100]
    config = read_config(f"{file}:deferred")
    whole = plan_runs([config], [1e10], (0,), Path("out"))[0]
    masked, unmasked = whole.config.phases
    factor = masked["steps"] / 48
    assert unmasked["steps"] == pytest.approx(36 * factor, abs=1)
    assert masked["warmup_steps"] == round(2 * factor) > 2
    assert unmasked["ema_start"] == round(3 * unmasked["steps"] / 36) > 3
    assert unmasked["ema_decay"] ** unmasked["steps"] == pytest.approx(0.9**36)
    assert whole.steps == masked["steps"] + unmasked["steps"]
    assert whole.images == 4 * whole.steps
    assert config.phases[0]["steps"] == 48  # ours is left alone


def test_runs_are_ordered_by_seed_and_each_has_its_folder(file: str) -> None:
    configs = [read_config(f"{file}:{kind}") for kind in ("deferred", "naive")]
    runs = plan_runs(configs, [1e10, 3e10], (0, 7), Path("out"))
    assert [run.workdir.name for run in runs] == [
        f"{kind}-{budget}-{seed}" for seed in (0, 7) for budget in ("1e10", "3e10") for kind in ("deferred", "naive")
    ]
    assert [run.config.seed for run in runs] == [0] * 4 + [7] * 4
    assert all(run.budget * 0.98 < run.flops <= run.budget for run in runs)
    assert runs[0].parameters > runs[1].parameters
    assert runs[0].images < runs[1].images  # who spares the mixer sees more images


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(configs=["configs/none.py"]), "there is no config file configs/none.py"),
        (dict(configs=[f"{tiny.CONFIGS / 'mask75.py'}:huge"]), "has no variant 'huge'; use one of demo, small"),
        (dict(configs=["FILE:deferred", "FILE:deferred+seed=3"]), "several configs are named deferred"),
        (dict(configs=["FILE:deferred+masking.part=0.5"]), "has no field 'masking.part'"),
        (dict(configs=["FILE:deferred+masking.ratio=much"]), "masking.ratio is of the wrong type"),
        (dict(configs=["FILE:deferred+masking.ratio=0.99"]), "mask_ratio 0.99 keeps none of the 16 tokens"),
        (dict(budgets=[1e3]), "a budget of 1000 FLOPs is too small for deferred"),
        (dict(budgets=[-1.0]), "give a number above 0"),
        (dict(budgets=[math.nan]), "give a number above 0"),
        (dict(budgets=[1e9, 1e9]), "give each budget and each seed once"),
        (dict(seeds=(-1,)), "seeds of at least 0"),
        (dict(seeds=()), "nothing to compare"),
        (dict(metrics=("fid",)), "there is no metric 'fid'"),
        (dict(num_images=0), "--num_images must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_error_before_anything_is_trained(
    file: str, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = dict(configs=["FILE:deferred"], budgets=[1e9], out=tmp_path) | wrong
    arguments["configs"] = [text.replace("FILE", file) for text in arguments["configs"]]
    with pytest.raises(UserError, match=message) as error:
        compare(**arguments)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# ---- Runs ------------------------------------------------------------------------------------------------------------


def test_a_comparison_is_told_of_and_not_repeated(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two recipes that differ in name alone, so that they must come to the same, and compile once."""
    lines: list[str] = []
    configs = [f"{file}:short", f"{file}:short+name=other"]

    def again(seeds: tuple[int, ...], train: Callable[..., Any] = command.train) -> list[dict[str, Any]]:
        monkeypatch.setattr(command, "train", train)
        return compare(configs, [BUDGET], tmp_path, seeds=seeds, metrics=("heldout_loss",), say=lines.append)

    first = again((0,))
    assert [result["name"] for result in first] == ["other", "short"]
    for result in first:
        workdir = tmp_path / f"{result['name']}-2e08-0"
        assert tiny.read_checkpoint(workdir)["meta"]["step"] == result["steps"] > 1
        assert BUDGET - result["flops"] / result["steps"] < result["flops"] <= BUDGET
    losses, others = (result["measures"] for result in first)
    assert losses == others
    assert {"heldout_loss", "heldout_loss (raw)", "heldout_loss/sigma=0.55"} <= losses.keys()
    assert losses["heldout_loss"] != losses["heldout_loss (raw)"]
    assert json.loads((tmp_path / "results.json").read_text()) == first
    assert "| 2e+08 | short |" in (tmp_path / "results.md").read_text()
    with Image.open(tmp_path / "isoflop.png") as picture:
        assert picture.size[0] > picture.size[1]

    def refuse(config: Any, workdir: Path) -> None:
        raise AssertionError(f"{workdir} was trained again")

    assert again((0,), refuse) == first
    assert "2 of 2 runs are done already" in lines

    # A run that the user stops is told of as such, and those that were done are kept.
    with pytest.raises(Stopped, match="short-2e08-5 is trained in part"):
        again((0, 5), lambda config, workdir: None)
    assert json.loads((tmp_path / "results.json").read_text()) == first

    # A folder of another recipe is not taken over.
    monkeypatch.undo()
    changed = [f"{file}:short+adam.b1=0.5"]
    with pytest.raises(UserError, match=r"belongs to a run with another config: adam\.b1"):
        compare(changed, [BUDGET], tmp_path, metrics=("heldout_loss",), say=lines.append)


def test_the_table_has_means_spreads_and_the_best_first() -> None:
    def result(name: str, budget: float, loss: float) -> dict[str, Any]:
        return dict(name=name, budget=budget, parameters=1_230_000, images=4567, measures={"heldout_loss": loss})

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
