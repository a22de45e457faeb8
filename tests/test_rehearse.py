"""The `rehearse` command for eight fake devices: memory, FLOPs, collectives and suggestions."""

import importlib.util
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

from micro_dit import rehearse
from micro_dit.errors import UserError
from micro_dit.models.config import make_config
from micro_dit.models.dit import abstract_params
from micro_dit.models.flops import training_flops
from micro_dit.parallel.mesh import make_mesh
from micro_dit.planning import rehearsal
from micro_dit.planning.aot import Compiled, Topology
from micro_dit.planning.chips import CHIPS
from micro_dit.planning.collectives import Traffic
from micro_dit.training.phases import Phase, make_phases
from micro_dit.training.recipe import make_recipe
from micro_dit.training.state import TrainState
from tests.helpers import tiny

ROOT = Path(__file__).parent.parent
IMAGES = 4096  # batch size of the first phase
TOO_MANY = 2**20  # batch size of the second phase, which does not fit in memory; nothing is allocated
# Wide enough that matrix products dominate, as in real networks, with few operations, so that it compiles fast.
MODEL = dict(dim=256, depth=1, use_patch_mixer=False, multiple_of=64)


def run(shards: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = f"--config=tests/helpers/tiny.py:{shards}"
    command = [sys.executable, "-m", "micro_dit.rehearse", config, "--topology=cpu:8"]
    command += [f"--config.model.{name}={value}" for name, value in MODEL.items()]
    command += ["--config.remat=none", "--config.mesh.data=4", "--config.mesh.fsdp=2", "--optimization=O0"]
    command += [f"--config.phases[0].batch_size={IMAGES}", f"--config.phases[1].batch_size={TOO_MANY}", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsed(tiny_shards: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The output of a rehearsal of two phases. The second does not fit."""
    done = run(tiny_shards, "--json", "--config.cost.dollars_per_device_hour=2")
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout)


def test_exit_status_is_1_if_a_phase_does_not_fit(rehearsed: tuple[Any, dict[str, Any]]) -> None:
    done, found = rehearsed
    assert done.returncode == 1
    assert [phase["fits"] for phase in found["phases"]] == [True, False]
    assert found["fits"] is False
    assert "error: The run does not fit" in done.stderr
    assert "Compiling phase unmasked" in done.stderr


def test_the_suggested_microbatch_was_compiled_and_fits(rehearsed: tuple[Any, dict[str, Any]]) -> None:
    done, found = rehearsed
    suggested = re.search(r"--config\.microbatch=(\d+), which requires ([\d.]+) GB", done.stderr)
    assert suggested
    assert 8 <= int(suggested[1]) < TOO_MANY
    assert TOO_MANY % int(suggested[1]) == 0
    assert float(suggested[2]) <= found["chip"]["memory"] / 1e9
    assert f"in microbatches of {suggested[1]}" in done.stderr


def test_bytes_match_the_sharded_state(rehearsed: tuple[Any, dict[str, Any]]) -> None:
    masked, unmasked = rehearsed[1]["phases"]
    network = tiny.network(**MODEL)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in abstract_params(network).values())
    assert masked["parameters"] == parameters
    # Parameters, two moments, and EMA weights in the second phase are float32. They are split over two devices, except
    # for small ones.
    assert 1 < masked["state_bytes"] / (3 * 4 * parameters / 2) < 1.05
    assert unmasked["state_bytes"] == pytest.approx(masked["state_bytes"] * 4 / 3, rel=1e-3)
    images = 2 * 8 * 8 * 4 * 2 + 4 * 12 * 2  # float16: mean and standard deviation of a latent, and a caption
    assert masked["step"]["arguments"] == pytest.approx(masked["state_bytes"] + IMAGES // 8 * images, rel=0.01)
    assert masked["peak_bytes"] > masked["step"]["arguments"]
    assert masked["sampler_peak_bytes"] > 4 * parameters / 2


def test_the_compilers_flops_agree_with_the_formula(rehearsed: tuple[Any, dict[str, Any]]) -> None:
    """Rematerialization is disabled, so the difference is due to operations other than matrix products."""
    network = tiny.network(**MODEL)
    for phase, images, mask in zip(rehearsed[1]["phases"], (IMAGES, TOO_MANY), (0.75, 0.0), strict=True):
        assert phase["flops"] == images * training_flops(network, mask, tiny.TEXT.tokens)
        assert phase["compiler_flops"] == pytest.approx(phase["flops"], rel=0.1)


def test_collectives_and_times(rehearsed: tuple[Any, dict[str, Any]]) -> None:
    masked = rehearsed[1]["phases"][0]
    traffic = masked["step"]["traffic"]
    assert traffic["all-gather"]["bytes"] > 0, "parameters that are split over two devices must be gathered"
    gradients = 4 * masked["parameters"] / 2
    assert sum(of_kind["bytes"] for kind, of_kind in traffic.items() if kind != "all-gather") > gradients
    assert masked["seconds_per_step"] == masked["compute"] > 0  # for a CPU, only the compute speed is known
    assert masked["hours"] == pytest.approx(tiny.MASKED["steps"] * masked["seconds_per_step"] / 3600)
    assert masked["dollars"] == pytest.approx(masked["hours"] * 8 * 2)
    assert masked["images_per_second"] == pytest.approx(IMAGES / masked["seconds_per_step"])


def test_the_table_reports_hidden_collectives() -> None:
    assert rehearsal._of_kind(Traffic(4, 8e6, 6e6)) == "4 × 2"
    assert rehearsal._of_kind(Traffic(4, 8e6, 6e6, hidden=3)) == "4 × 2, 3 hidden"
    assert rehearsal._of_kind(None) == "–"


def test_a_run_that_fits_exits_with_0_and_prints_a_table(
    tiny_shards: Path, rehearsed: tuple[Any, dict[str, Any]]
) -> None:
    done = run(tiny_shards, "--phase=masked")  # compiled by the fixture
    assert done.returncode == 0, done.stderr
    assert f"{rehearsed[1]['phases'][0]['parameters']:,}" in done.stdout
    for row in ("temporaries", "sampler's peak", "fits", "all-gather", "images/s", "dollars"):
        assert row in done.stdout


def test_an_unknown_phase_is_rejected() -> None:
    with pytest.raises(UserError, match=r"no phase 'nothing'\. Set --phase to one of masked, unmasked"):
        rehearse.rehearse(tiny.get_config("nowhere"), Topology("cpu", (8,)), only="nothing")


@pytest.mark.parametrize(
    ("fixed", "per_image", "compilations", "suggestion"),
    [
        (1e9, 1e6, 1, ""),
        (4e9, 4e7, 2, "--config.microbatch=256,"),
        (1.599e10, 4e7, 2, "a microbatch of 1 images already requires 16 GB, including 10.7 GB for parameters"),
    ],
    ids=["fits", "fits in microbatches", "never fits"],
)
def test_search_for_a_microbatch(
    monkeypatch: pytest.MonkeyPatch, fixed: float, per_image: float, compilations: int, suggestion: str
) -> None:
    """A step of 512 images on a chip with 16 GB; its fake memory is `fixed` plus `per_image` for each image."""
    tried = []

    def lowered(network: Any, phase: Phase, recipe: Any, mesh: Any, text_tokens: int) -> tuple[Any, ...]:
        tried.append(recipe.microbatch or phase.batch_size)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        weights = jax.ShapeDtypeStruct((int(fixed / 12),), jnp.float32, sharding=place)  # state and gradients: a third
        return None, TrainState(weights, {"w": weights}, (), None), None, None, None

    def compiled(*arguments: Any, **options: Any) -> Compiled:
        times.append(1)
        return Compiled(0.0, temporaries=int(fixed + per_image * tried[-1]))

    times: list[int] = []
    monkeypatch.setattr(rehearsal, "abstract_train_step", lowered)
    monkeypatch.setattr(rehearsal, "compile_ahead", compiled)
    config = tiny.get_config("nowhere")
    phase = make_phases([tiny.MASKED | dict(batch_size=512)])[0]
    mesh = make_mesh(devices=jax.devices()[:1])
    found = rehearsal._fit(
        make_config("Nano", input_size=8), phase, make_recipe(config), 4,
        rehearsal.Target(Topology("v5e", (1, 1)), CHIPS["v5e"], mesh, "O0"),
    )  # fmt: skip
    assert found[1] == 512
    assert suggestion in found[2]
    assert bool(found[2]) == bool(suggestion)
    assert len(times) == compilations


@pytest.mark.parametrize(
    "peak_of",
    [
        lambda n: 4e9 + 4e7 * n,
        lambda n: 9e9 + 4e7 * n,
        lambda n: 4e9 + 1e8 * n**0.8,
        lambda n: 4e9 + 2e7 * n + 1e4 * n**2,
        lambda n: 8e9 + 3e6 * n + (4e9 if n > 64 else 0),
        lambda n: 2e10 + n,
    ],
    ids=["line", "more fixed", "concave", "convex", "jump", "never"],
)
def test_the_largest_microbatch_that_fits(peak_of: Any) -> None:
    sizes, limit, tried = [8 * 2**i for i in range(8)], 16e9, []
    peaks = {0: 4e9, 2048: max(peak_of(2048), 1.1 * limit)}
    found = rehearsal.largest_that_fits(sizes, peaks, limit, lambda n: tried.append(n) or peak_of(n))
    assert found == max((n for n in sizes if peak_of(n) <= limit), default=0)
    assert len(tried) == len(set(tried)) <= 4


def test_microbatches_reduce_memory(tiny_shards: Path, rehearsed: tuple[Any, dict[str, Any]]) -> None:
    """Each device processes 32 images at once instead of 512."""
    whole = rehearsed[1]["phases"][0]
    done = run(tiny_shards, "--json", "--phase=masked", "--config.microbatch=256")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["phases"][0]
    assert found["step"]["arguments"] == whole["step"]["arguments"]
    assert found["step"]["temporaries"] < 0.5 * whole["step"]["temporaries"]
    assert found["compiler_flops"] == pytest.approx(whole["compiler_flops"], rel=0.1)  # all microbatches are counted


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="requires libtpu, XLA's compiler for TPUs")
def test_a_tpu_slice_is_rehearsed_without_tpus(tiny_shards: Path) -> None:
    arguments = ["--topology=v5e:2x2", "--phase=masked", "--json", "--config.mesh.data=1", "--config.mesh.fsdp=4"]
    narrow = ["--config.model.dim=64", "--config.phases[0].batch_size=16"]  # limits compilation to half a minute
    done = run(tiny_shards, *arguments, *narrow)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    phase = found["phases"][0]
    assert (found["chips"], found["fits"], found["chip"]["memory"]) == (4, True, 16e9)
    assert "libtpu" in found["versions"]
    # In such a narrow network, operations other than matrix products and padding are a large share.
    assert 1 < phase["compiler_flops"] / phase["flops"] < 2
    assert phase["state_bytes"] < phase["step"]["arguments"] < phase["peak_bytes"] < 1e9
    assert phase["step"]["traffic"]["all-gather"]["bytes"] > 0
    assert phase["sampler"]["temporaries"] > 0
    assert 0.3 < phase["padding"] < 1
    assert min(phase["compute"], phase["memory"], phase["interconnect"]) > 0
