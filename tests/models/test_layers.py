import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.models.layers import attend

HEADS, WIDTH = 3, 12


def stock_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    q, k, v = (a.reshape(*a.shape[:2], HEADS, WIDTH // HEADS) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v).reshape(*q.shape[:2], WIDTH)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("remat", [False, True])
def test_attention_and_its_gradients_match_jax(dtype: jnp.dtype, tolerance: float, remat: bool) -> None:
    shapes = [(2, 5, WIDTH), (2, 7, WIDTH), (2, 7, WIDTH), (2, 5, WIDTH)]
    normal = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    q, k, v, d_out = (a.astype(dtype).astype(jnp.float32) for a in normal)
    ours = functools.partial(attend, heads=HEADS)
    expected, expected_vjp = jax.vjp(stock_attention, q, k, v)
    got, got_vjp = jax.vjp(jax.checkpoint(ours) if remat else ours, *(a.astype(dtype) for a in (q, k, v)))
    for a, b in zip((expected, *expected_vjp(d_out)), (got, *got_vjp(d_out.astype(dtype))), strict=True):
        assert b.dtype == dtype
        np.testing.assert_allclose(np.asarray(b, np.float32), a, atol=tolerance * np.abs(a).max())


def test_large_logits_do_not_overflow() -> None:
    q = jnp.full((1, 2, WIDTH), 1e3)
    k = jnp.stack([jnp.full((1, WIDTH), 1e3), jnp.full((1, WIDTH), -1e3)], axis=1)
    out, vjp = jax.vjp(functools.partial(attend, heads=HEADS), q, k, k)
    np.testing.assert_array_equal(out, jnp.full_like(out, 1e3))
    assert all(np.isfinite(gradient).all() for gradient in vjp(out))
