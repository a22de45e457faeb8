"""The loop that all launchers run their training in."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from micro_dit.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SECONDS = 600
STEPS = 84


def start(*command: Any, restarts: int = 3) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch/until_done.py", f"--restarts={restarts}", *command], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def steps_done(workdir: Path) -> int:
    metrics = workdir / "metrics.jsonl"
    steps = re.findall(r'^\{"step": (\d+)', metrics.read_text(), re.MULTILINE) if metrics.exists() else []
    return max(map(int, steps), default=0)


def wait_for(step: int, workdir: Path, loop: subprocess.Popen[str]) -> None:
    until = time.monotonic() + SECONDS
    while steps_done(workdir) < step:
        assert loop.poll() is None, loop.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_run_that_is_killed_and_preempted_ends_as_one_that_is_not(
    tiny_shards: Path, finished_run: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "micro_dit.main", f"--config=tests/tiny.py:{tiny_shards}", f"--workdir={workdir}"]
    loop = start(*command, "--config.checkpoint_every=2")
    try:
        wait_for(10, workdir, loop)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(loop.pid)], capture_output=True, text=True).stdout
        os.kill(int(children), signal.SIGKILL)
        wait_for(20, workdir, loop)
        loop.send_signal(signal.SIGTERM)  # as a machine gets that is taken away
        out, err = loop.communicate(timeout=SECONDS)
    finally:
        loop.kill()
    assert loop.returncode == 75, (out, err)
    assert "the run ended with status -9: starting it again\n" in err
    assert "stopping after this step, saving first" in out
    assert steps_done(workdir) < STEPS

    loop = start(*command, "--config.checkpoint_every=2")
    out, err = loop.communicate(timeout=SECONDS)
    assert loop.returncode == 0, (out, err)
    assert f"done: {STEPS} steps" in out
    ours, theirs = (read_metrics(folder / "metrics.jsonl")[-1] for folder in (workdir, finished_run))
    assert ours["step"] == theirs["step"] == STEPS
    assert ours["loss"] == theirs["loss"]
    tiny.assert_same_end(workdir, finished_run)


FAKE = """
import json, pathlib, signal, sys, time
workdir, saves, status = pathlib.Path(sys.argv[1].partition("=")[2]), json.loads(sys.argv[2]), int(sys.argv[3])
(workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text(json.dumps({"config": {"phases": [{"steps": 4}, {"steps": 6}]}}))
before = sum(1 for _ in (workdir / "checkpoints").iterdir())
for step in saves[before : before + 1]:
    (workdir / "checkpoints" / str(step)).mkdir()
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("saves", "status", "expected", "restarts_seen"),
    [
        ([10], 0, 0, 0),  # done
        ([6], 0, 75, 0),  # stopped, saved
        (["10.orbax-checkpoint-tmp"], 0, 75, 0),  # half saved is not done
        ([], 3, 3, 2),  # fails, saves nothing
        ([2, 4], 3, 3, 3),  # fails, but comes further twice, the second time for one restart more
        ([], -1, 255, 2),
    ],
)
def test_the_exit_status_says_what_to_do(
    tmp_path: Path, saves: list[Any], status: int, expected: int, restarts_seen: int
):
    loop = start(sys.executable, "-c", FAKE, f"--workdir={tmp_path}", json.dumps(saves), str(status), restarts=2)
    _, err = loop.communicate(timeout=60)
    assert loop.returncode == expected, err
    assert err.count("starting it again") == restarts_seen


def test_without_a_work_directory_nothing_is_started():
    loop = start(sys.executable, "-m", "micro_dit.main", "--config=configs/mask75.py")
    assert loop.communicate(timeout=60)[1].startswith("error: the command has no --workdir=FOLDER")
    assert loop.returncode == 1
