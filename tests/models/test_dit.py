import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion import edm
from micro_dit.errors import UserError
from micro_dit.models import dit
from micro_dit.models.config import MASK_POSITIONS, DiTConfig, make_config
from micro_dit.models.dit import abstract_params, bind
from micro_dit.models.embeddings import patchify, position_table, unpatchify
from micro_dit.models.masking import TokenMask
from tests.helpers import tiny

CONFIG = tiny.network()
X, T, Y = tiny.inputs(CONFIG)
SIGMA = jnp.exp(T)


def fixed_mask(kept: int = 4) -> TokenMask:
    order = jnp.asarray(np.stack([np.random.default_rng(image).permutation(CONFIG.tokens) for image in range(3)]))
    return TokenMask(order[:, :kept].astype(jnp.int32), jnp.argsort(order, axis=1).astype(jnp.int32))


MASK = fixed_mask()
DROPPED = np.asarray(MASK.dropped) == 1  # (B, N)


@functools.partial(jax.jit, static_argnames="position")
def forward(params: Any, x: Any, t: Any, y: Any, mask: Any = None, position: str = "after_mixer") -> jax.Array:
    return bind(CONFIG, params)(x, t, y, mask, position)


@functools.partial(jax.jit, static_argnames="dtype")
def loss_and_gradients(params: Any, dtype: Any) -> tuple[jax.Array, Any]:
    def loss(params: Any) -> jax.Array:
        model = bind(CONFIG, params, dtype)
        return edm.loss(lambda x, t, y: model(x, t, y, MASK), X, Y, SIGMA, X[::-1], mask=MASK).mean()

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return tiny.random_params(CONFIG)


@pytest.fixture(scope="module")
def exact(params: dict[str, jax.Array]) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the masked loss in float32, and its gradients."""
    loss, gradients = loss_and_gradients(params, jnp.float32)
    return float(loss), {name: np.asarray(value) for name, value in gradients.items()}


def test_pinned_numbers(params: dict[str, jax.Array], exact: tuple[float, dict[str, np.ndarray]]) -> None:
    """Fails if the function computed by existing checkpoints has changed."""
    loss, gradients = exact
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients.values()))
    unmasked = float(jnp.linalg.norm(forward(params, X, T, Y)))
    np.testing.assert_allclose([loss, norm, unmasked], PINNED, rtol=2e-4)


PINNED = (2.305121, 17.048602, 34.920422)


def test_every_parameter_has_a_gradient(exact: tuple[float, dict[str, np.ndarray]]) -> None:
    assert [name for name, gradient in exact[1].items() if not np.any(gradient)] == []


def test_parameters_are_float32_and_bfloat16_products_approximate_float32(
    params: dict[str, jax.Array], exact: tuple[float, dict[str, np.ndarray]]
) -> None:
    assert {leaf.dtype for leaf in abstract_params(CONFIG).values()} == {np.dtype("float32")}
    loss, gradients = loss_and_gradients(params, jnp.bfloat16)
    assert loss.dtype == jnp.float32
    assert {g.dtype for g in gradients.values()} == {np.dtype("float32")}
    assert 1e-6 < abs(float(loss) / exact[0] - 1) < 0.02  # rounded, but close
    a, b = (np.concatenate([np.asarray(g[name]).ravel() for name in params]) for g in (exact[1], gradients))
    assert np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.98


def test_naive_masking_equals_the_network_on_only_the_kept_tokens(
    params: dict[str, jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares an image with 4 of 16 tokens kept before the mixer with an image of only those 4 tokens."""
    masked = forward(params, X, T, Y, MASK, "before_mixer")
    table = position_table(CONFIG.dim, CONFIG.grid, 1.0)

    @jax.jit
    def forward_at(params: Any, x: Any, t: Any, y: Any, positions: Any) -> jax.Array:
        monkeypatch.setattr(dit, "position_table", lambda dim, grid, scale: positions)
        return bind(CONFIG, params)(x, t, y)

    for image in range(3):
        keep, one = np.asarray(MASK.keep[image]), slice(image, image + 1)
        small = unpatchify(patchify(X[one], 2)[:, keep], 2, 4, 4)
        expected = patchify(forward_at(params, small, T[one], Y[one], table[keep]), 2)[0]
        out = patchify(masked[one], 2)[0]
        np.testing.assert_allclose(out[keep], expected, atol=5e-5)
        np.testing.assert_array_equal(out[DROPPED[image]], 0)


@pytest.mark.parametrize("position", MASK_POSITIONS)
def test_rotary_positions_travel_with_the_kept_tokens(params: dict[str, jax.Array], position: str) -> None:
    """The order in which tokens are kept does not matter; with the angles of other tokens it would."""
    config = dataclasses.replace(CONFIG, rope=True)
    reversed_mask = TokenMask(MASK.keep[:, ::-1], jnp.where(MASK.restore < 4, 3 - MASK.restore, MASK.restore))
    first, second = (bind(config, params)(X, T, Y, mask, position) for mask in (MASK, reversed_mask))
    np.testing.assert_allclose(first, second, atol=5e-5)
    assert not np.allclose(first, forward(params, X, T, Y, MASK, position), atol=1e-2)


def test_dropped_patches_influence_kept_patches_only_through_the_mixer(params: dict[str, jax.Array]) -> None:
    """Checks that dropped patches influence all kept tokens with deferred masking, and none with naive masking."""
    changed = X + 3 * unpatchify(jnp.repeat(MASK.dropped[:, :, None], 16, axis=2), 2, 8, 8)

    def difference(position: str) -> np.ndarray:
        before, after = (forward(params, x, T, Y, MASK, position) for x in (X, changed))
        return np.abs(patchify(after - before, 2)).max(axis=-1)  # (B, N)

    np.testing.assert_array_equal(difference("before_mixer"), 0)
    deferred = difference("after_mixer")
    np.testing.assert_array_equal(deferred[DROPPED], 0)
    assert np.all(deferred[~DROPPED] > 1e-3)


def test_dropped_tokens_have_zero_gradient_from_the_backbone(
    params: dict[str, jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that the gradient with respect to the mixer's output is zero at dropped tokens."""
    drop = dit.drop_tokens

    def loss(probe: jax.Array, params: Any) -> jax.Array:
        monkeypatch.setattr(dit, "drop_tokens", lambda tokens, mask: drop(tokens + probe, mask))
        model = bind(CONFIG, params)
        return edm.loss(lambda x, t, y: model(x, t, y, MASK), X, Y, SIGMA, X[::-1], mask=MASK).mean()

    probe = jnp.zeros((3, CONFIG.tokens, CONFIG.patch_mixer_dim))
    gradient = np.asarray(jax.jit(jax.grad(loss))(probe, params))
    np.testing.assert_array_equal(gradient[DROPPED], 0)
    assert np.all(np.abs(gradient[~DROPPED]).max(axis=-1) > 0)


def test_mask_that_keeps_all_tokens_has_no_effect(params: dict[str, jax.Array]) -> None:
    kept = forward(params, X, T, Y, fixed_mask(kept=16), "before_mixer")
    np.testing.assert_allclose(kept, forward(params, X, T, Y), atol=5e-5)


def test_without_a_patch_mixer() -> None:
    config = tiny.network(use_patch_mixer=False)
    assert not any(name.startswith("mixer") for name in abstract_params(config))

    @jax.jit
    def both(params: Any) -> list[jax.Array]:
        return [bind(config, params)(X, T, Y, MASK, position) for position in MASK_POSITIONS]

    after, before = both(tiny.random_params(config))
    np.testing.assert_array_equal(after, before)  # without a mixer, both positions are the same
    assert np.any(after)


def test_mixer_with_the_backbones_width_has_no_projections() -> None:
    names = set(abstract_params(tiny.network(patch_mixer_dim=32)))
    assert not any(name.startswith(("mixer_in", "mixer_caption_in", "mixer_out")) for name in names)
    assert any(name.startswith("mixer.") for name in names)


def test_shorter_multiplier_lists_apply_to_consecutive_blocks() -> None:
    config = tiny.network(depth=6, experts_every_n=100, qkv_multipliers=(0.5, 1.0, 2.0), ffn_multipliers=(1.0, 3.0))
    config.check()
    assert [block.attention_width for block in config.backbone_blocks()] == [32, 32, 32, 32, 64, 64]
    widths = [block.hidden_width for block in config.backbone_blocks()]
    assert widths == [32] * 3 + [64] * 3  # int(2·32/3) = 21 and int(2·96/3) = 64, in multiples of 16


def test_positions_of_expert_blocks_in_xl() -> None:
    xl = make_config("MicroDiT_XL_2", input_size=32)
    assert [i for i, block in enumerate(xl.mixer_blocks()) if block.moe] == [1, 3, 5]
    assert [i for i, block in enumerate(xl.backbone_blocks()) if block.moe] == list(range(1, 27, 2))


def test_layer_wise_scaling_follows_an_overridden_depth() -> None:
    config = make_config("Nano", input_size=8, depth=3)
    assert config.ffn_multipliers == (0.5, 2.25, 4.0)
    assert make_config("Nano", input_size=8, depth=2, ffn_multipliers=(1.0,)).ffn_multipliers == (1.0,)


@pytest.mark.parametrize(
    ("overrides", "mask", "message"),
    [
        (dict(input_size=9), (), "model.input_size 9 is not a multiple of patch_size 2"),
        (dict(dim=40), (), "model.dim 40 must be a multiple of head_dim 16"),
        (dict(patch_mixer_dim=40), (), "model.patch_mixer_dim 40 must be a multiple"),
        (dict(qkv_multipliers=(1.0, 1.0, 1.0)), (), "model.qkv_multipliers has 3 values"),
        (dict(ffn_multipliers=()), (), "model.ffn_multipliers has 0 values"),
        ({}, (0.99,), "mask_ratio 0.99 keeps none of the 16 tokens"),
        ({}, (1.0,), "mask_ratio 1.0"),
        ({}, (-0.5,), "mask_ratio -0.5"),
        ({}, (0.5, "somewhere"), "mask_position 'somewhere' is unknown. Use one of after_mixer, before_mixer"),
        (dict(num_experts=16, expert_capacity=1.0), (0.75,), r"backbone would process int\(1.0·4/16\) = 0 of 4 tokens"),
        (dict(num_experts=32, expert_capacity=1.0), (), "expert of the mixer would process"),
        (dict(expert_capacity=3.0), (), "= 24 of 16 tokens. Change model.expert_capacity"),
        (dict(num_experts=16, expert_capacity=1.0), (0.75, "before_mixer"), r"mixer would process int\(1.0·4/16\) = 0"),
    ],
)
def test_rejects_invalid_networks(overrides: dict[str, Any], mask: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tiny.network(**overrides).check(*mask)
    assert "\n" not in str(error.value)


def test_rejects_unknown_sizes_and_fields() -> None:
    with pytest.raises(UserError, match=r"size 'Giant' is unknown\. Use one of Nano, MicroDiT_Tiny_2, MicroDiT_XL_2"):
        make_config("Giant", input_size=8)
    with pytest.raises(UserError, match=r"model has no field dmi. The fields are .*depth, .*dim"):
        make_config("Nano", input_size=8, dmi=3)


def test_bind_rejects_parameters_of_another_network(params: dict[str, jax.Array]) -> None:
    with pytest.raises(ValueError, match=r"blocks\.1"):
        bind(dataclasses.replace(CONFIG, depth=1, qkv_multipliers=(1.0,), ffn_multipliers=(1.0,)), params)


def test_config_round_trips_through_a_dict() -> None:
    assert DiTConfig(**dataclasses.asdict(CONFIG)) == CONFIG
