"""launch/tpu_vm.sh with a fake gcloud."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tpu_vm.sh"
SETTINGS = dict(
    PROJECT="project", ZONE="zone", TPU_NAME="slice", ACCELERATOR_TYPE="v5litepod-64", BUCKET="bucket",
    CONFIG="configs/mask75.py:xl", RUN_NAME="xl", POLL_SECONDS="0",
)  # fmt: skip
WHERE = ["--project=project", "--zone=zone"]


@pytest.fixture
def tpu_vm(tmp_path: Path) -> Any:
    """Returns a function that runs the script with given TPU states and run statuses: (process, gcloud calls)."""
    fake = tmp_path / "bin" / "gcloud"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {Path(__file__).with_name("recorded_gcloud.py")} "$@"\n')
    fake.chmod(0o755)

    def tpu_vm(
        *arguments: str,
        states: Sequence[str] = ("",),
        statuses: Sequence[str] = ("0",),
        **settings: str,
    ) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        (tmp_path / "calls").write_text("")
        (tmp_path / "states").write_text(json.dumps(states))
        (tmp_path / "statuses").write_text(json.dumps(statuses))
        environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "GCLOUD": str(tmp_path)}
        assert shutil.which("gcloud", path=environment["PATH"]) == str(fake)
        done = subprocess.run(
            [SCRIPT, *arguments], env=environment | settings, capture_output=True, text=True, timeout=300
        )
        return done, [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return tpu_vm


def actions(calls: list[list[str]]) -> list[str]:
    """Returns the actions among gcloud calls, without the queries."""
    done: list[str] = []
    for call in calls:
        verb: str = next(word for word in ("create", "delete", "list", "scp", "ssh") if word in call)
        command = next((a.removeprefix("--command=") for a in call if a.startswith("--command=")), "")
        if verb == "ssh":
            verb = next(word for word in ("worker_install", "worker_train", "worker_status") if word in command)
        if verb not in ("list", "worker_status"):
            done.append(verb)
    return done


def test_resumes_after_preemptions_until_the_run_is_done(tpu_vm: Any) -> None:
    states = ["", "CREATING", "READY", "READY", "PREEMPTED", "PREEMPTED", "PREEMPTED", "READY", "READY", "READY"]
    # The run is unreachable after a preemption, later stops with status 75, and finally ends with status 0.
    statuses = ["running", "", "running", "75", "running", "0"]
    done, calls = tpu_vm("--provisioning=spot", "up", "--config.seed=1", states=states, statuses=statuses, **SETTINGS)
    assert done.returncode == 0, done.stderr
    once = ["scp", "worker_install", "worker_train"]
    assert actions(calls) == ["create", *once, "delete", "create", *once, *once, "delete"]
    assert calls[1] == [
        "compute", "tpus", "tpu-vm", "create", "slice", "--version=v2-alpha-tpuv5-lite", *WHERE,
        "--accelerator-type=v5litepod-64", "--spot",
    ]  # fmt: skip
    (first, *_) = (call for call in calls if any("worker_train" in argument for argument in call))
    assert first == [
        "compute", "tpus", "tpu-vm", "ssh", "slice", *WHERE, "--worker=all",
        "--command=BUCKET=bucket CONFIG=configs/mask75.py:xl RUN_NAME=xl bash ~/micro_dit/launch/tpu_vm.sh "
        "worker_train --config.seed=1",
    ]  # fmt: skip


def test_stops_after_repeated_failures_and_keeps_the_slice(tpu_vm: Any) -> None:
    done, calls = tpu_vm("up", states=["READY"], statuses=["1"], **SETTINGS)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: The run failed 3 times; see launch/tpu_vm.sh logs.")
    assert actions(calls) == ["scp", "worker_install", "worker_train"] * 3


def test_stops_if_the_slice_cannot_be_created(tpu_vm: Any) -> None:
    done, calls = tpu_vm("up", states=[""], **SETTINGS)
    assert done.returncode == 1
    assert "error: slice could not be created. Use --provisioning=queued to wait" in done.stderr
    assert actions(calls) == ["create"] * 3


def test_waits_for_queued_resources_and_deletes_them(tpu_vm: Any) -> None:
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "READY"]
    done, calls = tpu_vm("--provisioning=queued_spot", "up", states=states, **SETTINGS)
    assert done.returncode == 0, done.stderr
    create, delete = (next(call for call in calls if verb in call) for verb in ("create", "delete"))
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "slice"]
    assert {"--node-id=slice", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} < set(create)
    assert delete == ["compute", "tpus", "queued-resources", "delete", "slice", *WHERE, "--force", "--quiet"]


def test_dry_run_prints_the_commands_without_running_them(tpu_vm: Any) -> None:
    done, calls = tpu_vm("--dry_run", "up", **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert calls == []
    lines = done.stdout.splitlines()
    assert [line.split()[4] for line in lines] == ["create", "scp", "ssh", "ssh", "delete"]
    assert all(line.startswith("gcloud compute tpus tpu-vm ") for line in lines)


@pytest.mark.parametrize("missing", sorted(set(SETTINGS) - {"POLL_SECONDS"}))
def test_reports_missing_variables_in_one_line(tpu_vm: Any, missing: str) -> None:
    done, calls = tpu_vm("up", **{name: value for name, value in SETTINGS.items() if name != missing})
    assert (done.returncode, calls) == (1, [])
    assert done.stderr == f"error: {missing} is not set; see the top of launch/tpu_vm.sh.\n"


def test_worker_runs_training_in_the_background(tpu_vm: Any, tmp_path: Path) -> None:
    """Runs the worker steps locally, with a fake interpreter that prints its arguments."""
    checkout = tmp_path / "micro_dit"
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\nexit 75\n')
    python.chmod(0o755)
    names = dict(BUCKET="bucket", CONFIG="configs/mask75.py", RUN_NAME="demo")
    assert tpu_vm("worker_status")[0].stdout == "none\n"
    done, _ = tpu_vm("worker_train", "--config.seed=1", "--config.sampling.prompts=('a b',)", **names)
    assert done.returncode == 0, done.stderr
    until = time.monotonic() + 300
    while tpu_vm("worker_status")[0].stdout not in ("75\n", "none\n"):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert (checkout / "train.log").read_text() == (
        "launch/until_done.py .venv/bin/python -m micro_dit.main --cluster --config=configs/mask75.py "
        f"--workdir={tmp_path}/bucket/demo --config.seed=1 --config.sampling.prompts=('a b',)\n"
    )
    assert tpu_vm("worker_status")[0].stdout == "75\n"
