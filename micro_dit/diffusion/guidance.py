"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

import jax
import jax.numpy as jnp

from micro_dit.diffusion.edm import Network


def guide(F: Network, scale: float) -> Network:
    """The guided network u + scale·(c - u), whose unconditional branch u sees an all-zeros caption embedding.

    Both branches run as one batch of twice the size. A scale of exactly 1 needs no unconditional branch, and 0 no
    conditional one; every other scale, also one below 1, means what the formula says.
    """
    if scale == 1:
        return F
    if scale == 0:
        return lambda x, t, y: F(x, t, jnp.zeros_like(y))

    def guided(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        both = F(
            jnp.concatenate([x, x]),
            jnp.tile(jnp.broadcast_to(t, x.shape[:1]), 2),
            jnp.concatenate([y, jnp.zeros_like(y)]),
        )
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + scale * (conditional - unconditional)

    return guided
