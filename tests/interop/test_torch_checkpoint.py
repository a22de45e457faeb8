"""Names and layouts of the public release's state dict; tests/parity compares the network's outputs."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from micro_dit.errors import UserError
from micro_dit.interop.torch_checkpoint import (
    from_state_dict,
    recognize,
    release_name,
    release_shapes,
    to_state_dict,
    without_wrappers,
)
from micro_dit.models.config import make_config
from micro_dit.models.embeddings import position_table
from tests.helpers import tiny

CONFIG = tiny.network(use_bias=True)


@pytest.fixture
def state_dict() -> dict[str, np.ndarray]:
    return to_state_dict({name: np.asarray(value) for name, value in tiny.random_params(CONFIG).items()}, CONFIG)


def test_round_trip_is_bitwise_equal(state_dict: dict[str, np.ndarray]) -> None:
    params = tiny.random_params(CONFIG)
    back = from_state_dict(state_dict, CONFIG)
    assert list(back) == list(params)
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert {name: value.shape for name, value in state_dict.items()} == release_shapes(CONFIG)
    np.testing.assert_array_equal(state_dict["pos_embed"][0], position_table(32, 4, 1.0))
    np.testing.assert_array_equal(state_dict["mask_token"], np.zeros((1, 1, 16)))


def test_layouts(state_dict: dict[str, np.ndarray]) -> None:
    params = {name: np.asarray(value) for name, value in tiny.random_params(CONFIG).items()}
    np.testing.assert_array_equal(state_dict["blocks.1.attn.qkv.weight"], params["blocks.1.attn.qkv.kernel"].T)
    patch = params["patch_embedding.proj.kernel"].reshape(2, 2, 4, 32)
    np.testing.assert_array_equal(state_dict["x_embedder.proj.weight"][5, 3], patch[:, :, 3, 5])
    # Expert weights have the same layout in both.
    np.testing.assert_array_equal(state_dict["blocks.0.mlp.w1"], params["blocks.0.mlp.w1"])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("mixer.1.attn.qkv.kernel", "patch_mixer.1.attn.qkv.weight"),
        ("blocks.0.cross_attn.kv.bias", "blocks.0.cross_attn.kv_linear.bias"),
        ("blocks.0.adaln.kernel", "blocks.0.adaLN_modulation.1.weight"),
        ("mixer_caption_in.norm.scale", "patch_mixer_map_y.0.weight"),
        ("mixer_out.linear.bias", "patch_mixer_map_xout.1.bias"),
        ("final_layer.norm.scale", "final_layer.norm_final.weight"),
    ],
)
def test_names(ours: str, theirs: str) -> None:
    assert release_name(ours) == theirs


def test_names_do_not_collide() -> None:
    assert len(release_shapes(CONFIG)) == len(tiny.random_params(CONFIG)) + 2


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.1.attn.qkv.weight"), r"missing blocks\.1\.attn\.qkv\.weight"),
        (lambda tensors: tensors.update(extra=np.zeros(3)), "unexpected extra"),
        (lambda tensors: tensors.update(mask_token=np.ones((1, 1, 16))), "mask_token is not zero"),
        (
            lambda tensors: tensors.update(pos_embed=tensors["pos_embed"] + 0.1),
            r"pos_interp_scale 1\.0\. Set 'pos_interp_scale'",
        ),
        (
            lambda tensors: tensors.update({"t_embedder.mlp.0.bias": np.zeros(3)}),
            r"t_embedder\.mlp\.0\.bias has shape \(3,\), expected \(32,\)",
        ),
    ],
)
def test_names_mismatched_tensors(state_dict: dict[str, np.ndarray], change: Any, message: str) -> None:
    change(state_dict)
    with pytest.raises(UserError, match=message):
        from_state_dict(state_dict, CONFIG)


def published(size: str, dtype: Any = np.float32, **fields: Any) -> dict[str, np.ndarray]:
    """Returns the tensors from which `recognize` infers a published size."""
    config = make_config(size, **fields)
    return {
        "x_embedder.proj.weight": np.zeros((config.dim, config.in_channels, 2, 2), dtype),
        "y_embedder.y_proj.fc1.weight": np.zeros((config.dim, config.caption_channels), dtype),
        "pos_embed": position_table(config.dim, config.grid, config.pos_interp_scale)[None].astype(dtype),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("size", "fields"),
    [
        ("MicroDiT_XL_2", dict(input_size=64, in_channels=4, caption_channels=1024, pos_interp_scale=2.0)),
        ("MicroDiT_XL_2", dict(input_size=64, in_channels=16, caption_channels=1024, pos_interp_scale=2.0)),
        ("MicroDiT_XL_2", dict(input_size=32, in_channels=4, caption_channels=1024, pos_interp_scale=1.0)),
        ("MicroDiT_Tiny_2", dict(input_size=32, in_channels=4, caption_channels=768, pos_interp_scale=1.0)),
        ("MicroDiT_Tiny_2", dict(input_size=128, in_channels=4, caption_channels=4096, pos_interp_scale=4.0)),
    ],
)
def test_recognizes_published_sizes(size: str, fields: dict[str, Any], dtype: Any) -> None:
    assert recognize(published(size, dtype, **fields)) == (size, make_config(size, **fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("pos_embed"), "not those of a MicroDiT: no pos_embed with 3 dimensions among x_embedder"),
        (lambda t: t.update({"x_embedder.proj.weight": np.zeros((1024, 16))}), r"proj\.weight with 4 dimensions"),
        (lambda t: t.update({"x_embedder.proj.weight": np.zeros((96, 4, 2, 2))}), "width 96, but the known widths are"),
        (lambda t: t.update(pos_embed=t["pos_embed"][:, :100]), "for any of the scales 1.0, 2.0, 4.0"),
        (lambda t: t.update(pos_embed=t["pos_embed"][:, :101]), "for any of the scales"),
        (lambda t: t.update(pos_embed=t["pos_embed"] + 1e-4), "for any of the scales"),
        (lambda t: t.update(pos_embed=t["pos_embed"][:, :0]), "keeps none of the 0 tokens"),
    ],
)
def test_does_not_recognize_other_networks(change: Any, message: str) -> None:
    tensors = published("MicroDiT_Tiny_2", input_size=32)
    change(tensors)
    with pytest.raises(UserError, match=message):
        recognize(tensors)


@pytest.mark.parametrize("prefix", ["", "dit.", "module.", "_orig_mod.", "module.dit._orig_mod.", "dit._orig_mod."])
def test_strips_wrapper_prefixes(state_dict: dict[str, np.ndarray], prefix: str) -> None:
    plain = without_wrappers({prefix + name: value for name, value in state_dict.items()})
    assert list(plain) == list(state_dict)
    inside = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in state_dict.items()}
    assert list(without_wrappers(inside)) == list(state_dict)


def test_rejects_several_networks_in_one_state_dict(state_dict: dict[str, np.ndarray]) -> None:
    both = state_dict | {f"module.{name}": value for name, value in state_dict.items()}
    with pytest.raises(UserError, match=r"has both pos_embed and module\.pos_embed"):
        without_wrappers(both)
    other = without_wrappers({f"dit.{name}": value for name, value in state_dict.items()} | {"vae.bias": np.zeros(3)})
    with pytest.raises(UserError, match=r"unexpected vae\.bias"):
        from_state_dict(other, CONFIG)
