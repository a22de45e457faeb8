"""Guidance: combines networks into one whose samples follow the caption more closely."""

import jax
import jax.numpy as jnp

from micro_dit.diffusion.edm import Network


def guide(F: Network, scale: float, negative: jax.Array | None = None) -> Network:
    """Returns the network u + scale·(c - u): classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    The conditional branch c sees the captions; the unconditional branch u sees `negative`, which is broadcast to the
    captions' shape (B, L, Y), or zeros. Scales 1 and 0 compute one branch only.
    """
    if scale == 1:
        return F
    if scale == 0:
        return lambda x, t, y: F(x, t, _unconditional(y, negative))
    return extrapolate(F, scale, negative)


def extrapolate(F: Network, scale: float | jax.Array, negative: jax.Array | None = None) -> Network:
    """Returns the network of `guide` with both branches in one batch at every scale; the scale may be traced."""

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
    """Returns the network weak + scale·(F - weak): autoguidance (Karras et al. 2024, arXiv 2406.02507).

    `weak` is smaller or trained for less time. Both networks have the same sigma_data and so the same preconditioning:
    extrapolating their outputs is extrapolating denoised images.
    """

    def guided(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        guess = weak(x, t, y)
        return guess + scale * (F(x, t, y) - guess)

    return guided


def drop_path(F: Network, shallow: Network, scale: float | jax.Array, negative: jax.Array | None = None) -> Network:
    """Returns the network u + scale·(F - u): path-drop guidance (Park et al. 2025, arXiv 2510.21986).

    `shallow` is F without its backbone, whose cost is that of a few blocks; u is its output for `negative` or zeros.
    """
    return autoguide(F, lambda x, t, y: shallow(x, t, _unconditional(y, negative)), scale)


def scale_at(sigma: float, scale: float, interval: tuple[float, float] | None) -> float:
    """Returns the guidance scale at a noise level: 1, which is no guidance, outside of low < sigma <= high.

    Guidance is harmful at high noise levels and useless at low ones (Kynkäänniemi et al. 2024, arXiv 2404.07724).
    """
    return scale if interval is None or interval[0] < sigma <= interval[1] else 1.0
