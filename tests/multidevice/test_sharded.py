"""Training on meshes of 8 devices equals training on one device, without gathered batches; invalid meshes fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
MESHES = ("data", "fsdp", "experts", "tensor")
ALL = (*MESHES, "microbatch")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The results of sharded.py on 8 fake devices."""
    script, root = Path(__file__).with_name("sharded.py"), str(Path(__file__).parents[2])
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ALL)
def test_training_on_every_mesh_equals_training_on_one_device(found: dict[str, Any], mesh: str) -> None:
    one = found["one"]["metrics"]
    assert len({values["loss"] for values in one}) == 3
    for values, expected in zip(found[mesh]["metrics"], one, strict=True):
        assert values == pytest.approx(expected, rel=1e-5)
    for part in ("params", "moments", "ema"):  # the moments are averages of the gradients
        assert found[mesh][part] < 1e-5, part


def test_training_with_muon_and_dense_residual_equals_training_on_one_device(found: dict[str, Any]) -> None:
    for values, expected in zip(found["frugal"]["metrics"], found["frugal one"]["metrics"], strict=True):
        assert values == pytest.approx(expected, rel=1e-5)
    assert found["frugal"]["params"] < 1e-5
    assert found["frugal"]["ema"] < 1e-5
    assert found["frugal"]["held"] == found["frugal"]["expected"] < 0.2 * found["frugal one"]["held"]


@pytest.mark.parametrize("mesh", ALL)
def test_the_batch_is_not_gathered(found: dict[str, Any], mesh: str) -> None:
    assert found[mesh]["gathers"] == []


def test_a_gathered_batch_would_be_detected(found: dict[str, Any]) -> None:
    assert found["broadcast indices"]


def test_data_parallel_training_communicates_only_gradients(found: dict[str, Any]) -> None:
    """Token dropping and expert dispatch run on the device that holds the image."""
    counts = found["data"]["collectives"]
    assert counts.pop("all-reduce") > 0
    assert set(counts.values()) == {0}, counts


def test_only_expert_meshes_have_all_to_all(found: dict[str, Any]) -> None:
    counts = {mesh: found[mesh]["collectives"]["all-to-all"] for mesh in MESHES}
    assert counts["experts"] > 0
    assert counts["tensor"] > 0
    assert counts["data"] == counts["fsdp"] == 0


@pytest.mark.parametrize("mesh", ALL)
def test_each_device_holds_only_its_shards(found: dict[str, Any], mesh: str) -> None:
    whole = found["one"]["held"]
    assert found[mesh]["held"] == found[mesh]["expected"]
    # Norms, biases and input embeddings are replicated; conditioning is not split over 'tensor'.
    least, most = {"data": (1, 1), "fsdp": (1 / 8, 0.2), "tensor": (1 / 4, 0.4)}.get(mesh, (1 / 4, 0.3))
    assert least * whole <= found[mesh]["held"] <= most * whole
    expert = {"data": [2, 32, 16], "fsdp": [2, 4, 16], "experts": [1, 16, 16], "tensor": [1, 32, 8]}
    for what in ("expert", "moment", "average"):
        assert found[mesh][what] == expert.get(mesh, expert["experts"]), what


def test_a_state_initialized_in_shards_has_the_same_values(found: dict[str, Any]) -> None:
    one, sharded = found["fresh"]["one"], found["fresh"]["experts"]
    assert sharded["sums"] == pytest.approx(one["sums"], rel=1e-6)
    assert sharded["held"] < 0.4 * one["held"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("uneven", "batch_size is 12, which is not a multiple of 8, the number of parts that the mesh splits"),
        ("fewer", "mesh is data 4, which does not match the 8 available devices"),
        ("two_rests", "mesh is data -1 × fsdp -1, but each size must be at least 1. One size may be -1"),
        ("unknown", "mesh has no axis model. Its axes are data, fsdp, expert, tensor"),
        ("experts", "blocks.0.mlp.w1 has shape 2×32×16, and 2 can't be split evenly over the 8 devices of expert"),
        ("no_experts", "Set --config.mesh.expert=1 if the network has no experts"),
        ("no_rule", "No rule in micro_dit/parallel/sharding.py matches parameter codebook"),
        ("microbatch", "microbatch is 4, which is not a multiple of 8"),
        ("microbatches", "microbatch 24 does not divide batch_size 80 of phase 'masked'"),
    ],
)
def test_invalid_meshes_and_batches_are_rejected(found: dict[str, Any], what: str, message: str) -> None:
    assert message in found["errors"][what]
    assert "\n" not in found["errors"][what]
