"""Guidance: networks made of networks, whose sampled images follow the caption more closely."""

import jax
import jax.numpy as jnp

from micro_dit.diffusion.edm import Network


def guide(F: Network, scale: float, negative: jax.Array | None = None) -> Network:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the network u + scale·(c - u).

    The unconditional branch u sees an all-zeros caption embedding, or that of a negative prompt. A scale of exactly 1
    needs no unconditional branch, and 0 no conditional one; every other scale, also one below 1, means what the formula
    says.

    Args:
        F: the network.
        scale: of the guidance.
        negative: (B, L, Y), or to be broadcast to it, in place of the zeros.
    """
    if scale == 1:
        return F
    if scale == 0:
        return lambda x, t, y: F(x, t, _unconditional(y, negative))
    return extrapolate(F, scale, negative)


def extrapolate(F: Network, scale: float | jax.Array, negative: jax.Array | None = None) -> Network:
    """As `guide`, with both branches at every scale, as one batch of twice the size; the scale may be traced."""

    def guided(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        both = F(
            jnp.concatenate([x, x]),
            jnp.tile(jnp.broadcast_to(t, x.shape[:1]), 2),
            jnp.concatenate([y, _unconditional(y, negative)]),
        )
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + scale * (conditional - unconditional)

    return guided


def _unconditional(y: jax.Array, negative: jax.Array | None) -> jax.Array:
    return jnp.zeros_like(y) if negative is None else jnp.broadcast_to(negative, y.shape)


def autoguide(F: Network, weak: Network, scale: float | jax.Array) -> Network:
    """Autoguidance (Karras et al. 2024, arXiv 2406.02507): weak + scale·(F - weak), both given the caption.

    `weak` is the same kind of network, trained for less time or smaller, with the same sigma_data: as both are then
    preconditioned alike, this is the same as to extrapolate denoised images.
    """

    def guided(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        guess = weak(x, t, y)
        return guess + scale * (F(x, t, y) - guess)

    return guided


def scale_at(sigma: float, scale: float, interval: tuple[float, float] | None) -> float:
    """The scale at a noise level: 1, which is no guidance, outside of low < sigma <= high.

    Kynkäänniemi et al. 2024, arXiv 2404.07724: guidance is harmful at high noise levels, useless at low ones.
    """
    return scale if interval is None or interval[0] < sigma <= interval[1] else 1.0
