"""Meshes of 8 devices train as one device does, hold only their part, and gather no batch; others are refused."""

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
    """What sharded.py saw on 8 fake devices."""
    script, root = Path(__file__).with_name("sharded.py"), str(Path(__file__).parents[2])
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ALL)
def test_every_mesh_trains_as_one_device_does(found: dict[str, Any], mesh: str) -> None:
    one = found["one"]["metrics"]
    assert len({values["loss"] for values in one}) == 3
    for values, expected in zip(found[mesh]["metrics"], one, strict=True):
        assert values == pytest.approx(expected, rel=1e-5)
    for part in ("params", "moments", "ema"):  # the moments are gradients, averaged
        assert found[mesh][part] < 1e-5, part


def test_muon_and_the_dense_residual_train_as_on_one_device(found: dict[str, Any]) -> None:
    for values, expected in zip(found["frugal"]["metrics"], found["frugal one"]["metrics"], strict=True):
        assert values == pytest.approx(expected, rel=1e-5)
    assert found["frugal"]["params"] < 1e-5
    assert found["frugal"]["ema"] < 1e-5
    assert found["frugal"]["held"] == found["frugal"]["expected"] < 0.2 * found["frugal one"]["held"]


@pytest.mark.parametrize("mesh", ALL)
def test_no_batch_is_gathered(found: dict[str, Any], mesh: str) -> None:
    assert found[mesh]["gathers"] == []


def test_a_gathered_batch_would_be_noticed(found: dict[str, Any]) -> None:
    assert found["by hand"]


def test_only_gradients_travel_where_parameters_are_whole(found: dict[str, Any]) -> None:
    """Dropping tokens and experts' choices stay on the device that has the image."""
    counts = found["data"]["collectives"]
    assert counts.pop("all-reduce") > 0
    assert set(counts.values()) == {0}, counts


def test_tokens_travel_to_their_experts_alone(found: dict[str, Any]) -> None:
    counts = {mesh: found[mesh]["collectives"]["all-to-all"] for mesh in MESHES}
    assert counts["experts"] > 0
    assert counts["tensor"] > 0
    assert counts["data"] == counts["fsdp"] == 0


@pytest.mark.parametrize("mesh", ALL)
def test_each_device_holds_its_part_alone(found: dict[str, Any], mesh: str) -> None:
    whole = found["one"]["held"]
    assert found[mesh]["held"] == found[mesh]["expected"]
    # Norms, biases and embeddings of the data are whole on each; conditioning is not split over 'tensor'.
    least, most = {"data": (1, 1), "fsdp": (1 / 8, 0.2), "tensor": (1 / 4, 0.4)}.get(mesh, (1 / 4, 0.3))
    assert least * whole <= found[mesh]["held"] <= most * whole
    expert = {"data": [2, 32, 16], "fsdp": [2, 4, 16], "experts": [1, 16, 16], "tensor": [1, 32, 8]}
    for what in ("expert", "moment", "average"):
        assert found[mesh][what] == expert.get(mesh, expert["experts"]), what


def test_a_fresh_state_is_made_in_parts_and_is_the_same(found: dict[str, Any]) -> None:
    one, parts = found["fresh"]["one"], found["fresh"]["experts"]
    assert parts["sums"] == pytest.approx(one["sums"], rel=1e-6)
    assert parts["held"] < 0.4 * one["held"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("uneven", "batch_size is 12, which is not a multiple of the 8 parts that the mesh splits a batch into"),
        ("fewer", "the mesh is data 4, which does not take exactly the 8 devices there are"),
        ("two_rests", "the mesh is data -1 × fsdp -1: each size must be at least 1, and only one may be -1"),
        ("unknown", "mesh has no axis model; the axes are data, fsdp, expert, tensor"),
        ("experts", "blocks.0.mlp.w1 is 2×32×16, and its 2 can't be split evenly over the 8 devices of expert"),
        ("no_experts", "make mesh.expert 1 if the network has no experts"),
        ("no_rule", "no rule in micro_dit/parallel/sharding.py says how to split parameter codebook"),
        ("microbatch", "microbatch is 4, which is not a multiple of the 8 parts"),
        ("microbatches", "microbatch 24 does not divide batch_size 80 of phase 'masked'"),
    ],
)
def test_impossible_meshes_and_batches_are_refused(found: dict[str, Any], what: str, message: str) -> None:
    assert message in found["refusals"][what]
    assert "\n" not in found["refusals"][what]
