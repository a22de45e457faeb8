"""The dense residual: influence of dropped tokens, path drop, and FLOPs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion import edm
from micro_dit.diffusion.generate import Generator, Sampling
from micro_dit.diffusion.guidance import drop_path
from micro_dit.diffusion.samplers import sample
from micro_dit.errors import UserError
from micro_dit.models.dit import bind
from micro_dit.models.masking import TokenMask, mask_from_noise
from tests.helpers import tiny
from tests.models.test_decoder import assert_flops_equal_the_traced_matrix_products

CONFIG = tiny.network(decoder_depth=1, decoder_dim=16, fusion=True, rope=True)
X, T, Y = tiny.inputs(CONFIG)
NOISE = jax.random.uniform(jax.random.key(0), (3, CONFIG.tokens))
MASK = mask_from_noise(NOISE, 4)


@jax.jit
def forward(params: Any, x: Any, mask: TokenMask | None = None, path_drop: Any = None) -> jax.Array:
    return bind(CONFIG, params)(x, T, Y, mask, path_drop=path_drop)


@jax.jit
def shallow(params: Any, x: Any, y: Any) -> jax.Array:
    return bind(CONFIG, params)(x, T, y, shallow=True)


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return tiny.random_params(CONFIG)


def test_restores_every_token_to_its_position(params: dict[str, jax.Array]) -> None:
    """Checks that a mask that keeps all tokens, in random order, does not change the output."""
    everything = mask_from_noise(NOISE, CONFIG.tokens)
    np.testing.assert_allclose(forward(params, X, everything), forward(params, X), atol=2e-5)
    assert float(jnp.std(forward(params, X))) > 0.1


def test_dropped_tokens_are_denoised_from_the_mixers_output(params: dict[str, jax.Array]) -> None:
    """Checks that dropped patches (unlike with MaskDiT's decoder) and the mask token influence the output."""
    out = forward(params, X, MASK)
    dropped = jnp.repeat(jnp.repeat(MASK.dropped.reshape(3, 4, 4), 2, 1), 2, 2)[..., None]
    changed = jnp.abs(forward(params, X + 3 * dropped, MASK) - out) * dropped
    assert float(jnp.min(changed.max(axis=-1) + 1 - dropped[..., 0])) > 1e-3
    other = params | {"fusion.mask_token": -2 * params["fusion.mask_token"]}
    assert not np.allclose(forward(other, X, MASK), out, atol=1e-3)
    np.testing.assert_array_equal(forward(other, X), forward(params, X))


def test_path_drop_equals_the_shallow_network(params: dict[str, jax.Array]) -> None:
    which = jnp.asarray([True, False, True])
    out = forward(params, X, MASK, which)
    np.testing.assert_allclose(out[0::2], shallow(params, X, Y)[0::2], atol=1e-5)
    np.testing.assert_allclose(out[1], forward(params, X, MASK)[1], atol=1e-5)
    assert not np.allclose(out[0], forward(params, X, MASK)[0], atol=1e-2)


def test_shallow_network_does_not_use_the_backbone(params: dict[str, jax.Array]) -> None:
    without = {name: jnp.full_like(p, jnp.nan) if name.startswith("blocks.") else p for name, p in params.items()}
    np.testing.assert_array_equal(shallow(without, X, Y), shallow(params, X, Y))


def test_path_drop_guidance_extrapolates_from_the_unconditional_shallow_network(params: dict[str, jax.Array]) -> None:
    network: edm.Network = lambda x, t, y: bind(CONFIG, params)(x, t, y)  # noqa: E731
    weak: edm.Network = lambda x, t, y: bind(CONFIG, params)(x, t, y, shallow=True)  # noqa: E731
    guided = jax.jit(lambda scale: drop_path(network, weak, scale)(X, T, Y))
    full, guess = forward(params, X), shallow(params, X, jnp.zeros_like(Y))
    np.testing.assert_allclose(guided(3.0), guess + 3 * (full - guess), atol=1e-4)


def test_generator_samples_with_path_drop_guidance(params: dict[str, jax.Array]) -> None:
    sampling, noise = Sampling(2, 3.0, "euler", path_drop=True), np.asarray(X)
    with jax.default_matmul_precision("highest"):
        ours = Generator(CONFIG, sigma_data=0.9).latents(params, np.asarray(Y), noise, sampling)

    @jax.jit
    def D(x: jax.Array, sigma: jax.Array) -> jax.Array:
        network = bind(CONFIG, params)
        weak: edm.Network = lambda x, t, y: network(x, t, jnp.zeros_like(y), shallow=True)  # noqa: E731
        F: edm.Network = lambda x, t, y: weak(x, t, y) + 3 * (network(x, t, y) - weak(x, t, y))  # noqa: E731
        return edm.denoise(F, x, sigma, Y, 0.9)

    expected = sample(lambda x, sigma: D(x, jnp.full(1, sigma)), X, sampling.sigmas, "euler")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(UserError, match=r"needs a network with model\.fusion"):
        sampling.check(tiny.network())


def test_every_parameter_has_a_gradient(params: dict[str, jax.Array]) -> None:
    def loss(params: Any) -> jax.Array:
        F = lambda x, t, y: bind(CONFIG, params)(x, t, y, MASK)  # noqa: E731
        return edm.loss(F, X, Y, jnp.exp(T), X[::-1]).mean()

    gradients = jax.jit(jax.grad(loss))(params)
    assert [name for name, gradient in gradients.items() if not np.any(gradient)] == []


@pytest.mark.parametrize("masked", [True, False])
def test_flops_equal_the_traced_matrix_products(masked: bool) -> None:
    assert_flops_equal_the_traced_matrix_products(CONFIG, masked)


def test_rejects_invalid_fusion_settings() -> None:
    for fields in (dict(), dict(decoder_depth=1, decoder_dim=16, use_patch_mixer=False)):
        with pytest.raises(UserError, match="needs a patch mixer and a decoder"):
            tiny.network(fusion=True, **fields)
    with pytest.raises(UserError, match="needs mask_position 'after_mixer'"):
        CONFIG.check(0.75, "before_mixer")
