"""A run that is killed and stopped at any moments ends bit for bit as an undisturbed one does, by the same batches."""

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
import tiny
from recorded_run import checksum

from micro_dit.data.pipeline import make_train_iterator
from micro_dit.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
SECONDS = 300
STEPS = 84
# The ways to die, in turn: once a step is done, while a checkpoint is saved, and before the first step.
WAYS = ("after a step", "in a save", "at the start")


class Run:
    """One start of the real command line; to be used in a with statement, after which it runs no more."""

    def __init__(self, shards: Path, workdir: Path):
        self.workdir, self.metrics = workdir, workdir / "metrics.jsonl"
        self.size = self.metrics.stat().st_size if self.metrics.exists() else 0
        command = [sys.executable, ROOT / "tests" / "recorded_run.py", workdir.with_name("batches.jsonl")]
        command += [f"--config=tests/tiny.py:{shards}", f"--workdir={workdir}", "--config.checkpoint_every=2"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.until = time.monotonic() + SECONDS

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for(self, step: int) -> None:
        """Until this start, not one before, has done a step."""
        while not (self.metrics.exists() and self.metrics.stat().st_size > self.size and self.last_step() >= step):
            self.check(f"step {step}")
            time.sleep(0.002)

    def last_step(self) -> int:
        steps = re.findall(r'^\{"step": (\d+)', self.metrics.read_text(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def freeze_in_a_save(self) -> None:
        """Stops the process at a moment at which a checkpoint is half written."""
        while True:
            self.check("a save")
            if half_saved(self.workdir):
                self.process.send_signal(signal.SIGSTOP)
                if half_saved(self.workdir):
                    return
                self.process.send_signal(signal.SIGCONT)
            time.sleep(0.001)

    def check(self, awaited: str) -> None:
        assert self.process.poll() is None, f"ended before {awaited}: {self.process.communicate()}"
        assert time.monotonic() < self.until, f"no {awaited} within {SECONDS} seconds"

    def finish(self) -> tuple[str, str]:
        """What it printed, until it ended by itself."""
        return self.process.communicate(timeout=SECONDS)


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
):
    kills = pytestconfig.getoption("kills")
    moments, workdir, seen = random.Random(kills), tmp_path / "run", []
    targets = sorted(moments.sample(range(3, STEPS - 14), kills))
    for number, target in enumerate(targets):
        with Run(tiny_shards, workdir) as run:
            way = WAYS[number % len(WAYS)]
            if way == "at the start":
                time.sleep(moments.uniform(0.5, 5))
            else:
                run.wait_for(target)
            if way == "in a save":
                run.freeze_in_a_save()
            else:
                time.sleep(moments.uniform(0, 0.02))
            run.process.kill()
            run.process.wait()
            step = run.last_step() if run.metrics.exists() else 0
            seen.append(f"{way}, step {step}, half saved: {[path.name for path in half_saved(workdir)]}")
            assert run.process.returncode == -signal.SIGKILL
            assert step < STEPS, "killed too late"

    # Asked to stop, it saves first.
    with Run(tiny_shards, workdir) as run:
        run.wait_for(Checkpoints(workdir).steps[0] + 1)
        run.process.send_signal(signal.SIGTERM)
        out, err = run.finish()
    assert run.process.returncode == 0, err
    assert "stopping after this step, saving first" in out
    (stopped,) = re.findall(rf"stopped at step (\d+) of {STEPS}, saved in .*: resumable by running the same", out)
    assert Checkpoints(workdir).steps[0] == int(stopped)

    # To the end.
    with Run(tiny_shards, workdir) as run:
        out, err = run.finish()
    assert run.process.returncode == 0, err
    assert f"continuing from step {stopped} of {STEPS}" in out
    assert f"done: {STEPS} steps, {4 * STEPS} images" in out
    assert not half_saved(workdir)
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
