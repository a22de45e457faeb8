import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Optimization of the machine code is left out: it takes most of the time, and what is compared does not depend on it.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What data_parallel.py saw on 8 fake devices."""
    script = Path(__file__).with_name("data_parallel.py")
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_train_as_one_does(found: dict[str, Any]):
    assert found["devices"] == 8
    for one, eight in zip(found["one"], found["eight"], strict=True):
        assert one == pytest.approx(eight, rel=1e-5)
    assert found["one"][0]["loss"] != found["one"][1]["loss"]
    assert found["difference"] < 1e-4  # of the distance moved; Adam divides by what may be tiny


def test_only_gradients_travel_between_devices(found: dict[str, Any]):
    """Parameters are on every device and each keeps its images: dropping tokens and experts' choices stay at home."""
    counts = found["collectives"]
    assert counts.pop("all-reduce") > 0
    assert set(counts.values()) == {0}, counts


def test_a_gather_of_the_batch_would_be_noticed(found: dict[str, Any]):
    assert found["by_hand"]["all-gather"] + found["by_hand"]["all-reduce"] > 0


def test_impossible_meshes_and_batches_are_refused(found: dict[str, Any]):
    assert "batch_size is 12, which is no multiple of the mesh's 8 devices" in found["uneven"]
    assert "mesh.data is 4, but there are 8 devices" in found["fewer"]
