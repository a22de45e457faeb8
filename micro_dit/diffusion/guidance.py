"""Guidance: combines two network outputs so that samples follow the caption more closely.

Networks are functions F(x, t, y).
"""

import jax
import jax.numpy as jnp

from micro_dit.diffusion.edm import Network


def guide(F: Network, scale: float, negative: jax.Array | None = None) -> Network:
    """Returns the network u + scale·(c - u): classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    Here c is the conditional output, F(x, t, y), and u the unconditional output, F(x, t, negative). At scales 1 and 0
    only one of the two is computed.

    Args:
        F: The network.
        scale: Guidance scale.
        negative: Embedding of the negative prompt, broadcastable to (B, L, Y). None means zeros.
    """
    if scale == 1:
        return F
    if scale == 0:
        return lambda x, t, y: F(x, t, _unconditional(y, negative))
    return extrapolate(F, scale, negative)


def extrapolate(F: Network, scale: float | jax.Array, negative: jax.Array | None = None) -> Network:
    """Returns the same network as `guide`, but computes c and u in one batch at every scale, which may be traced."""

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

    `weak` is a smaller network or one that was trained for fewer steps. Both networks have the same sigma_data and
    therefore the same preconditioning, so extrapolating their outputs also extrapolates the denoised images.
    """

    def guided(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        guess = weak(x, t, y)
        return guess + scale * (F(x, t, y) - guess)

    return guided


def drop_path(F: Network, shallow: Network, scale: float | jax.Array, negative: jax.Array | None = None) -> Network:
    """Returns the network u + scale·(F - u): path-drop guidance (Park et al. 2025, arXiv 2510.21986).

    Here u is the output of `shallow` for the embedding `negative` (zeros if it is None). `shallow` is F without its
    backbone, so u costs only a few transformer blocks.
    """
    return autoguide(F, lambda x, t, y: shallow(x, t, _unconditional(y, negative)), scale)


def scale_at(sigma: float, scale: float, interval: tuple[float, float] | None) -> float:
    """Returns the guidance scale at a noise level: `scale` where low < sigma <= high, and 1 (no guidance) elsewhere.

    Guidance is harmful at high noise levels and unnecessary at low ones (Kynkäänniemi et al. 2024, arXiv 2404.07724).
    """
    return scale if interval is None or interval[0] < sigma <= interval[1] else 1.0
