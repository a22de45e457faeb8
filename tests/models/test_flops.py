"""Compares FLOPs with the counts of PyTorch's FlopCounterMode on the public release."""

import json
from pathlib import Path
from typing import Any

import pytest

from micro_dit.errors import UserError
from micro_dit.models.config import make_config
from micro_dit.models.flops import forward_flops, training_flops

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = [
    pytest.param(size, row, id=f"{size}-{row['resolution']}-{row['mask_ratio']}")
    for size in ("MicroDiT_Tiny_2", "MicroDiT_XL_2")
    for row in json.loads((GOLDEN / f"{size}.json").read_text())["forward_flops"]
]


@pytest.mark.parametrize(("size", "row"), ROWS)
def test_parts_match_the_release(size: str, row: Any) -> None:
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
    # The golden file counts each projection between widths as part of the stack that follows it.
    assert parts["mixer"] + parts["mixer_in"] + parts["mixer_caption_in"] == golden["patch_mixer"]
    assert parts["backbone"] + parts["mixer_out"] == golden["backbone"]
    for stack, module in (("mixer", "patch_mixer"), ("backbone", "backbone")):
        assert sum(value for name, value in parts.items() if name.split("/")[0] == stack) == modules[module]

    assert sum(parts.values()) == row["flop_counter_total"]
    gathered = forward_flops(config, row["mask_ratio"], row["caption_len"])
    assert sum(gathered.values()) == row["total_without_onehot"]


def test_naive_masking_only_reduces_the_cost_of_the_mixer() -> None:
    config = make_config("MicroDiT_XL_2", input_size=32)
    deferred, naive = (forward_flops(config, 0.75, mask_position=place) for place in ("after_mixer", "before_mixer"))
    changed = {name for name in deferred if deferred[name] != naive[name]}
    assert changed == {"mixer", "mixer/attention", "mixer_in"}
    assert naive["mixer_in"] == deferred["mixer_in"] / 4
    assert naive["mixer"] < deferred["mixer"] / 3


def test_network_without_a_mixer_has_no_mixer_flops() -> None:
    parts = forward_flops(make_config("MicroDiT_XL_2", input_size=32, use_patch_mixer=False))
    assert {value for name, value in parts.items() if name.startswith("mixer")} == {0}
    assert parts["backbone"] > 0


def test_training_costs_three_forward_passes() -> None:
    config = make_config("Nano", input_size=16)
    assert training_flops(config, 0.5, 32) == 3 * sum(forward_flops(config, 0.5, 32).values())


def test_rejects_masks_that_keep_no_token() -> None:
    with pytest.raises(UserError, match="mask_ratio"):
        forward_flops(make_config("Nano", input_size=16), 0.999)
