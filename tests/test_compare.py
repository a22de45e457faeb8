"""Comparisons at equal FLOPs: planning of runs, resuming, and reuse of results."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micro_dit import compare as command
from micro_dit.compare import MeasurementSettings, compare, fit_steps, plan_runs, read_config, read_curve
from micro_dit.encoders.image import load_image_encoder
from micro_dit.encoders.info import ImageEncoderInfo
from micro_dit.errors import UserError
from micro_dit.evaluation.evaluate_model import Stopped
from tests.helpers import tiny

BUDGET = 2e8
LOSS = MeasurementSettings(("heldout_loss",))
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
    """A config file, and shards with the embedded autoencoder in their manifest."""
    folder = tmp_path_factory.mktemp("compare")
    encoder = load_image_encoder("openmoji_vae")
    vae = ImageEncoderInfo(encoder.name, encoder.fingerprint, encoder.channels, encoder.downsample)
    shards = tiny.write_shards(folder / "shards", vae=vae)
    (folder / "recipes.py").write_text(CONFIG_FILE.format(shards=str(shards)))
    return str(folder / "recipes.py")


# ---- Budgets ---------------------------------------------------------------------------------------------------------


def test_fitted_steps_use_up_the_budget_except_for_less_than_one_step() -> None:
    generator = np.random.default_rng(0)
    for _ in range(2000):
        phases = generator.integers(1, 5)
        steps, costs = (generator.integers(1, 10 ** generator.integers(1, 6), phases).tolist() for _ in range(2))
        budget = sum(costs) * float(generator.choice([1.0, 1.5, 10.0, 1234.5]))
        fitted = fit_steps(steps, costs, budget)
        assert min(fitted) >= 1
        assert budget - costs[-1] < sum(n * c for n, c in zip(fitted, costs, strict=True)) <= budget


def test_phases_warm_up_and_ema_are_scaled_in_proportion(file: str) -> None:
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
    assert config.phases[0]["steps"] == 48  # the original config is unchanged


def test_runs_are_ordered_by_seed_and_have_separate_folders(file: str) -> None:
    configs = [read_config(f"{file}:{kind}") for kind in ("deferred", "naive")]
    runs = plan_runs(configs, [1e10, 3e10], (0, 7), Path("out"))
    assert [run.workdir.name for run in runs] == [
        f"{kind}-{budget}-{seed}" for seed in (0, 7) for budget in ("1e10", "3e10") for kind in ("deferred", "naive")
    ]
    assert [run.config.seed for run in runs] == [0] * 4 + [7] * 4
    assert all(run.budget * 0.98 < run.flops <= run.budget for run in runs)
    assert runs[0].parameters > runs[1].parameters
    assert runs[0].images < runs[1].images  # without the mixer, the same FLOPs pay for more images


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(configs=["configs/none.py"]), r"Config file configs/none\.py not found"),
        (dict(configs=[f"{tiny.CONFIGS / 'mask75.py'}:huge"]), "has no variant 'huge'; use one of demo, small"),
        (dict(configs=["FILE:deferred", "FILE:deferred+seed=3"]), "Several configs have the name deferred"),
        (dict(configs=["FILE:deferred+masking.part=0.5"]), "has no field 'masking.part'"),
        (dict(configs=["FILE:deferred+masking.ratio=much"]), "The value of masking.ratio in .* has the wrong type"),
        (dict(configs=["FILE:deferred+masking.ratio=0.99"]), "mask_ratio 0.99 keeps none of the 16 tokens"),
        (dict(budgets=[1e3]), "The budget of 1000 FLOPs is too small for deferred"),
        (dict(budgets=[-1.0]), "--budget_flops=-1 is not a positive number"),
        (dict(budgets=[math.nan]), "--budget_flops=nan is not a positive number"),
        (dict(budgets=[1e9, 1e9]), "repeated values"),
        (dict(seeds=(-1,)), "negative seeds"),
        (dict(seeds=()), "no runs to compare"),
        (dict(settings=dict(metrics=("fid",))), "Unknown metric 'fid'"),
        (dict(settings=dict(num_images=0)), "--num_images=0 is below 1"),
        (dict(settings=dict(guidance=math.inf)), "--guidance=inf is not finite"),
        (dict(settings=dict(prompts="test")), "Set --prompts to one of heldout, train"),
        (dict(reuse=["no/such/folder"]), "--reuse=no/such/folder does not exist"),
    ],
)
def test_invalid_input_is_rejected_with_one_line_before_training(
    file: str, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = dict(configs=["FILE:deferred"], budgets=[1e9], out=tmp_path) | wrong
    arguments["configs"] = [text.replace("FILE", file) for text in arguments["configs"]]
    with pytest.raises(UserError, match=message) as error:
        compare(**arguments | {"settings": MeasurementSettings(**arguments.get("settings", {}))})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# ---- Runs ------------------------------------------------------------------------------------------------------------


def test_comparison_is_reported_and_finished_runs_are_not_repeated(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares two recipes that differ only in name, so their results have to be equal and they compile only once."""
    lines: list[str] = []
    configs = [f"{file}:short", f"{file}:short+name=other"]

    def again(seeds: tuple[int, ...], train: Callable[..., Any] = command.train) -> list[dict[str, Any]]:
        monkeypatch.setattr(command, "train", train)
        return compare(configs, [BUDGET], tmp_path, seeds=seeds, settings=LOSS, say=lines.append)

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
    curve, other = (result["curve"] for result in first)
    assert curve == other
    assert [flops for flops, _ in curve] == sorted({flops for flops, _ in curve})
    assert 8 <= len(curve) <= 10
    assert curve[-1] == [first[0]["flops"], pytest.approx(losses["heldout_loss"], rel=1e-5)]
    assert json.loads((tmp_path / "results.json").read_text()) == first
    table = (tmp_path / "results.md").read_text().splitlines()
    assert "seconds | fraction of FLOPs to reach short |" in table[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[2:]]
    assert sorted(row[:2] for row in rows) == [["2e+08", "other"], ["2e+08", "short"]]
    assert 0 < float(rows[0][-1]) == float(rows[1][-1]) <= 1
    with Image.open(tmp_path / "isoflop.png") as plot:
        assert plot.size[0] > plot.size[1]

    def refuse(config: Any, workdir: Path) -> None:
        raise AssertionError(f"{workdir} was trained again")

    assert again((0,), refuse) == first
    assert "2 of 2 runs are already finished" in lines

    # If the user stops a run, the results of the finished runs are kept.
    with pytest.raises(Stopped, match=r"training of .*short-2e08-5 is not complete"):
        again((0, 5), lambda config, workdir: None)
    assert json.loads((tmp_path / "results.json").read_text()) == first

    # A work directory of another recipe is not overwritten.
    monkeypatch.undo()
    changed = [f"{file}:short+adam.b1=0.5"]
    with pytest.raises(UserError, match=r"belongs to a run with another config: adam\.b1"):
        compare(changed, [BUDGET], tmp_path, settings=LOSS, say=lines.append)


def test_curve_has_the_flops_of_each_phase_and_the_last_record_of_repeated_steps(file: str, tmp_path: Path) -> None:
    run = plan_runs([read_config(f"{file}:deferred")], [1e10], (0,), tmp_path)[0]
    (masked, cost), (unmasked, unmasked_cost) = run.phases
    assert cost < unmasked_cost
    assert run.config.evaluate_every == run.steps // 8
    assert read_curve(run) == []
    records = [
        {"step": 5, "heldout_loss": 0.9}, {"step": 5, "loss": 0.1}, {"step": 8, "heldout_loss": 0.7},
        {"step": 5, "heldout_loss": 0.8}, {"step": 8, "heldout_loss": 0.6},
        {"step": masked + 1, "heldout_loss": 0.5, "heldout_loss_ema": 0.4},
        {"step": masked + 2, "heldout_loss": None, "heldout_loss_ema": None},
        {"step": run.steps, "heldout_loss": 0.3, "heldout_loss_ema": 0.2},
    ]  # fmt: skip
    run.workdir.mkdir()
    (run.workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert read_curve(run) == [
        (5 * cost, 0.8), (8 * cost, 0.6), (masked * cost + unmasked_cost, 0.4), (run.flops, 0.2),
    ]  # fmt: skip
    assert run.flops == masked * cost + unmasked * unmasked_cost


# ---- Reuse -----------------------------------------------------------------------------------------------------------


class Trained(Exception):
    """Raised when training is started."""


def finish(run: Any, folder: Path, settings: MeasurementSettings, **changed: Any) -> Path:
    """Writes the result of a run to a folder of runs, with some config fields changed."""
    path = folder / run.workdir.name / "result.json"
    fields = ("name", "budget", "seed", "flops", "images", "parameters")
    result = {name: getattr(run, name) for name in fields} | {"measures": {"heldout_loss": 0.5}}
    config = run.config.to_dict() | changed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | {"settings": settings.record(), "config": config}))
    return path


@pytest.fixture
def reuse(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A comparison of 'short' in the folder 'out' that reuses the folder 'done'.

    Returns the progress lines; raises Trained if a run is not reused.
    """

    def refuse(config: Any, workdir: Path) -> None:
        raise Trained

    def run(settings: MeasurementSettings = LOSS) -> list[str]:
        lines: list[str] = []
        compare(
            [f"{file}:short"], [BUDGET], tmp_path / "out", settings=settings, reuse=[tmp_path / "done"],
            say=lines.append,
        )  # fmt: skip
        return lines

    monkeypatch.setattr(command, "train", refuse)
    (tmp_path / "done").mkdir()
    return run


@pytest.fixture
def short(file: str, tmp_path: Path) -> Any:
    return plan_runs([read_config(f"{file}:short")], [BUDGET], (0,), tmp_path / "out")[0]


def test_result_of_a_finished_run_is_copied(reuse: Callable[..., list[str]], short: Any, tmp_path: Path) -> None:
    """The result is from an earlier version, without a curve, LoRA and evaluations during training."""
    with pytest.raises(Trained):
        reuse()
    finished = finish(short, tmp_path / "done", LOSS, evaluate_every=0)
    result = json.loads(finished.read_text())
    del result["config"]["lora"], result["config"]["init_from"]
    finished.write_text(json.dumps(result))
    assert f"1 of 1 results reused from {tmp_path / 'done'}" in reuse()
    assert (short.workdir / "result.json").read_text() == finished.read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == [result]
    assert (tmp_path / "out" / "isoflop.png").exists()
    finished.unlink()
    lines = reuse()
    assert "1 of 1 runs are already finished" in lines
    assert f"0 of 1 results reused from {tmp_path / 'done'}" in lines


@pytest.mark.parametrize(
    ("changed", "settings", "wanted", "reused"),
    [
        (dict(seed=1), LOSS, LOSS, False),
        (dict(adam=dict(b1=0.5)), LOSS, LOSS, False),
        (dict(sampling=dict(guidance=9.0, steps=3)), LOSS, LOSS, True),
        ({}, LOSS, MeasurementSettings(), False),
        ({}, MeasurementSettings(), MeasurementSettings(prompts="heldout"), True),
        ({}, MeasurementSettings(), MeasurementSettings(num_images=65), False),
        ({}, MeasurementSettings(), MeasurementSettings(prompts="train"), False),
        ({}, MeasurementSettings(), MeasurementSettings(guidance=5.0), False),
        ({}, MeasurementSettings(guidance=5.0), MeasurementSettings(guidance=5.0), True),
        # The domain metric depends on the sampler settings.
        (dict(sampling=dict(guidance=9.0, steps=30)), MeasurementSettings(), MeasurementSettings(), False),
        (dict(sampling=dict(guidance=5.0, steps=30)), MeasurementSettings(), MeasurementSettings(), True),
        (
            dict(sampling=dict(guidance=9.0, steps=30)), MeasurementSettings(guidance=1.0),
            MeasurementSettings(guidance=1.0), True,
        ),
    ],
)  # fmt: skip
def test_results_with_another_config_or_settings_are_not_reused(
    reuse: Callable[..., list[str]], short: Any, tmp_path: Path, changed: dict[str, Any],
    settings: MeasurementSettings, wanted: MeasurementSettings, reused: bool,
) -> None:  # fmt: skip
    finish(short, tmp_path / "done", settings, **changed)
    if reused:
        reuse(wanted)
    else:
        with pytest.raises(Trained):
            reuse(wanted)
        assert not (short.workdir / "result.json").exists()


def test_result_is_not_copied_into_the_work_directory_of_another_run(
    reuse: Callable[..., list[str]], short: Any, tmp_path: Path
) -> None:
    finish(short, tmp_path / "done", LOSS)
    config = short.config.to_dict()
    short.workdir.mkdir(parents=True)
    (short.workdir / "config.json").write_text(json.dumps({"config": config | {"seed": 3}, "shards": {}}))
    with pytest.raises(Trained):
        reuse()
    (short.workdir / "config.json").write_text(json.dumps({"config": config, "shards": {}}))
    reuse()


def test_damaged_result_is_an_error(reuse: Callable[..., list[str]], short: Any, tmp_path: Path) -> None:
    finish(short, tmp_path / "done", LOSS).write_text("{}")
    with pytest.raises(UserError, match=r"short-2e08-0/result\.json is damaged .* Delete it"):
        reuse()


def test_guidance_and_prompts_are_passed_to_the_evaluation() -> None:
    request = MeasurementSettings(guidance=1.5, prompts="train", num_images=7).request("raw")
    assert (request.guidance, request.prompts, request.num_images, request.params) == ((1.5,), "train", 7, "raw")
    assert MeasurementSettings().request("ema").guidance == ()
    assert MeasurementSettings().record() == {"metrics": ["domain", "heldout_loss"], "num_images": 64}
    assert LOSS.record() == {"metrics": ["heldout_loss"], "num_images": 0}
