"""A run that is killed and stopped at any moments ends bit for bit as an undisturbed one does, by the same batches.

It runs under the loop that all launchers run their training in.
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
# The ways to die, in turn: once a step is done, while a checkpoint is saved, and before the first step.
WAYS = ("after a step", "in a save", "at the start")


class Loop:
    """The real command line, as all launchers start it; to be used in a with statement, after which nothing runs."""

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
        """Waits until the loop has started the training anew; `run` is then its process."""
        while (runs := self.children()) in ([], [self.run]):
            self.check("another start")
            time.sleep(0.01)
        (self.run,), self.until = runs, time.monotonic() + SECONDS
        self.size = self.metrics.stat().st_size if self.metrics.exists() else 0

    def wait_for(self, step: int) -> None:
        """Until this start, not one before, has done a step."""
        while not (self.metrics.exists() and self.metrics.stat().st_size > self.size and self.last_step() >= step):
            self.check(f"step {step}")
            time.sleep(0.002)

    def last_step(self) -> int:
        steps = re.findall(r'^\{"step": (\d+)', self.metrics.read_text(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def freeze_in_a_save(self) -> None:
        """Stops the run at a moment at which a checkpoint is half written."""
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
        """Its exit status and what was printed, once it has ended by itself."""
        return self.process.wait(timeout=SECONDS), self.out.read_text()


def half_saved(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def batches_of(shards: Path) -> dict[tuple[str, str], int]:
    """The checksum of each batch of a tiny run, by phase and position, from the data alone."""
    config, found = tiny.get_config(str(shards)), {}
    for index, phase in enumerate(config.phases):
        iterator = make_train_iterator(
            str(shards), "train", phase["resolution"], phase["batch_size"], seed=config.seed + index
        )
        for _ in range(phase["steps"]):
            position = json.dumps(iterator.get_state(), sort_keys=True)
            found[str(config.seed + index), position] = checksum(next(iterator))
    return found


def test_kills_and_a_signal_change_nothing(
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

        # Asked to stop, as a machine is that is taken away, it saves first.
        loop.next_run()
        loop.wait_for(Checkpoints(workdir).steps[0] + 1)
        loop.process.send_signal(signal.SIGTERM)
        status, out = loop.finish()
    assert status == 75, out
    assert re.findall(r"the run exited with status (.*): restarting it", out) == [str(-signal.SIGKILL)] * kills
    assert "stopping after this step, saving first" in out
    (stopped,) = re.findall(rf"stopped at step (\d+) of {STEPS}, saved in .*: resumable by running the same", out)
    assert Checkpoints(workdir).steps[0] == int(stopped) < STEPS

    # To the end.
    with Loop(tiny_shards, workdir, restarts=0) as loop:
        status, out = loop.finish()
    assert status == 0, out
    assert f"continuing from step {stopped} of {STEPS}" in out
    assert f"done: {STEPS} steps, {4 * STEPS} images" in out
    assert not half_saved(workdir)
    ours, theirs = (read_metrics(folder / "metrics.jsonl")[-1] for folder in (workdir, finished_run))
    assert (ours["step"], ours["loss"]) == (STEPS, theirs["loss"])
    tiny.assert_same_end(workdir, finished_run)

    # Every batch is what it should be, each time it was taken, and none is left out.
    lines = (workdir.with_name("batches.jsonl")).read_text().splitlines()
    taken = [json.loads(line) for line in lines]
    expected = batches_of(tiny_shards)
    assert [value for _, _, value in taken] == [expected[data, position] for data, position, _ in taken]
    assert list(dict.fromkeys((data, position) for data, position, _ in taken)) == list(expected)
    with capsys.disabled():
        if kills > len(WAYS):
            print("", *seen, f"{len(taken) - STEPS} batches were taken again", sep="\n")
