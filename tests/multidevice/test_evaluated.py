"""An evaluation on 8 devices has the samples and metrics of one device, also with another batch size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"


def test_devices_and_batch_size_do_not_affect_an_evaluation(tmp_path: Path) -> None:
    script, root = Path(__file__).with_name("evaluated.py"), str(Path(__file__).parents[2])
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert found["different"] == 21
    assert found["pixel difference"] <= 1
    assert found["eight"] == pytest.approx(found["one"], rel=1e-3)
    assert found["one"]["latent_frechet"] > 0
