"""Operations with custom gradients, or whose implementation depends on the device or the compiler.

The rest of `micro_dit.models` is plain JAX. Faster backends for an operation belong here.

B images · T query tokens · L key tokens · n heads · h head width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"  # checkpoint name of products with weights, for rematerialization policies


def gelu(x: jax.Array) -> jax.Array:
    """Computes x·Φ(x) exactly, by erf.

    `jax.nn.gelu` uses erfc, which XLA computes in five passes over memory on a CPU.
    """
    wide = x.astype(jnp.float32)  # 1 + erf cancels
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def row_product(x: jax.Array, kernel: jax.Array, *_: Any, precision: Any = None, **__: Any) -> jax.Array:
    """Multiplies (..., d) by (d, out) as one matrix of rows; the `dot_general` of `nnx.Linear`.

    With separate dimensions, XLA would copy the output's gradient to a transposed layout for the kernel's gradient.
    """
    return product(x.reshape(-1, x.shape[-1]), kernel, precision).reshape(*x.shape[:-1], kernel.shape[-1])


def product(x: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """Multiplies (..., rows, d) by weights (..., d, out), under the checkpoint name PRODUCT."""
    return checkpoint_name(_product(x, kernel, precision), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    return jnp.matmul(x, kernel, precision=precision)


def _product_forward(x: jax.Array, kernel: jax.Array, precision: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return jnp.matmul(x, kernel, precision=precision), (x, kernel)


def _product_backward(precision: Any, saved: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # On a CPU, the kernel's gradient is faster if x is transposed beforehand: behind a barrier, because XLA would merge
    # the transpose into the product.
    transposed = jax.lax.platform_dependent(x.mT, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    return jnp.matmul(d_out, kernel.mT, precision=precision), jnp.matmul(transposed, d_out, precision=precision)


_product.defvjp(_product_forward, _product_backward)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes softmax(q kᵀ) v for each head: q (B, T, n, h), already scaled, and k, v (B, L, n, h) → (B, T, n, h)."""
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    return _attention(q, k, v).transpose(0, 2, 1, 3)


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes `attention` with heads before tokens: q (B, n, T, h), k and v (B, n, L, h) → (B, n, T, h).

    The derived gradient would pass over (T, L) matrices many times between the products. This one does so as rarely as
    possible: rows are divided by the softmax's denominator after the product with v, and the sum over L in the
    softmax's gradient is taken over h instead (Dao et al. 2022, arXiv 2205.14135, appendix B.2).
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


_attention.defvjp(_attention_forward, _attention_backward)
