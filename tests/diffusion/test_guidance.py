import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion import edm
from micro_dit.diffusion.guidance import autoguide, guide, scale_at

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 4, 2), dtype=np.float32))
Y = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2, 5), dtype=np.float32))
T = jnp.asarray([0.1, 0.2, 0.3])


def network(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return x * t[:, None, None, None] + jnp.sin(y.sum(axis=(1, 2)) + 1)[:, None, None, None]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 5.0, -1.0])
def test_classifier_free_guidance_formula_holds_at_every_scale(scale: float) -> None:
    conditional, unconditional = network(X, T, Y), network(X, T, jnp.zeros_like(Y))
    expected = unconditional + scale * (conditional - unconditional)
    np.testing.assert_allclose(guide(network, scale)(X, T, Y), expected, atol=1e-5)


@pytest.mark.parametrize(("scale", "images"), [(0.0, 3), (1.0, 3), (2.0, 6)])
def test_unneeded_branch_is_not_computed(scale: float, images: int) -> None:
    sizes = []

    def counting(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        sizes.append(x.shape[0])
        return network(x, t, y)

    guide(counting, scale)(X, T, Y)
    assert sizes == [images]


def test_single_noise_level_is_broadcast_to_the_batch() -> None:
    np.testing.assert_allclose(
        guide(network, 3.0)(X, T[:1], Y), guide(network, 3.0)(X, jnp.repeat(T[:1], 3), Y), rtol=1e-6
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_negative_prompt_replaces_the_zero_embedding(scale: float) -> None:
    negative = Y[1]
    conditional, away_from = network(X, T, Y), network(X, T, jnp.broadcast_to(negative, Y.shape))
    expected = away_from + scale * (conditional - away_from)
    np.testing.assert_allclose(guide(network, scale, negative)(X, T, Y), expected, atol=1e-5)
    np.testing.assert_array_equal(guide(network, scale, 0 * negative)(X, T, Y), guide(network, scale)(X, T, Y))


def test_autoguidance_extrapolates_denoised_images() -> None:
    def weak(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        return 0.5 * network(x, t, y) + 0.1

    sigma = jnp.asarray([0.5, 1.0, 2.0])
    good, bad, guided = (edm.denoise(F, X, sigma, Y) for F in (network, weak, autoguide(network, weak, 2.5)))
    np.testing.assert_allclose(guided, bad + 2.5 * (good - bad), atol=1e-5)


def test_guidance_is_applied_only_within_the_interval() -> None:
    assert [scale_at(sigma, 5.0, (0.3, 2.0)) for sigma in (0.2, 0.3, 0.31, 2.0, 2.1)] == [1, 1, 5, 5, 1]
    assert scale_at(80.0, 5.0, None) == 5
