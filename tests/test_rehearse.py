"""A run is rehearsed for eight fake devices by the command itself: what fits, what does not, and what it needs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from micro_dit import budget, rehearse
from micro_dit.models.dit import abstract_params, make_config
from micro_dit.parallel.compile_ahead import Compiled, Topology
from micro_dit.parallel.mesh import make_mesh
from micro_dit.train import make_recipe
from micro_dit.training.phases import Phase, make_phases
from micro_dit.training.state import TrainState

ROOT = Path(__file__).parent.parent
IMAGES = 256  # in a step of the first phase
TOO_MANY = 2**20  # images in a step: more than the machine holds, but nothing is allocated
# Wide enough that products are nearly all of the work, as in real networks; few operations, so that it compiles fast.
MODEL = dict(dim=256, depth=1, use_patch_mixer=False, multiple_of=64)


def run(shards: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "micro_dit.rehearse", f"--config=tests/tiny.py:{shards}", "--topology=cpu:8"]
    command += [f"--config.model.{name}={value}" for name, value in MODEL.items()]
    command += ["--config.remat=none", "--config.mesh.data=4", "--config.mesh.fsdp=2", "--optimization=O0"]
    command += [f"--config.phases[0].batch_size={IMAGES}", f"--config.phases[1].batch_size={TOO_MANY}", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsed(tiny_shards: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Both phases, of which the second can't fit."""
    done = run(tiny_shards, "--json", "--config.cost.dollars_per_device_hour=2")
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout)


def test_what_does_not_fit_is_told_by_the_exit_status(rehearsed: tuple[Any, dict[str, Any]]):
    done, found = rehearsed
    assert done.returncode == 1
    assert [phase["fits"] for phase in found["phases"]] == [True, False]
    assert found["fits"] is False
    assert "error: it does not fit" in done.stderr
    assert "compiling phase unmasked" in done.stderr


def test_the_microbatch_that_it_suggests_was_compiled_and_fits(rehearsed: tuple[Any, dict[str, Any]]):
    done, found = rehearsed
    suggested = re.search(r"--config\.microbatch=(\d+) it takes ([\d.]+) GB", done.stderr)
    assert suggested
    assert 8 <= int(suggested[1]) < TOO_MANY
    assert TOO_MANY % int(suggested[1]) == 0
    assert float(suggested[2]) <= found["chip"]["memory"] / 1e9
    assert f"in passes of {suggested[1]}" in done.stderr


def test_bytes_are_those_of_the_sharded_state(rehearsed: tuple[Any, dict[str, Any]]):
    masked, unmasked = rehearsed[1]["phases"]
    network = tiny.network(**MODEL)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in abstract_params(network).values())
    assert masked["parameters"] == parameters
    # float32: parameters and two moments, and in the second phase the moving average. Two devices share them, but for
    # what is small.
    assert 1 < masked["state_bytes"] / (3 * 4 * parameters / 2) < 1.05
    assert unmasked["state_bytes"] == pytest.approx(masked["state_bytes"] * 4 / 3, rel=1e-3)
    images = 2 * 8 * 8 * 4 * 2 + 4 * 12 * 2  # float16: mean and deviation of a latent, and a caption
    assert masked["step"]["arguments"] == pytest.approx(masked["state_bytes"] + IMAGES // 8 * images, rel=0.01)
    assert masked["peak_bytes"] > masked["step"]["arguments"]
    assert masked["sampler_peak_bytes"] > 4 * parameters / 2


def test_flops_agree_with_those_counted_by_hand(rehearsed: tuple[Any, dict[str, Any]]):
    """Without recomputation; what is no product makes the difference."""
    network = tiny.network(**MODEL)
    for phase, images, mask in zip(rehearsed[1]["phases"], (IMAGES, TOO_MANY), (0.75, 0.0), strict=True):
        assert phase["flops"] == images * budget.training_flops(network, mask, tiny.TEXT.tokens)
        assert phase["compiler_flops"] == pytest.approx(phase["flops"], rel=0.1)


def test_collectives_and_times(rehearsed: tuple[Any, dict[str, Any]]):
    masked = rehearsed[1]["phases"][0]
    traffic = masked["step"]["traffic"]
    assert traffic["all-gather"]["bytes"] > 0, "parameters that two devices share are gathered"
    gradients = 4 * masked["parameters"] / 2
    assert sum(of_kind["bytes"] for kind, of_kind in traffic.items() if kind != "all-gather") > gradients
    assert masked["seconds_per_step"] == masked["compute"] > 0  # of a CPU, only the speed of products is known
    assert masked["hours"] == pytest.approx(tiny.MASKED["steps"] * masked["seconds_per_step"] / 3600)
    assert masked["dollars"] == pytest.approx(masked["hours"] * 8 * 2)
    assert masked["images_per_second"] == pytest.approx(IMAGES / masked["seconds_per_step"])


def test_what_fits_exits_with_0_and_prints_a_table(tiny_shards: Path, rehearsed: tuple[Any, dict[str, Any]]):
    done = run(tiny_shards, "--phase=masked")  # compiled before
    assert done.returncode == 0, done.stderr
    assert f"{rehearsed[1]['phases'][0]['parameters']:,}" in done.stdout
    for row in ("temporaries", "sampler's peak", "fits", "all-gather", "images/s", "dollars"):
        assert row in done.stdout


def test_what_is_wrong_is_said_in_one_line(tiny_shards: Path):
    done = run(tiny_shards, "--phase=nothing")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: there is no phase 'nothing'; the phases are masked, unmasked."


@pytest.mark.parametrize(
    ("fixed", "per_image", "compilations", "suggestion"),
    [(1e9, 1e6, 1, ""), (4e9, 4e7, 2, "--config.microbatch=256 "), (2e10, 1e6, 1, "no microbatch")],
    ids=["fits", "fits in passes", "never fits"],
)
def test_search_for_a_microbatch(
    monkeypatch: pytest.MonkeyPatch, fixed: float, per_image: float, compilations: int, suggestion: str
):
    """A step of 512 images on a chip of 16 GB, which is made to need a fixed part and one in proportion."""
    tried = []

    def lowered(network: Any, phase: Phase, recipe: Any, mesh: Any, text_tokens: int) -> tuple[Any, ...]:
        tried.append(recipe.microbatch or phase.batch_size)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        weights = jax.ShapeDtypeStruct((int(fixed / 12),), jnp.float32, sharding=place)  # a third: state and gradients
        return None, TrainState(weights, {"w": weights}, (), None), None, None, None

    def compiled(*arguments: Any, **options: Any) -> Compiled:
        times.append(1)
        return Compiled(0.0, temporaries=int(fixed + per_image * tried[-1]))

    times: list[int] = []
    monkeypatch.setattr(rehearse, "lowered_arguments", lowered)
    monkeypatch.setattr(rehearse, "compile_ahead", compiled)
    config = tiny.get_config("nowhere")
    phase = make_phases([tiny.MASKED | dict(batch_size=512)])[0]
    mesh = make_mesh(devices=jax.devices()[:1])
    found = rehearse._fit(
        make_config("Nano", input_size=8), phase, make_recipe(config), mesh, 4, Topology("v5e", (1, 1)),
        budget.CHIPS["v5e"], "O0", lambda text: None,
    )  # fmt: skip
    assert found[1] == 512
    assert suggestion in found[2]
    assert bool(found[2]) == bool(suggestion)
    assert len(times) == compilations
