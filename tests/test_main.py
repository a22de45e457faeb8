"""The command line: a user error is printed as one line on standard error, and the exit status is 1."""

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
        (["--config=configs/mask75.py", "--config.sampling.stpes=3"], "'sampling.stpes'. Did you mean sampling.steps"),
        (["--config=configs/mask75.py:foo"], "no variant 'foo'; use one of demo, small, openmoji, tiny, xl"),
        (["--config=configs/mask75.py", "--config.quantize=int8"], "`quantize` was removed (8-bit matrix products"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/mask75.py", "--config.seed=many"], "many"),
        ([], "No config was given. Set --config, for example --config=configs/mask75.py"),
        (["--config=configs/mask75.py", "what"], "Unknown argument 'what'"),
        (["--config=configs/mask75.py:xl", "--config.data.shards=nowhere"], "No shards at nowhere"),
    ],
    ids=[
        "unknown field", "unknown variant", "removed field", "missing file", "wrong type", "no config",
        "stray argument", "no shards",
    ],
)  # fmt: skip
def test_user_errors_are_printed_as_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "micro_dit.main", f"--workdir={tmp_path / 'run'}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()


def test_only_user_errors_are_printed_without_a_traceback(capsys: pytest.CaptureFixture) -> None:
    def wrong(argv: object) -> None:
        raise UserError("The value is wrong. Change it.")

    def broken(argv: object) -> None:
        raise KeyError("a bug")

    assert exit_status(wrong, []) == 1
    assert capsys.readouterr().err == "error: The value is wrong. Change it.\n"
    assert exit_status(lambda argv: None, []) == 0
    with pytest.raises(KeyError):
        exit_status(broken, [])
