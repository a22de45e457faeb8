"""The XManager launcher; the local executor is tested if XManager is installed or XMANAGER_PYTHON has it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from micro_dit.training.metrics import read_metrics
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
XMANAGER_PYTHON = os.environ.get("XMANAGER_PYTHON") or (importlib.util.find_spec("xmanager") and sys.executable)


def launch(*arguments: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "launch/xm_launch.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=400,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.skipif(not XMANAGER_PYTHON, reason="requires XManager, which the development requirements do not include")
def test_two_work_units_train_on_this_machine(tiny_shards: Path, tmp_path: Path) -> None:
    steps = [f"--override=phases[{phase}].steps=2" for phase in range(2)]
    done = launch(
        f"--config=tests/helpers/tiny.py:{tiny_shards}", f"--workdir={tmp_path / 'runs'}",
        "--sweep=learning_rate", *steps,
        f"--python={sys.executable}", python=XMANAGER_PYTHON, HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for folder in (tmp_path / "runs").iterdir():
        records = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        found[folder.name] = tiny.read_checkpoint(folder)["meta"]["step"], records[1]["learning_rate"]
    rates = {"phases.0.learning_rate=0.001": (4, 0.0005), "phases.0.learning_rate=0.003": (4, 0.0015)}
    assert {name: (step, pytest.approx(rate)) for name, (step, rate) in rates.items()} == found
    assert done.stdout.count("Finished: 4 steps") == 2


def test_dry_run_prints_each_work_unit_without_xmanager() -> None:
    done = launch("--config=configs/mask75.py:small", "--sweep=mask_ratio", "--xm_dry_run", "--python=python")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert lines[1] == (
        "work unit 2 of 5 on this machine: python launch/until_done.py python -m micro_dit.main "
        "--config=configs/mask75.py:small --workdir=runs/xm/masking.ratio=0.25 --config.masking.ratio=0.25"
    )


def test_work_directories_have_no_brackets() -> None:
    done = launch("--config=configs/mask75.py:tiny", "--sweep=learning_rate", "--xm_dry_run")
    folders = re.findall(r"--workdir=(\S+)", done.stdout)
    assert folders == ["runs/xm/phases.0.learning_rate=0.001", "runs/xm/phases.0.learning_rate=0.003"]


def test_cloud_executors_require_their_variables() -> None:
    arguments = ("--config=configs/mask75.py:tiny", "--sweep=seed", "--xm_dry_run")
    done = launch(*arguments, "--executor=tpu", TPU_NAME="slice", ACCELERATOR_TYPE="v6e-16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2] == (
        "work unit 3 of 3 on v6e-16: TPU_NAME=slice-3 CONFIG=configs/mask75.py:tiny RUN_NAME=runs/xm/seed=2 "
        "launch/tpu_vm.sh up --config.seed=2"
    )
    done = launch(*arguments, "--executor=vertex", BUCKET="bucket")
    assert "--workdir=/gcs/bucket/runs/xm/seed=0" in done.stdout
    assert "on a100=8:" in done.stdout
    for executor, name in (("vertex", "BUCKET"), ("tpu", "TPU_NAME")):
        done = launch(*arguments, f"--executor={executor}", **{name: ""})
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: --executor={executor} requires {name}.")
        assert len(done.stderr.splitlines()) == 1
