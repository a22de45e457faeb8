"""Initialized parameters have the same distributions as in the public release."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import bind, init_params
from tests.helpers import tiny


@pytest.fixture(scope="module")
def config() -> DiTConfig:
    return tiny.network(dim=64, depth=4, patch_mixer_dim=48, head_dim=16, experts_every_n=2, use_bias=True)


@pytest.fixture(scope="module")
def initialize(config: DiTConfig) -> Callable[[jax.Array], dict[str, jax.Array]]:
    return jax.jit(functools.partial(init_params, config))


@pytest.fixture(scope="module")
def params(initialize: Callable[[jax.Array], dict[str, jax.Array]]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in initialize(jax.random.key(0)).items()}


def test_initialized_network_outputs_zero(config: DiTConfig, params: dict[str, np.ndarray]) -> None:
    out = jax.jit(lambda params, *inputs: bind(config, params)(*inputs))(params, *tiny.inputs(config))
    assert out.shape == (3, 8, 8, 4)
    np.testing.assert_array_equal(out, 0)


def normal_std(config: DiTConfig, name: str) -> float | None:
    """Returns the standard deviation of a normal initialization (0 for zeros), or None for other initializations."""
    part, _, rest = name.partition(".")
    if rest.endswith(("bias", "scale")):
        return None
    if part in ("noise_embedding", "caption_projection", "pooled_caption"):
        return 0.02
    zeros = ("caption_block.attn.proj.kernel", "caption_block.mlp.w3.kernel")
    if ".adaln." in name or part == "final_layer" or name in zeros:
        return 0.0
    if part == "caption_block":
        return 0.02
    if part in ("mixer", "blocks"):
        index, layer = int(rest.split(".")[0]), rest.partition(".")[2]
        writer = 0.02 / np.sqrt(2 * (index + 1 if part == "blocks" else config.depth))
        experts = f"{part}.{index}.mlp.gate.kernel" in EXPERTS
        writers = ("attn.proj.kernel", "cross_attn.proj.kernel", "mlp.w2", "mlp.w2.kernel", "mlp.w3.kernel")
        assert not (experts and layer == "mlp.w3.kernel")
        return writer if layer in writers else 0.02
    return None


EXPERTS = {"mixer.1.mlp.gate.kernel", "blocks.1.mlp.gate.kernel"}


def test_standard_deviations_of_normal_initializations(config: DiTConfig, params: dict[str, np.ndarray]) -> None:
    assert set(params) >= EXPERTS
    seen = set()
    for name, value in params.items():
        std = normal_std(config, name)
        if std is None:
            continue
        seen.add(round(std, 6))
        if std == 0:
            np.testing.assert_array_equal(value, 0, err_msg=name)
            continue
        assert value.std() == pytest.approx(std, rel=5 / np.sqrt(2 * value.size)), name
        assert abs(value.mean()) < 5 * std / np.sqrt(value.size), name
        assert value.size < 1000 or abs(value).max() > 3 * std, name  # not truncated
    # The output layers of four blocks (the mixer's equal block 3's), all other layers, and zeros.
    assert len(seen) == 6


def test_other_linear_weights_are_xavier_uniform(params: dict[str, np.ndarray]) -> None:
    names = [f"{part}.linear.kernel" for part in ("mixer_in", "mixer_caption_in", "mixer_out")]
    for name in ("patch_embedding.proj.kernel", *names):
        value = params[name]
        bound = np.sqrt(6 / sum(value.shape))
        assert 0.98 * bound < abs(value).max() <= bound, name
        assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.06), name


def test_norm_scales_are_one_and_biases_zero_except_the_patch_embedding(
    config: DiTConfig, params: dict[str, np.ndarray]
) -> None:
    for name, value in params.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(value, 1, err_msg=name)
        elif name.endswith("bias") and name != "patch_embedding.proj.bias":
            np.testing.assert_array_equal(value, 0, err_msg=name)
    bias, bound = params["patch_embedding.proj.bias"], 1 / np.sqrt(config.in_channels * config.patch_size**2)
    assert 0.8 * bound < abs(bias).max() <= bound
    assert abs(bias.mean()) < 0.4 * bound


def test_without_depth_init_all_blocks_have_equal_scales(config: DiTConfig) -> None:
    flat = dataclasses.replace(config, depth_init=False)
    assert {block.out_std for block in flat.backbone_blocks()} == {float(0.02 / np.sqrt(8))}
    assert len({block.out_std for block in config.backbone_blocks()}) == 4


def test_parameters_differ_from_each_other_and_by_seed(
    initialize: Callable[[jax.Array], dict[str, jax.Array]], params: dict[str, np.ndarray]
) -> None:
    first, second = params["blocks.2.attn.qkv.kernel"], params["blocks.3.attn.qkv.kernel"]
    assert not np.array_equal(first[:, :48], second[:, :48])
    again = initialize(jax.random.key(0))["blocks.2.attn.qkv.kernel"]
    other = initialize(jax.random.key(1))["blocks.2.attn.qkv.kernel"]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
