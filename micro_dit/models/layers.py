"""The layers of every block: norms, attention, the dense feed-forward, modulation.

Parameters are float32. Matrix products run in `dtype` (bfloat16 on accelerators); the statistics of norms and the
softmax of attention are always computed in float32.
B images · T tokens · d block width · w attention width · h head width · L caption tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from micro_dit.models.ops import attention, row_product

Initializer = Callable[..., jax.Array]
Constrain = Callable[[jax.Array, str], jax.Array]  # (x, letters of its dimensions) → x, with a sharding constraint


def unconstrained(x: jax.Array, dimensions: str) -> jax.Array:
    """Returns x unchanged: the `Constrain` of a network without sharding constraints."""
    return x


def normal_init(std: float) -> Initializer:
    """Returns the initializer Normal(0, std²); the release truncates at ±2 in absolute value, which has no effect."""
    return nnx.initializers.normal(std)


def linear(
    features: int, out: int, *, kernel_init: Initializer | None = None, dtype: jnp.dtype, rngs: nnx.Rngs, **options: Any
) -> nnx.Linear:
    """Returns a Linear layer with float32 parameters; by default Xavier-uniform, with a zero bias."""
    kernel_init = kernel_init or nnx.initializers.xavier_uniform()
    options |= dict(param_dtype=jnp.float32, dot_general=row_product)
    return nnx.Linear(features, out, kernel_init=kernel_init, dtype=dtype, rngs=rngs, **options)


def layer_norm(dim: int, *, eps: float, affine: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a LayerNorm without a bias, and without a scale unless `affine`."""
    return nnx.LayerNorm(
        dim,
        epsilon=eps,
        use_bias=False,
        use_scale=affine,
        use_fast_variance=False,  # E[x²] - E[x]² loses half the digits
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Computes x·(1 + scale) + shift for x (B, T, d), with one (B, d) shift and scale for all tokens."""
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


class SelfAttention(nnx.Module):
    """Multi-head self-attention with QK-norm: (B, T, d) → (B, T, d).

    QK-norm is a LayerNorm without scale over the whole attention width, all heads together.
    """

    def __init__(
        self, dim: int, width: int, head_dim: int, *, use_bias: bool, eps: float, out_std: float,
        dtype: jnp.dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.heads = width // head_dim
        self.qkv = linear(dim, 3 * width, use_bias=use_bias, kernel_init=normal_init(0.02), dtype=dtype, rngs=rngs)
        self.qk_norm = layer_norm(width, eps=eps, affine=False, dtype=dtype, rngs=rngs)
        self.proj = linear(width, dim, use_bias=use_bias, kernel_init=normal_init(out_std), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rotary: jax.Array | None = None) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)  # each (B, T, w)
        q, k = self.qk_norm(q), self.qk_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary, self.heads), rotate(k, rotary, self.heads)
        return self.proj(attend(q, k, v, self.heads))


class CrossAttention(nnx.Module):
    """Multi-head attention of image tokens to the caption, of width d: x (B, T, d), y (B, L, d) → (B, T, d)."""

    def __init__(
        self, dim: int, head_dim: int, *, use_bias: bool, eps: float, out_std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.heads = dim // head_dim
        self.q = linear(dim, dim, use_bias=use_bias, kernel_init=normal_init(0.02), dtype=dtype, rngs=rngs)
        self.kv = linear(dim, 2 * dim, use_bias=use_bias, kernel_init=normal_init(0.02), dtype=dtype, rngs=rngs)
        self.qk_norm = layer_norm(dim, eps=eps, affine=False, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, use_bias=use_bias, kernel_init=normal_init(out_std), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        k, v = jnp.split(self.kv(y), 2, axis=-1)  # each (B, L, d)
        return self.proj(attend(self.qk_norm(self.q(x)), self.qk_norm(k), v, self.heads))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Computes multi-head scaled dot-product attention: q (B, T, w), k and v (B, L, w) → (B, T, w)."""
    B, T, w = q.shape
    h = w // heads
    q, k, v = (a.reshape(B, a.shape[1], heads, h) for a in (q * h**-0.5, k, v))
    return attention(q, k, v).reshape(B, T, w)


def rotate(x: jax.Array, rotary: jax.Array, heads: int) -> jax.Array:
    """Applies rotary position embeddings to queries or keys (Su et al. 2021, arXiv 2104.09864): (B, T, w) → (B, T, w).

    Args:
        x: (B, T, w) queries or keys of all heads.
        rotary: (B, T, h) or (1, T, h) float32, cosines and sines of each token's h/2 angles.
        heads: Number of heads, w/h.
    """
    B, T, w = x.shape
    cos, sin = jnp.split(rotary[:, :, None], 2, axis=-1)  # each (B, T, 1, h/2)
    a, b = jnp.split(x.reshape(B, T, heads, w // heads), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.reshape(B, T, w).astype(x.dtype)


class SwiGLU(nnx.Module):
    """The dense feed-forward w3(silu(w1 x)·w2 x): (B, T, d) → (B, T, d)."""

    def __init__(self, dim: int, hidden: int, *, use_bias: bool, out_std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        # w2 is initialized as a residual writer, as in the release.
        self.w1 = linear(dim, hidden, use_bias=use_bias, kernel_init=normal_init(0.02), dtype=dtype, rngs=rngs)
        self.w2 = linear(dim, hidden, use_bias=use_bias, kernel_init=normal_init(out_std), dtype=dtype, rngs=rngs)
        self.w3 = linear(hidden, dim, use_bias=use_bias, kernel_init=normal_init(out_std), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w3(jax.nn.silu(self.w1(x)) * self.w2(x))
