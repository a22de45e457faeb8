import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion.guidance import guide

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 4, 2), dtype=np.float32))
Y = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2, 5), dtype=np.float32))
T = jnp.asarray([0.1, 0.2, 0.3])


def network(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return x * t[:, None, None, None] + jnp.sin(y.sum(axis=(1, 2)) + 1)[:, None, None, None]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 5.0, -1.0])
def test_the_formula_holds_at_every_scale(scale: float):
    conditional, unconditional = network(X, T, Y), network(X, T, jnp.zeros_like(Y))
    expected = unconditional + scale * (conditional - unconditional)
    np.testing.assert_allclose(guide(network, scale)(X, T, Y), expected, atol=1e-5)


@pytest.mark.parametrize(("scale", "images"), [(0.0, 3), (1.0, 3), (2.0, 6)])
def test_a_branch_that_is_not_needed_is_not_computed(scale: float, images: int):
    sizes = []

    def counting(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        sizes.append(x.shape[0])
        return network(x, t, y)

    guide(counting, scale)(X, T, Y)
    assert sizes == [images]


def test_one_noise_level_for_all_images_may_be_given_once():
    np.testing.assert_allclose(
        guide(network, 3.0)(X, T[:1], Y), guide(network, 3.0)(X, jnp.repeat(T[:1], 3), Y), rtol=1e-6
    )
