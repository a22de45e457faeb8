"""A run that is killed, stopped and killed again ends bit for bit where an undisturbed one does."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny

from micro_dit.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
SECONDS = 300


def start(shards: Path, workdir: Path) -> subprocess.Popen:
    """The real command line."""
    command = [sys.executable, "-m", "micro_dit.main", f"--config=tests/tiny.py:{shards}", f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    steps = re.findall(r'^\{"step": (\d+)', path.read_text(), re.MULTILINE) if path.exists() else []
    return int(steps[-1]) if steps else 0


def stop_at(process: subprocess.Popen, workdir: Path, step: int, number: int) -> tuple[str, str]:
    """Waits until a step of this start is on record, and sends a signal; returns what was printed."""
    path = workdir / "metrics.jsonl"
    size, until = path.stat().st_size if path.exists() else 0, time.monotonic() + SECONDS
    while not (path.exists() and path.stat().st_size > size and last_step(workdir) >= step):
        assert process.poll() is None, f"ended before step {step}: {process.communicate()}"
        assert time.monotonic() < until, f"no step {step} within {SECONDS} seconds"
        time.sleep(0.002)
    os.kill(process.pid, number)
    return process.communicate(timeout=SECONDS)


def test_kills_and_signals_in_both_phases_change_nothing(tiny_shards: Path, finished_run: Path, tmp_path: Path):
    moments = random.Random(0)
    workdir = tmp_path / "run"

    # Killed in the first phase, after its first checkpoint.
    process = start(tiny_shards, workdir)
    stop_at(process, workdir, moments.randint(11, 18), signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL

    # Goes on, and stops when asked to.
    process = start(tiny_shards, workdir)
    out, err = stop_at(process, workdir, moments.randint(27, 34), signal.SIGTERM)
    assert process.returncode == 0, err
    assert re.search(r"continuing from step (8|16) of 84", out)
    assert "stopping after this step, saving first" in out
    (stopped,) = re.findall(r"stopped at step (\d+) of 84, saved in .*run the same command", out)
    assert 27 <= int(stopped) < 48
    assert Checkpoints(workdir).steps[0] == int(stopped)

    # Killed in the second phase: this start crosses the boundary.
    process = start(tiny_shards, workdir)
    out, _ = stop_at(process, workdir, moments.randint(57, 63), signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert f"continuing from step {stopped} of 84" in out

    # To the end.
    process = start(tiny_shards, workdir)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert "done: 84 steps, 336 images" in out
    tiny.assert_same_end(workdir, finished_run)
