"""Two processes with four devices each train, evaluate, sample and save like one process with eight devices."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micro_dit.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
SECONDS = 400


def environment(devices: int) -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run(shards: Path, workdir: Path, count: int, **mesh: int) -> dict[str, Any]:
    """Runs processes.py in `count` processes and returns the results of process 0."""
    axes = json.dumps(mesh or {"data": 1, "fsdp": -1})
    script, address = Path(__file__).with_name("processes.py"), f"localhost:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, script, shards, workdir, address, str(index), str(count), axes],
            env=environment(8 // count), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, outputs
    assert all("step 4/4" not in out for out, _ in outputs[1:])  # only process 0 prints the progress
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def found(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("processes")
    found: dict[Any, Any] = {count: run(tiny_shards, folder / str(count), count) for count in (1, 2)}
    return found | {"folder": folder}


def test_two_processes_have_the_same_losses_as_one(found: dict[int, Any]) -> None:
    assert [found[count]["processes"] for count in (1, 2)] == [1, 2]
    assert [found[count]["devices"] for count in (1, 2)] == [8, 8]
    steps = {count: [r for r in found[count]["metrics"] if "loss" in r] for count in (1, 2)}
    assert [record["step"] for record in steps[1]] == [1, 2, 3, 4]
    for ours, theirs in zip(steps[2], steps[1], strict=True):
        for name in ("step", "loss", "gradient_norm", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name


def test_two_processes_have_the_same_evaluations_and_files_as_one(found: dict[int, Any]) -> None:
    evaluated = [[r for r in found[count]["metrics"] if "heldout_loss" in r] for count in (1, 2)]
    for theirs, ours in zip(*evaluated, strict=True):
        for name in ("heldout_loss", "heldout_loss_ema"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert found[1]["files"] == found[2]["files"]
    assert "final.png" in found[2]["files"]


def test_two_processes_have_the_same_checkpoints_as_one(found: dict[int, Any]) -> None:
    """Both checkpoints are read by one process with a single device."""
    (one, about_one), (two, about_two) = (Checkpoints(found["folder"] / str(n)).load_params() for n in (1, 2))
    for field in ("step", "images", "phase", "data"):
        assert about_one[field] == about_two[field], field
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-6, err_msg=name)


def test_a_run_resumes_with_another_number_of_processes_and_another_mesh(
    found: dict[int, Any], tiny_shards: Path, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(found["folder"] / "2", tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "4")
    resumed = run(tiny_shards, workdir, 1, data=2, fsdp=2, expert=2)
    assert [r["step"] for r in resumed["metrics"] if "loss" in r] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed["metrics"], found[2]["metrics"], strict=True):
        for name in {"step", "loss", "gradient_norm", "heldout_loss"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    (_, expected), (_, about) = (Checkpoints(folder).load_params() for folder in (found["folder"] / "2", workdir))
    assert about["data"] == expected["data"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_times_out_reports_the_missing_processes(tmp_path: Path, index: int) -> None:
    address = f"localhost:{free_port()}"
    command = [sys.executable, "-m", "micro_dit.main", "--config=configs/mask75.py", f"--workdir={tmp_path / 'run'}"]
    command += [f"--coordinator={address}", f"--process_index={index}", "--process_count=2", "--timeout=2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=SECONDS)
    awaited = ("the other processes", "process 0")[index]
    expected = f"error: Process {index} of 2 timed out after waiting 2 s for {awaited} at {address}. Check that"
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_incomplete_flags_are_rejected(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "micro_dit.main", "--config=configs/mask75.py", "--process_index=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=SECONDS)
    assert done.stderr == "error: --coordinator, --process_index and --process_count must be set together.\n"
