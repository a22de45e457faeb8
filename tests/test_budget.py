"""The `budget` command, and its estimate for the paper's recipe compared with the paper's table of costs."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from micro_dit.errors import UserError
from micro_dit.models.config import make_config
from micro_dit.planning.networks import phase_networks
from micro_dit.planning.paper_costs import PAPER, paper_rows
from micro_dit.training.phases import Phase, make_phases
from tests.helpers import tiny

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "micro_dit.budget", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_agrees_with_the_paper_and_reports_the_flops_saved_by_gathering() -> None:
    """Uses configs/mask75.py:xl without any shards."""
    done = run("--config=configs/mask75.py:xl", "--price_per_hour=3.75", "--mfu=0.45", "--paper", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for row, paper in zip(found["paper"], PAPER, strict=True):
        assert row["flops_one_hot"] == pytest.approx(paper.flops, rel=0.01)
        assert row["difference"] == pytest.approx(0, abs=0.01)
        assert row["node_days"] == pytest.approx(paper.node_days, rel=0.03)
        assert row["dollars"] == pytest.approx(paper.dollars, rel=0.03)
        assert row["images_per_second"] == pytest.approx(paper.images_per_second, rel=0.03)
    assert [round(100 * row["saved"]) for row in found["paper"]] == [2, 3, 7, 12]
    assert [row["flops_gather"] for row in found["paper"]] == [row["flops"] for row in found["phases"]]
    for row in found["phases"]:
        assert row["chip_hours"] == pytest.approx(row["flops"] / (0.45 * 989e12) / 3600)
        assert row["dollars"] == pytest.approx(3.75 * row["chip_hours"])


def test_command_prints_tables() -> None:
    done = run("--config=configs/mask75.py:xl", "--chip=v5e", "--devices=64", "--paper")
    assert done.returncode == 0, done.stderr
    assert "64 × v5e at 30.0% of 197 TFLOP/s, $3.75 per chip-hour" in done.stdout  # MFU and price from the config
    assert done.stdout.count("masked-512") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No config was given"),
        (["--config=configs/mask75.py", "--paper"], "the config has 2. Use --config=configs/mask75.py:xl"),
        (["--config=configs/mask75.py", "--config.data.vae=mine"], "image encoder 'mine'"),
        (["--config=configs/mask75.py", "--config.data.text_encoder=mine"], "text encoder 'mine'"),
        (["--config=configs/mask75.py", "--chip=abacus"], "abacus"),
    ],
)
def test_command_prints_user_errors_as_one_line(arguments: list[str], message: str) -> None:
    if arguments and "xl" not in arguments[0]:
        arguments = [*arguments, "--config.data.shards="]  # ignores the shards of an earlier run
    done = run(*arguments)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 1


@pytest.mark.parametrize(("fields", "tokens"), [({}, 16), ({"source": ""}, 77), ({"caption_tokens": 32}, 32)])
def test_caption_tokens_without_shards_have_a_default(fields: dict[str, Any], tokens: int) -> None:
    config = tiny.load_config_file(tiny.CONFIGS / "mask75.py")
    config.data.update(shards="", **fields)
    assert phase_networks(make_phases(config.phases), config.model, config.data)[1] == tokens


def test_paper_rows_require_the_papers_four_phases() -> None:
    with pytest.raises(UserError, match="four phases"):
        paper_rows([make_config("Nano", input_size=16)], [Phase("p", 128, 10, 10, 1e-3, 0.0)], 77)
