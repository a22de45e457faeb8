"""Names and layouts of the public release; its numbers are compared in tests/parity."""

from typing import Any

import numpy as np
import pytest
import tiny

from micro_dit.errors import UserError
from micro_dit.interop.torch_checkpoint import from_state_dict, release_name, release_shapes, to_state_dict
from micro_dit.models.embeddings import position_table

CONFIG = tiny.network(use_bias=True)


@pytest.fixture
def state_dict() -> dict[str, np.ndarray]:
    return to_state_dict({name: np.asarray(value) for name, value in tiny.random_params(CONFIG).items()}, CONFIG)


def test_there_and_back_is_the_identity_bit_for_bit(state_dict: dict[str, np.ndarray]):
    params = tiny.random_params(CONFIG)
    back = from_state_dict(state_dict, CONFIG)
    assert list(back) == list(params)
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert {name: value.shape for name, value in state_dict.items()} == release_shapes(CONFIG)
    np.testing.assert_array_equal(state_dict["pos_embed"][0], position_table(32, 4, 1.0))
    np.testing.assert_array_equal(state_dict["mask_token"], np.zeros((1, 1, 16)))


def test_layouts(state_dict: dict[str, np.ndarray]):
    params = {name: np.asarray(value) for name, value in tiny.random_params(CONFIG).items()}
    np.testing.assert_array_equal(state_dict["blocks.1.attn.qkv.weight"], params["blocks.1.attn.qkv.kernel"].T)
    patch = params["patch_embedding.proj.kernel"].reshape(2, 2, 4, 32)
    np.testing.assert_array_equal(state_dict["x_embedder.proj.weight"][5, 3], patch[:, :, 3, 5])
    # Experts are kept as they are.
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
def test_names(ours: str, theirs: str):
    assert release_name(ours) == theirs


def test_names_do_not_collide():
    assert len(release_shapes(CONFIG)) == len(tiny.random_params(CONFIG)) + 2


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.1.attn.qkv.weight"), r"missing blocks\.1\.attn\.qkv\.weight"),
        (lambda tensors: tensors.update(extra=np.zeros(3)), "unexpected extra"),
        (lambda tensors: tensors.update(mask_token=np.ones((1, 1, 16))), "mask_token is not zero"),
        (lambda tensors: tensors.update(pos_embed=tensors["pos_embed"] + 0.1), "pos_interp_scale 1.0; set the scale"),
        (
            lambda tensors: tensors.update({"t_embedder.mlp.0.bias": np.zeros(3)}),
            r"t_embedder\.mlp\.0\.bias has shape \(3,\), expected \(32,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(state_dict: dict[str, np.ndarray], change: Any, message: str):
    change(state_dict)
    with pytest.raises(UserError, match=message):
        from_state_dict(state_dict, CONFIG)
