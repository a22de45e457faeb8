"""The restart loop of all launchers; tests/test_resume.py kills and preempts a real run in it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def start(*command: Any, restarts: int = 3) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch/until_done.py", f"--restarts={restarts}", *command], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


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
        ([6], 0, 75, 0),  # stopped and saved
        (["10.orbax-checkpoint-tmp"], 0, 75, 0),  # a partial checkpoint does not count
        ([], 3, 3, 2),  # fails without saving
        ([2, 4], 3, 3, 3),  # fails, but a new checkpoint resets the count of failures
        ([], -1, 255, 2),
    ],
)
def test_exit_status_and_number_of_restarts(
    tmp_path: Path, saves: list[Any], status: int, expected: int, restarts_seen: int
) -> None:
    loop = start(sys.executable, "-c", FAKE, f"--workdir={tmp_path}", json.dumps(saves), str(status), restarts=2)
    _, err = loop.communicate(timeout=300)
    assert loop.returncode == expected, err
    assert err.count("restarting it") == restarts_seen


def test_requires_a_work_directory() -> None:
    loop = start(sys.executable, "-m", "micro_dit.main", "--config=configs/mask75.py")
    assert loop.communicate(timeout=300)[1].startswith("error: The command has no --workdir. Add --workdir=FOLDER")
    assert loop.returncode == 1
