"""Parameter names, shapes and counts of the published sizes."""

import json
from pathlib import Path

from micro_dit.interop.torch_checkpoint import release_shapes
from micro_dit.models.config import make_config
from micro_dit.models.dit import abstract_params


def test_names_shapes_and_counts(size_file: Path) -> None:
    golden = json.loads(size_file.read_text())
    config = make_config(golden["arch"], **golden["ctor"])
    assert release_shapes(config) == {name: tuple(shape) for name, shape in golden["state_dict"]}
    assert sum(leaf.size for leaf in abstract_params(config).values()) == golden["total_params"]


def test_widths_of_every_block(size_file: Path) -> None:
    golden = json.loads(size_file.read_text())
    config = make_config(golden["arch"], **golden["ctor"])
    ours = config.mixer_blocks() + config.backbone_blocks()
    assert len(ours) == len(golden["blocks"])
    for block, expected in zip(ours, golden["blocks"], strict=True):
        assert (block.dim, block.attention_width, block.hidden_width) == (
            expected["dim"], expected["qkv_hidden"], expected["mlp_hidden"],
        )  # fmt: skip
        assert block.moe == (expected["mlp"] == "FeedForwardECMoe")
        assert abs(block.out_std - expected["weight_init_std"]) < 1e-9
