import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.published import write_clip

FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"


def test_eight_devices_match_one_device(tmp_path: Path) -> None:
    write_clip(tmp_path)
    script, root = Path(__file__).with_name("sharded_encoders.py"), str(Path(__file__).parents[2])
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert found["rows"] == [2] * 8  # the batch is split evenly
    assert found["size"] > 0.05
    for name in ("encode", "decode", "text"):
        assert found[name] < 1e-5, name
    assert found["uneven"][0][0] == 3
    assert found["uneven"][1] < 1e-5
