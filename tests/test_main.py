"""The command line: what is wrong is one line on standard error, and the exit status 1."""

import subprocess
import sys
from pathlib import Path

import pytest

from micro_dit.cli import exit_status
from micro_dit.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/mask75.py", "--config.sampling.stpes=3"], "'sampling.stpes'; did you mean sampling.steps"),
        (["--config=configs/mask75.py:foo"], "no variant 'foo'; use one of demo, small, openmoji, tiny, xl"),
        (["--config=configs/mask75.py", "--config.quantize=int8"], "`quantize` was removed (8-bit products showed"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/mask75.py", "--config.seed=many"], "many"),
        ([], "no config given; try --config=configs/mask75.py"),
        (["--config=configs/mask75.py", "what"], "unknown argument 'what'"),
        (["--config=configs/mask75.py:xl", "--config.data.shards=nowhere"], "No shards at nowhere"),
    ],
    ids=[
        "unknown field", "unknown variant", "removed field", "missing file", "wrong type", "no config",
        "stray argument", "no shards",
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "micro_dit.main", f"--workdir={tmp_path / 'run'}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()


def test_only_errors_meant_for_the_user_lose_their_traceback(capsys: pytest.CaptureFixture) -> None:
    def wrong(argv: object) -> None:
        raise UserError("this is wrong; do that.")

    def broken(argv: object) -> None:
        raise KeyError("a bug")

    assert exit_status(wrong, []) == 1
    assert capsys.readouterr().err == "error: this is wrong; do that.\n"
    assert exit_status(lambda argv: None, []) == 0
    with pytest.raises(KeyError):
        exit_status(broken, [])
