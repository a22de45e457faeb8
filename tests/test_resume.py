"""A run that is killed and stopped at random times is bitwise identical to an uninterrupted one, with the same batches.

The run is started by launch/until_done.py, like the runs of all launchers.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from micro_dit.data.pipeline import make_train_iterator
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.metrics import read_metrics
from tests.helpers import tiny
from tests.helpers.recorded_run import checksum

ROOT = Path(__file__).parent.parent
SECONDS = 600
STEPS = 84
# The run is killed after a step, while a checkpoint is being saved, and before the first step, in turn.
WAYS = ("after a step", "in a save", "at the start")


class Loop:
    """A training run started by launch/until_done.py. It is a context manager that ends all processes on exit."""

    def __init__(self, shards: Path, workdir: Path, restarts: int) -> None:
        self.workdir, self.metrics, self.out = workdir, workdir / "metrics.jsonl", workdir.with_name("out.txt")
        command = [sys.executable, "launch/until_done.py", f"--restarts={restarts}"]
        command += [sys.executable, "-m", "tests.helpers.recorded_run", str(workdir.with_name("batches.jsonl"))]
        command += [f"--config=tests/helpers/tiny.py:{shards}", f"--workdir={workdir}", "--config.checkpoint_every=4"]
        with open(self.out, "w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=out, stderr=out
            )
        self.until, self.run = time.monotonic() + SECONDS, 0

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *error: object) -> None:
        runs = self.children()
        self.process.kill()
        self.process.wait()
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(run, signal.SIGKILL)

    def children(self) -> list[int]:
        command = ["pgrep", "-P", str(self.process.pid)]
        return [int(line) for line in subprocess.run(command, capture_output=True, text=True).stdout.split()]

    def next_run(self) -> None:
        """Waits until the loop has started another training process, and sets `run` to its process id."""
        while (runs := self.children()) in ([], [self.run]):
            self.check("another start")
            time.sleep(0.01)
        (self.run,), self.until = runs, time.monotonic() + SECONDS
        self.size = self.metrics.stat().st_size if self.metrics.exists() else 0

    def wait_for(self, step: int) -> None:
        """Waits until the current training process has completed a step."""
        while not (self.metrics.exists() and self.metrics.stat().st_size > self.size and self.last_step() >= step):
            self.check(f"step {step}")
            time.sleep(0.002)

    def last_step(self) -> int:
        steps = re.findall(r'^\{"step": (\d+)', self.metrics.read_text(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def freeze_in_a_save(self) -> None:
        """Suspends the run while a checkpoint is partially written."""
        while True:
            self.check("a save")
            if half_saved(self.workdir):
                os.kill(self.run, signal.SIGSTOP)
                if half_saved(self.workdir):
                    return
                os.kill(self.run, signal.SIGCONT)
            time.sleep(0.001)

    def check(self, awaited: str) -> None:
        assert self.process.poll() is None, f"ended before {awaited}: {self.out.read_text()}"
        assert time.monotonic() < self.until, f"no {awaited} within {SECONDS} seconds: {self.out.read_text()}"

    def finish(self) -> tuple[int, str]:
        """Waits until the loop exits, and returns its exit status and output."""
        return self.process.wait(timeout=SECONDS), self.out.read_text()


def half_saved(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def batches_of(shards: Path) -> dict[tuple[str, str], int]:
    """Returns the checksum of each batch of a tiny run by phase and iterator position, without training."""
    config, found = tiny.get_config(str(shards)), {}
    for index, phase in enumerate(config.phases):
        iterator = make_train_iterator(
            str(shards), "train", phase["resolution"], phase["batch_size"], seed=config.seed + index
        )
        for _ in range(phase["steps"]):
            position = json.dumps(iterator.get_state(), sort_keys=True)
            found[str(config.seed + index), position] = checksum(next(iterator))
    return found


def test_a_run_with_kills_and_a_signal_is_bitwise_identical(
    tiny_shards: Path, finished_run: Path, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture
) -> None:
    kills = pytestconfig.getoption("kills")
    moments, workdir, seen = random.Random(kills), tmp_path / "run", []
    targets = sorted(moments.sample(range(3, STEPS - 14), kills))
    with Loop(tiny_shards, workdir, restarts=kills) as loop:
        for number, target in enumerate(targets):
            loop.next_run()
            way = WAYS[number % len(WAYS)]
            if way == "at the start":
                time.sleep(moments.uniform(0.5, 5))
            else:
                loop.wait_for(target)
            if way == "in a save":
                loop.freeze_in_a_save()
            else:
                time.sleep(moments.uniform(0, 0.02))
            step = loop.last_step() if loop.metrics.exists() else 0
            seen.append(f"{way}, step {step}, half saved: {[path.name for path in half_saved(workdir)]}")
            os.kill(loop.run, signal.SIGKILL)
            assert step < STEPS, "killed too late"

        # On SIGTERM, as sent before a preemption, the run saves a checkpoint.
        loop.next_run()
        loop.wait_for(Checkpoints(workdir).steps[0] + 1)
        loop.process.send_signal(signal.SIGTERM)
        status, out = loop.finish()
    assert status == 75, out
    assert re.findall(r"the run exited with status (.*): restarting it", out) == [str(-signal.SIGKILL)] * kills
    assert "Stopping after this step and saving a checkpoint" in out
    (stopped,) = re.findall(rf"Stopped at step (\d+) of {STEPS} and saved a checkpoint in .*\. Run the same", out)
    assert Checkpoints(workdir).steps[0] == int(stopped) < STEPS

    # The next start finishes the run.
    with Loop(tiny_shards, workdir, restarts=0) as loop:
        status, out = loop.finish()
    assert status == 0, out
    assert f"Resuming from step {stopped} of {STEPS}" in out
    assert f"Finished: {STEPS} steps, {4 * STEPS} images" in out
    assert not half_saved(workdir)
    ours, theirs = (read_metrics(folder / "metrics.jsonl")[-1] for folder in (workdir, finished_run))
    assert (ours["step"], ours["loss"]) == (STEPS, theirs["loss"])
    tiny.assert_same_end(workdir, finished_run)

    # Every batch is the expected one each time that it is read, and no batch is skipped.
    lines = (workdir.with_name("batches.jsonl")).read_text().splitlines()
    batches_read = [json.loads(line) for line in lines]
    expected = batches_of(tiny_shards)
    assert [value for _, _, value in batches_read] == [expected[data, position] for data, position, _ in batches_read]
    assert list(dict.fromkeys((data, position) for data, position, _ in batches_read)) == list(expected)
    with capsys.disabled():
        if kills > len(WAYS):
            print("", *seen, f"{len(batches_read) - STEPS} batches were read again", sep="\n")
