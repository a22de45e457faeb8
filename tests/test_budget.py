"""FLOPs against the counts of PyTorch's FlopCounterMode on the public release; costs against the paper's table."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from micro_dit.budget import CHIPS, PAPER, Phase, chip_of, forward_flops, paper_rows, plan, training_flops
from micro_dit.errors import UserError
from micro_dit.models.dit import make_config

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / "golden"
ROWS = [
    pytest.param(size, row, id=f"{size}-{row['resolution']}-{row['mask_ratio']}")
    for size in ("MicroDiT_Tiny_2", "MicroDiT_XL_2")
    for row in json.loads((GOLDEN / f"{size}.json").read_text())["forward_flops"]
]
PAPER_PHASES = [
    Phase("256 px, masked", 32, 0.75, 250_000, 2048),
    Phase("256 px, unmasked", 32, 0.0, 30_000, 2048),
    Phase("512 px, masked", 64, 0.75, 50_000, 2048),
    Phase("512 px, unmasked", 64, 0.0, 5_000, 2048),
]


@pytest.mark.parametrize(("size", "row"), ROWS)
def test_parts_equal_the_release(size, row):
    config = make_config(size, input_size=row["latent"])
    parts = forward_flops(config, row["mask_ratio"], row["caption_len"], one_hot_dispatch=True)

    golden, modules = row["analytic"], row["modules"]
    assert parts["patch_embedding"] == golden["x_embedder"]
    assert parts["noise_embedding"] == golden["t_embedder"]
    assert parts["caption_projection"] == golden["y_embedder"]
    assert parts["caption_block"] == golden["y_emb_preprocess"]
    assert parts["caption_block/attention"] == golden["y_emb_preprocess/sdpa"]
    assert parts["pooled_caption"] == golden["pooled_y"]
    assert parts["mixer/attention"] == golden["patch_mixer/sdpa"]
    assert parts["mixer/dispatch"] == golden["patch_mixer/moe_onehot"]
    assert parts["backbone/attention"] == golden["backbone/sdpa"]
    assert parts["backbone/dispatch"] == golden["backbone/moe_onehot"]
    assert parts["final_layer"] == golden["final_layer"]
    assert parts["mixer_in"] == modules["map_xin"]
    assert parts["mixer_caption_in"] == modules["map_y"]
    assert parts["mixer_out"] == modules["map_xout"]
    # The golden file counts the projections between the widths with the stack they lead to.
    assert parts["mixer"] + parts["mixer_in"] + parts["mixer_caption_in"] == golden["patch_mixer"]
    assert parts["backbone"] + parts["mixer_out"] == golden["backbone"]
    for stack, module in (("mixer", "patch_mixer"), ("backbone", "backbone")):
        assert sum(value for name, value in parts.items() if name.split("/")[0] == stack) == modules[module]

    assert sum(parts.values()) == row["flop_counter_total"]
    gathered = forward_flops(config, row["mask_ratio"], row["caption_len"])
    assert sum(gathered.values()) == row["total_without_onehot"]


def test_naive_masking_is_cheaper_than_deferred_by_the_mixer():
    config = make_config("MicroDiT_XL_2", input_size=32)
    deferred, naive = (forward_flops(config, 0.75, mask_position=place) for place in ("after_mixer", "before_mixer"))
    changed = {name for name in deferred if deferred[name] != naive[name]}
    assert changed == {"mixer", "mixer/attention", "mixer_in"}
    assert naive["mixer_in"] == deferred["mixer_in"] / 4
    assert naive["mixer"] < deferred["mixer"] / 3


def test_without_a_mixer_nothing_is_counted_for_it():
    parts = forward_flops(make_config("MicroDiT_XL_2", input_size=32, use_patch_mixer=False))
    assert {value for name, value in parts.items() if name.startswith("mixer")} == {0}
    assert parts["backbone"] > 0


def test_training_is_three_forwards():
    config = make_config("Nano", input_size=16)
    assert training_flops(config, 0.5, 32) == 3 * sum(forward_flops(config, 0.5, 32).values())


def test_impossible_mask_is_refused():
    with pytest.raises(UserError, match="mask_ratio"):
        forward_flops(make_config("Nano", input_size=16), 0.999)


def test_plan_agrees_with_the_paper():
    """Table of the paper: its FLOPs are 3 × forward and include the release's one-hot products."""
    flops = (1.47e20, 4.53e19, 1.18e20, 3.48e19)
    days = (1.11, 0.38, 0.88, 0.26)
    dollars = (800, 271, 630, 189)
    images_per_second = (667, 234, 168, 57)
    mfu = (0.194, 0.174, 0.196, 0.196)
    config = make_config("MicroDiT_XL_2", input_size=32)
    for i, phase in enumerate(PAPER_PHASES):
        result = plan(config, [phase], CHIPS["h100"], devices=8, mfu=mfu[i], one_hot_dispatch=True)
        assert result.flops == pytest.approx(flops[i], rel=0.01)
        assert result.hours / 24 == pytest.approx(days[i], rel=0.03)
        assert result.dollars == pytest.approx(dollars[i], rel=0.03)
        assert result.costs[0].images_per_second / 8 == pytest.approx(images_per_second[i], rel=0.03)
    total = plan(config, PAPER_PHASES, CHIPS["h100"], one_hot_dispatch=True).flops
    assert total == pytest.approx(3.45e20, rel=0.01)


def test_plan_adds_up_and_prints():
    config = make_config("MicroDiT_XL_2", input_size=32)
    result = plan(config, PAPER_PHASES, CHIPS["v5e"], devices=16, mfu=0.4, price=2.0)
    assert result.hours == pytest.approx(sum(cost.hours for cost in result.costs))
    assert result.dollars == pytest.approx(result.hours * 16 * 2.0)
    table = result.table()
    assert all(phase.name in table for phase in PAPER_PHASES)
    assert f"{result.dollars:,.0f}" in table
    assert len({len(line) for line in table.splitlines()[2:]}) == 1, "columns do not line up"


@pytest.mark.parametrize("wrong", [{"mfu": 0.0}, {"mfu": 40.0}, {"devices": 0}])
def test_senseless_plan_is_refused(wrong):
    with pytest.raises(UserError, match="mfu"):
        plan(make_config("Nano", input_size=16), [Phase("p", 16, 0.0, 10, 10)], CHIPS["h100"], **wrong)


def test_unknown_price_stays_unknown():
    free = dataclasses.replace(CHIPS["h100"], price=None)
    result = plan(make_config("Nano", input_size=16), [Phase("p", 16, 0.0, 10, 10)], free)
    assert result.dollars is None
    assert "–" in result.table()


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("cpu", None),
        ("TPU v4 lite", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_chip_of(device_kind, name):
    chip = chip_of(device_kind)
    assert (chip.name if chip else None) == name


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "micro_dit.budget", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_agrees_with_the_paper_and_shows_what_the_gather_saves():
    """The paper's recipe as it is shipped, with no shards in sight."""
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


def test_command_prints_tables():
    done = run("--config=configs/mask75.py:xl", "--chip=v5e", "--devices=64", "--paper")
    assert done.returncode == 0, done.stderr
    assert "64 × v5e at 30.0% of 197 TFLOP/s, $3.75 a chip-hour" in done.stdout  # the config's share and price
    assert done.stdout.count("masked-512") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no config given"),
        (["--config=configs/mask75.py", "--paper"], "the config has 2; use configs/mask75.py:xl"),
        (["--config=configs/mask75.py", "--config.data.vae=mine"], "image encoder 'mine'"),
        (["--config=configs/mask75.py", "--config.data.text_encoder=mine"], "text encoder 'mine'"),
        (["--config=configs/mask75.py", "--chip=abacus"], "abacus"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(arguments: list[str], message: str):
    if arguments and "xl" not in arguments[0]:
        arguments = [*arguments, "--config.data.shards="]  # whatever an earlier run left there
    done = run(*arguments)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 1


def test_paper_rows_need_its_phases():
    with pytest.raises(UserError, match="four phases"):
        paper_rows(make_config("MicroDiT_XL_2", input_size=32), PAPER_PHASES[:3], 77)
