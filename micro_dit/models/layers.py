"""The layers that every block is made of: norms, attention, the dense feed-forward, modulation.

Parameters are float32. Matrix products run in `dtype` (bfloat16 on accelerators); the statistics of norms and the
softmax of attention are computed in float32 whatever `dtype` is.

B images · T tokens · d block width · w attention width · h head width · L caption tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Initializer = Callable[..., jax.Array]
PRODUCT = "product"  # the name of products with weights that rematerialization refers to


def normal_init(std: float) -> Initializer:
    """Normal(0, std²): the release truncates it at ±2 in absolute value, that is, not at all."""
    return nnx.initializers.normal(std)


def linear(
    features: int,
    out: int,
    *,
    use_bias: bool = True,
    kernel_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    precision: jax.lax.Precision | None = None,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A Linear layer, Xavier-uniform and with a zero bias unless said otherwise."""
    return nnx.Linear(
        features,
        out,
        use_bias=use_bias,
        kernel_init=kernel_init or nnx.initializers.xavier_uniform(),
        bias_init=bias_init or nnx.initializers.zeros_init(),
        dtype=dtype,
        param_dtype=jnp.float32,
        precision=precision,
        dot_general=row_product,
        rngs=rngs,
    )


def row_product(x: jax.Array, kernel: jax.Array, *_: Any, precision: Any = None, **__: Any) -> jax.Array:
    """(..., d) times (d, out), as one matrix of rows.

    With its dimensions apart, XLA would copy the output's gradient to a transposed layout for the kernel's gradient.
    """
    rows = x.reshape(-1, x.shape[-1])
    return checkpoint_name(product(rows, kernel, precision), PRODUCT).reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """(…, rows, d) times (…, d, out). On a CPU, the kernel's gradient is faster if x is transposed beforehand."""
    return jnp.matmul(x, kernel, precision=precision)


def _product_forward(x: jax.Array, kernel: jax.Array, precision: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(x, kernel, precision=precision), (x, kernel)


def _product_backward(
    precision: Any, saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    transposed = jax.lax.platform_dependent(
        x.mT, cpu=jax.lax.optimization_barrier, default=lambda x: x
    )  # behind a barrier, or XLA would put the transpose into the product
    return jnp.matmul(d_out, kernel.mT, precision=precision), jnp.matmul(transposed, d_out, precision=precision)


product.defvjp(_product_forward, _product_backward)


def layer_norm(dim: int, *, eps: float, affine: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm without a bias; without a scale either if not `affine`."""
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
    """x·(1 + scale) + shift, with one (B, d) shift and scale for all tokens of (B, T, d)."""
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


class SelfAttention(nnx.Module):
    """Multi-head self-attention with QK-norm: (B, T, d) → (B, T, d).

    The norm of queries and keys is a LayerNorm without affine over the whole attention width, all heads together.
    """

    def __init__(
        self, dim: int, width: int, head_dim: int, *, use_bias: bool, eps: float, out_std: float,
        dtype: jnp.dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.heads = width // head_dim
        self.qkv = linear(dim, 3 * width, use_bias=use_bias, kernel_init=normal_init(0.02), dtype=dtype, rngs=rngs)
        self.qk_norm = layer_norm(width, eps=eps, affine=False, dtype=dtype, rngs=rngs)
        self.proj = linear(width, dim, use_bias=use_bias, kernel_init=normal_init(out_std), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)  # each (B, T, w)
        return self.proj(attend(self.qk_norm(q), self.qk_norm(k), v, self.heads))


class CrossAttention(nnx.Module):
    """Image tokens look at the caption: x (B, T, d), y (B, L, d) → (B, T, d). Its width is always d."""

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
    """Scaled dot-product attention, head-major: q (B, T, w), k and v (B, L, w) → (B, T, w)."""
    B, T, w = q.shape
    h = w // heads
    q, k, v = (a.reshape(B, a.shape[1], heads, h).transpose(0, 2, 1, 3) for a in (q * h**-0.5, k, v))
    return attention(q, k, v).transpose(0, 2, 1, 3).reshape(B, T, w)


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q kᵀ) v for each head: q (B, n, T, h), already scaled, k and v (B, n, L, h) → (B, n, T, h).

    Between the products, the derived gradient would go over (T, L) matrices many times. This one does so as rarely as
    it can: rows are divided by the softmax's denominator once they are only h wide, and the sum over L in the softmax's
    gradient is taken over h instead (Dao et al. 2022, arXiv 2205.14135, appendix B.2).
    """
    return _attention_forward(q, k, v)[0]


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    logits = jnp.einsum("bnth,bnlh->bntl", q, k, preferred_element_type=jnp.float32)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    scale = 1 / weights.sum(axis=-1, keepdims=True)  # (B, n, T, 1) float32
    weights = weights.astype(v.dtype)
    out = (jnp.einsum("bntl,bnlh->bnth", weights, v, preferred_element_type=jnp.float32) * scale).astype(v.dtype)
    return out, (q, k, v, weights, scale, out)


def _attention_backward(saved: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, weights, scale, out = saved
    d_out = d_out * scale  # float32 from here on
    along = (d_out * out).sum(axis=-1, keepdims=True)
    d_out = d_out.astype(v.dtype)
    # Transposed products, so that only matrices of width h need to be transposed.
    d_v = jnp.einsum("bnth,bntl->bnhl", d_out, weights).swapaxes(2, 3)
    d_weights = jnp.einsum("bnth,bnlh->bntl", d_out, v, preferred_element_type=jnp.float32)
    d_logits = (weights * (d_weights - along)).astype(q.dtype)
    d_q = jnp.einsum("bntl,bnlh->bnth", d_logits, k)
    d_k = jnp.einsum("bnth,bntl->bnhl", q, d_logits).swapaxes(2, 3)
    return d_q, d_k, d_v


attention.defvjp(_attention_forward, _attention_backward)


class SwiGLU(nnx.Module):
    """The dense feed-forward, w3(silu(w1 x)·w2 x): (B, T, d) → (B, T, d)."""

    def __init__(self, dim: int, hidden: int, *, use_bias: bool, out_std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        # w2 is initialized as a residual writer, as in the release.
        self.w1 = linear(dim, hidden, use_bias=use_bias, kernel_init=normal_init(0.02), dtype=dtype, rngs=rngs)
        self.w2 = linear(dim, hidden, use_bias=use_bias, kernel_init=normal_init(out_std), dtype=dtype, rngs=rngs)
        self.w3 = linear(hidden, dim, use_bias=use_bias, kernel_init=normal_init(out_std), dtype=dtype, rngs=rngs)

    @staticmethod
    def hidden_width(dim: int, ratio: float, multiple_of: int) -> int:
        """int(2·int(d·ratio)/3), rounded up to `multiple_of`."""
        return round_up(int(2 * int(dim * ratio) / 3), multiple_of)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w3(jax.nn.silu(self.w1(x)) * self.w2(x))
