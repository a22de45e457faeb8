"""The randomness of the train step, whole runs, and invalid input. test_resume.py tests kills and signals."""

import dataclasses
import errno
import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from micro_dit import train as loop
from micro_dit.data.shards import read_manifest
from micro_dit.diffusion import edm
from micro_dit.errors import UserError
from micro_dit.evaluation.evaluator import Results
from micro_dit.models.masking import TokenMask
from micro_dit.train import train
from micro_dit.training import step as step_module
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.metrics import read_metrics
from micro_dit.training.phases import Phase
from micro_dit.training.recipe import Recipe
from micro_dit.training.state import TrainState
from micro_dit.training.step import make_train_step
from tests.helpers import tiny

RECIPE = Recipe(sigma_data=0.9, caption_drop=0.1, dtype="float32", remat="dots", adam={})
NETWORK = tiny.network()
B = 1024


# ---- The train step --------------------------------------------------------------------------------------------------


def draws(monkeypatch: pytest.MonkeyPatch, step: int, seed: int = 0, **fields: Any) -> dict[str, np.ndarray]:
    """Returns all random inputs of a step, recorded when the loss is called."""
    recorded: dict[str, Any] = {}

    def record(F: Any, x: Any, y: Any, sigma: Any, noise: Any, *, mask: TokenMask, **rest: Any) -> jax.Array:
        recorded.update(
            posterior=(x - 5) / 2, captions=y, sigma=(jnp.log(sigma) + 0.6) / 1.2, noise=noise, ranks=mask.restore,
            dropped_tokens=mask.dropped,
        )  # fmt: skip
        return jnp.zeros(B)

    monkeypatch.setattr(edm, "loss", record)
    monkeypatch.setattr(step_module, "bind", lambda *arguments: None)
    params = {"w": jnp.ones(3)}
    phase = Phase(**tiny.MASKED | fields)
    state = TrainState(jnp.int32(step), params, RECIPE.optimizer(phase).init(params), None)
    batch = {
        "latent_mean": jnp.full((B, 8, 8, 4), 5, jnp.float16),
        "latent_std": jnp.full((B, 8, 8, 4), 2, jnp.float16),
        "caption": jnp.ones((B, 4, 12), jnp.float16),
    }
    make_train_step(NETWORK, phase, 0, RECIPE)(state, batch, jax.random.key(seed))
    return {name: np.asarray(value, np.float32) for name, value in recorded.items()}


def columns(recorded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns B numbers of each stream: the first of each image, and the first B in memory, to detect a shared key."""
    result = {f"{name} by image": recorded[name].reshape(B, -1)[:, 0] for name in ("captions", "sigma", *LARGE)}
    return result | {f"{name} in memory": recorded[name].ravel()[:B] for name in LARGE}


LARGE = ("posterior", "noise", "ranks")


def test_random_inputs_of_a_step_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    for (a, x), (b, y) in itertools.combinations(columns(draws(monkeypatch, step=3)).items(), 2):
        if a.split()[0] != b.split()[0]:
            assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(B), (a, b)


def test_random_inputs_differ_by_step_and_repeat_for_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = columns(draws(monkeypatch, step=0)), columns(draws(monkeypatch, step=1))
    for name, value in first.items():
        assert abs(np.corrcoef(value, second[name])[0, 1]) < 5 / np.sqrt(B), name
    again, other = draws(monkeypatch, step=1), draws(monkeypatch, step=1, seed=1)
    for name, value in columns(again).items():
        np.testing.assert_array_equal(value, second[name])
        assert not np.array_equal(value, columns(other)[name]), name


def test_random_inputs_have_the_specified_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = draws(monkeypatch, step=0)
    for name in ("posterior", "noise", "sigma"):
        assert recorded[name].mean() == pytest.approx(0, abs=5 / np.sqrt(recorded[name].size)), name
        assert recorded[name].std() == pytest.approx(1, abs=5 / np.sqrt(recorded[name].size)), name
    # A caption is dropped completely or not at all, with probability 0.1.
    captions = recorded["captions"].reshape(B, -1)
    dropped = np.all(captions == 0, axis=1)
    assert np.all(captions[~dropped] == 1)
    assert dropped.mean() == pytest.approx(0.1, abs=5 * np.sqrt(0.1 * 0.9 / B))
    # In every image, 12 of 16 tokens are dropped, each with equal probability.
    np.testing.assert_array_equal(recorded["dropped_tokens"].sum(axis=1), 12)
    np.testing.assert_allclose(recorded["dropped_tokens"].mean(axis=0), 0.75, atol=5 * np.sqrt(0.75 * 0.25 / B))


@pytest.fixture
def quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the network and the loss by the sum of the squared parameters."""
    monkeypatch.setattr(step_module, "bind", lambda network, params, *rest: lambda *inputs: jnp.sum(params["w"] ** 2))
    monkeypatch.setattr(edm, "loss", lambda F, x, y, *rest, **named: F(x, None, y) * jnp.ones(4))


@pytest.mark.usefixtures("quadratic")
def test_learning_rate_and_ema_follow_the_step_within_the_phase() -> None:
    phase = Phase(**tiny.MASKED | dict(ema_decay=0.99975, ema_start=2, warmup_steps=4, learning_rate=0.1))
    step = make_train_step(NETWORK, phase, first_step=100, recipe=RECIPE)
    params = {"w": jnp.asarray([1.0, -2.0, 3.0])}
    state = TrainState(jnp.int32(100), params, RECIPE.optimizer(phase).init(params), params)
    batch = {"latent_mean": jnp.zeros((4, 8, 8, 4)), "caption": jnp.ones((4, 4, 12))}
    for in_phase in range(5):
        before = state
        state, metrics = step(state, batch, jax.random.key(0))
        assert float(metrics["learning_rate"]) == pytest.approx(0.1 * in_phase / 4)
        norm = float(jnp.linalg.norm(before.params["w"]))
        assert float(metrics["gradient_norm"]) == pytest.approx(2 * norm, rel=1e-6)
        assert float(metrics["loss"]) == pytest.approx(norm**2, rel=1e-6)
        assert int(state.step) == 101 + in_phase
        w, ema = np.asarray(state.params["w"]), np.asarray(state.ema["w"])
        if in_phase < 2:
            np.testing.assert_array_equal(ema, w)
        else:
            old = np.asarray(before.ema["w"], np.float64)
            np.testing.assert_allclose(ema - old, (1 - 0.99975) * (w - old), rtol=0.02)
            assert np.all(ema != old)
            assert np.all(ema != w)


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_shards: Path) -> ConfigDict:
    return tiny.get_config(str(tiny_shards))


def test_a_run_writes_metrics_curves_and_checkpoints(finished_run: Path, tiny_shards: Path) -> None:
    records = read_metrics(finished_run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 85))
    assert all(np.isfinite(record["loss"]) for record in records)
    rates = [record["learning_rate"] for record in records]
    np.testing.assert_allclose(rates[:4], [0, 1.5e-3, 3e-3, 3e-3], rtol=1e-5)
    assert rates[47] == pytest.approx(3e-3)
    assert rates[48] == pytest.approx(1e-3)  # each phase has its own schedule
    assert 1e-4 < rates[-1] < 1.1e-4
    assert len({record["loss"] for record in records}) == 84
    assert (finished_run / "curves.png").exists()
    # The two newest checkpoints and the end of the first phase are kept.
    checkpoints = Checkpoints(finished_run)
    assert checkpoints.steps == [84, 80, 48]
    first, last = (tiny.read_checkpoint(finished_run, step) for step in (48, 84))
    assert "ema" not in first
    assert [meta["phase"] for meta in (first["meta"], last["meta"])] == [0, 1]
    assert last["meta"]["images"] == 4 * 84
    # The EMA weights are loaded for sampling, and they differ from the parameters.
    params, _ = checkpoints.load_params()
    jax.tree.map(np.testing.assert_array_equal, params, last["ema"])
    assert all(not np.array_equal(params[name], last["params"][name]) for name in params)


def test_a_finished_run_is_not_trained_further(
    finished_run: Path, config: ConfigDict, tmp_path: Path, capfd: Any
) -> None:
    workdir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    train(config, workdir)
    out = capfd.readouterr().out
    assert "Resuming from step 84 of 84" in out
    assert "compiled" not in out
    tiny.assert_same_end(workdir, finished_run)


def test_a_run_with_a_damaged_checkpoint_resumes_from_the_previous_one(
    finished_run: Path, config: ConfigDict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    workdir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    damaged = workdir / "checkpoints" / "84"
    largest = max((path for path in damaged.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    train(config, workdir)
    out = capfd.readouterr().out
    assert f"Checkpoint {damaged} can't be read" in out
    assert "Resuming from step 80 of 84" in out
    tiny.assert_same_end(workdir, finished_run)  # step 84 has been saved again
    assert (workdir / "unreadable_checkpoints" / "84").is_dir()


def test_a_run_with_muon_dense_residual_and_path_drop_resumes_bitwise(
    config: ConfigDict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    config.optimizer, config.diffusion.path_drop, config.checkpoint_every = "muon", 0.3, 5
    config.model.update(depth=1, patch_mixer_depth=1, decoder_depth=1, decoder_dim=32, fusion=True, rope=True)
    config.phases = tuple(dict(phase, steps=steps) for phase, steps in zip(config.phases, (8, 6), strict=True))
    whole = train(config, tmp_path / "whole")
    parts = Path(shutil.copytree(whole, tmp_path / "parts"))
    for step in (10, 14):  # the remaining checkpoint is the end of the first phase
        shutil.rmtree(parts / "checkpoints" / str(step))
    capfd.readouterr()
    train(config, parts)
    assert "Resuming from step 8 of 14" in capfd.readouterr().out
    tiny.assert_same_end(parts, whole)
    config.optimizer = "adamw"
    with pytest.raises(UserError, match=r"optimizer \(was 'muon', is now 'adamw'\)"):
        train(config, whole)


def test_a_phase_at_another_resolution_keeps_the_weights_and_resets_the_optimizer(
    config: ConfigDict, tmp_path: Path, finished_run: Path
) -> None:
    """The second phase has four times the tokens, another position table and a held-out loss."""
    workdir = tmp_path / "run"
    high = dict(
        name="high", resolution=128, steps=3, pos_interp_scale=2.0, fresh_optimizer=True, ema_start=1, warmup_steps=2
    )
    config.phases = (config.phases[0], tiny.UNMASKED | high)
    config.keep_every = 49
    config.logging.every = 10  # the last step of the phase is logged although it is not a multiple
    config.data.update(heldout="validation", heldout_images=3)
    # The first phase is taken from the finished run.
    (workdir / "checkpoints").mkdir(parents=True)
    shutil.copytree(finished_run / "checkpoints" / "48", workdir / "checkpoints" / "48")
    train(config, workdir)
    records = {record["step"]: record for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record}
    assert sorted(records) == [50, 51]
    assert (workdir / "curves.png").exists()
    evaluated = [record for record in read_metrics(workdir / "metrics.jsonl") if "heldout_loss" in record]
    (scalars,) = evaluated
    assert scalars["step"] == 51
    assert {"heldout_loss", "heldout_loss_ema"} <= set(scalars)
    assert len([name for name in scalars if name.startswith("heldout_loss/sigma=")]) == 11
    end = tiny.read_checkpoint(workdir)
    assert end["meta"]["model"]["input_size"] == 16
    assert end["meta"]["model"]["pos_interp_scale"] == 2.0
    (count,) = [leaf for leaf in jax.tree.leaves(end["opt"]) if leaf.dtype == np.int32]
    assert count == 3  # the optimizer was reset at the start of the phase
    # The first step has learning rate 0, so the weights after it are bitwise those of the first phase.
    before, first = tiny.read_checkpoint(workdir, 48)["params"], tiny.read_checkpoint(workdir, 49)
    for part in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, first[part], before)
    (count,) = [leaf for leaf in jax.tree.leaves(first["opt"]) if leaf.dtype == np.int32]
    assert count == 1
    assert not [name for name in before if "pos" in name]  # the position table is computed, not saved
    change = max(float(np.abs(end["params"][name] - before[name]).max()) for name in before)
    assert 0 < change < 4e-3  # three steps of at most 1e-3, not a new initialization


@dataclasses.dataclass
class Evaluation:
    """Two fake evaluators that record the steps at which they run; the one named `signal_in` raises SIGTERM."""

    steps: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    signal_in: str = ""

    def evaluators(self, *arguments: Any) -> list[Any]:
        def run(name: str, step: int) -> Results:
            self.steps.append((name, step))
            if name == self.signal_in:
                signal.raise_signal(signal.SIGTERM)
            return Results({name: 1.0})

        return [
            SimpleNamespace(due=lambda step: step in (79, 84), run=lambda weights, step, name=name: run(name, step))
            for name in ("first", "second")
        ]


@pytest.mark.parametrize("signal_in", ["first", "second", ""])
def test_a_signal_during_an_evaluation_skips_the_remaining_evaluators_and_saves(
    config: ConfigDict, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, signal_in: str
) -> None:
    evaluation = Evaluation(signal_in=signal_in)
    monkeypatch.setattr(loop, "load_evaluation", lambda run: evaluation)
    workdir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for later in (80, 84):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    train(config, workdir)
    out = capfd.readouterr().out
    at_79 = [("first", 79)] if signal_in == "first" else [("first", 79), ("second", 79)]
    assert evaluation.steps == at_79 + ([] if signal_in else [("first", 84), ("second", 84)])
    assert Checkpoints(workdir).steps[0] == (79 if signal_in else 84)
    assert ("Stopped at step 79 of 84 and saved" in out) is ("to resume" in out) is bool(signal_in)
    written = [(name, record["step"]) for record in read_metrics(workdir / "metrics.jsonl") for name in record]
    assert [item for item in written if item[0] in ("first", "second")] == evaluation.steps


class Poisoned:
    """A wrapper of the data iterator that replaces one batch by NaN."""

    def __init__(self, iterator: Any, batch: int) -> None:
        self.iterator, self.left = iterator, batch

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self.iterator)
        self.left -= 1
        return batch if self.left else batch | {"latent_mean": batch["latent_mean"] * np.float16(np.nan)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)


@pytest.mark.parametrize("batch", [16, 19])  # at step 16 a checkpoint is due, at step 19 none is
def test_a_nan_loss_stops_the_run_and_reports_the_last_good_checkpoint(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    make = loop.make_train_iterator
    monkeypatch.setattr(loop, "make_train_iterator", lambda *a, **k: Poisoned(make(*a, **k), batch))
    with pytest.raises(UserError, match=f"Loss is nan .* at step {batch} in phase 'masked'") as error:
        train(config, tmp_path)
    good = 8 if batch == 16 else 16
    last = tmp_path / "checkpoints" / str(good)
    assert f"The last good checkpoint is {last}. Lower learning_rate" in str(error.value)
    assert "\n" not in str(error.value)
    checkpoint = tiny.read_checkpoint(tmp_path)
    assert checkpoint["meta"]["step"] == good
    assert all(np.isfinite(value).all() for value in checkpoint["params"].values())


def test_a_full_disk_raises_a_user_error(config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orbax.checkpoint import v1 as ocp

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", fail)
    with pytest.raises(UserError, match=r"The disk of .* is full\. No checkpoint is complete yet\. Free some space"):
        train(config, tmp_path)


# ---- Invalid input is rejected with a one-line message before anything is compiled or written ------------------------


def set_phase(**fields: Any) -> Callable[[ConfigDict], None]:
    return lambda config: setattr(config, "phases", (config.phases[0] | fields, config.phases[1]))


def set_field(name: str, value: Any) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        *parents, last = name.split(".")
        for parent in parents:
            config = config[parent]
        with config.unlocked():
            config[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("model.size", "Giant"), "model.size 'Giant' is unknown. Use one of Nano"),
        (set_field("model.dmi", 3), "model has no field dmi. The fields are"),
        (set_field("mesh.data", 3), r"mesh is data 3, which does not match the 1 available devices"),
        (set_field("model.expert_capacity", 0.4), r"int\(0.4·4/2\) = 0 of 4 tokens. Change model.expert_capacity"),
        (set_field("quantize", "fp8"), "Config field `quantize` was removed .* Remove --config.quantize"),
        (
            set_field("data.shards", "nowhere"),
            "No shards at nowhere .* Create them with python -m micro_dit.precompute",
        ),
        (set_field("data.caption_tokens", 77), r"4 caption tokens, but .* 77\. Set --config\.data\.caption_tokens=4"),
        (set_field("phases", ()), "Config has no phases"),
        (set_phase(resolution=256), "have latents for 64, 128 px, but 256 px is requested"),
        (set_phase(resolution=60), "have latents for 64, 128 px, but 60 px is requested"),
        (set_phase(mask_ratio=0.99), "mask_ratio 0.99 keeps none of the 16 tokens.* Decrease it"),
        (set_phase(mask_position="before"), "mask_position 'before', but it must be one of after_mixer, before_mixer"),
        (set_phase(warmup=3), r"phases\[0\] has no field warmup"),
        (set_phase(name="unmasked"), "Several phases are named unmasked"),
    ],
)
def test_invalid_configs_are_rejected_with_a_one_line_message(
    config: ConfigDict, tmp_path: Path, change: Callable[[ConfigDict], None], message: str
) -> None:
    change(config)
    with pytest.raises(UserError, match=message) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (dict(vae=dataclasses.replace(tiny.VAE, fingerprint="89ab")), "image encoders differ"),
        (dict(text=dataclasses.replace(tiny.TEXT, fingerprint="89ab")), "text encoders differ"),
        (dict(caption_cleaning="deepfloyd-2"), "caption cleanings differ"),
    ],
)
def test_shards_of_all_phases_must_match(config: ConfigDict, tmp_path: Path, other: dict, what: str) -> None:
    shards = tiny.write_shards(tmp_path / "other", **other)
    config.phases = (config.phases[0], config.phases[1] | dict(shards=str(shards)))
    message = f"{config.data.shards} and {shards} cannot be used together because their {what}"
    with pytest.raises(UserError, match=message) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "written", "message"),
    [
        (set_field("data.vae", "sdxl"), {}, "have image encoder noise, but the config asks for sdxl"),
        (set_field("data.vae", "openmoji_vae"), {}, "image encoder fingerprint 0123, but .* asks for [0-9a-f]{12}"),
        (set_field("data.text_encoder", "t5"), {}, "have text encoder noise, but the config asks for t5"),
        (lambda config: None, dict(scale=3.0), "have standard deviation 3 at 64 px, but sigma_data is 0.9"),
        (lambda config: None, dict(scale=0.3), "have standard deviation 0.3 at 64 px, but sigma_data is"),
    ],
)
def test_shards_that_do_not_match_the_config_are_rejected(
    config: ConfigDict, tmp_path: Path, change: Callable[[ConfigDict], None], written: dict, message: str
) -> None:
    config.data.shards = str(tiny.write_shards(tmp_path / "shards", **written))
    change(config)
    with pytest.raises(UserError, match=message) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_caption_tokens_are_taken_from_the_shards(config: ConfigDict, tmp_path: Path) -> None:
    text = dataclasses.replace(tiny.TEXT, tokens=7)
    config.data.shards = str(tiny.write_shards(tmp_path / "shards", text=text))
    config.data.caption_tokens = None
    config.phases = (config.phases[0] | dict(steps=1),)
    workdir = train(config, tmp_path / "run")
    assert json.loads((workdir / "config.json").read_text())["shards"]["caption_tokens"] == 7


def test_a_run_on_a_mix_records_all_shard_folders(config: ConfigDict, tiny_shards: Path, tmp_path: Path) -> None:
    other = tiny.write_shards(tmp_path / "other", attribution="somebody")
    config.data.shards = f"{tiny_shards}=0.7,{other}=0.3"
    config.phases = (config.phases[0] | dict(steps=2),)
    config.data.update(heldout="validation", heldout_images=4)
    workdir = train(config, tmp_path / "run")
    about = json.loads((workdir / "config.json").read_text())["shards"]
    assert about["attribution"] == "nobody; somebody"
    assert about["caption_cleaning"] == "none"
    assert about["files"] != [read_manifest(tiny_shards).fingerprint]
    records = read_metrics(workdir / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert any("heldout_loss" in record for record in records)


def test_the_work_directory_of_another_run_is_rejected(config: ConfigDict, finished_run: Path) -> None:
    config.seed = 1
    with pytest.raises(UserError, match=r"belongs to a run with another config: seed \(was 0, is now 1\)\. Set a new"):
        train(config, finished_run)


def test_a_run_does_not_resume_with_rebuilt_shards(config: ConfigDict, finished_run: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    text = (workdir / "config.json").read_text()
    fingerprint = read_manifest(config.data.shards).fingerprint
    assert fingerprint in text
    (workdir / "config.json").write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(UserError, match="the shards were rebuilt"):
        train(config, workdir)
