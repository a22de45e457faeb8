"""EDM: preconditioning, noise distribution and loss (Karras et al. 2022, arXiv 2206.00364, table 1 and equations 7-8).

The network F is any function (x, t, y) → (B, H, W, C); nothing here knows how it is built.

B images · H W latent rows, columns · C latent channels · N tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from micro_dit.models.embeddings import patchify
from micro_dit.models.masking import TokenMask

Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # F(x, t, y)

SIGMA_DATA = 0.9  # standard deviation of the latents, as the paper sets it
RECONSTRUCTION = 0.1  # weight of MaskDiT's reconstruction loss, as its release sets it


class Preconditioning(NamedTuple):
    """The four scalings of a noise level, each of the shape of sigma."""

    c_skip: jax.Array
    c_out: jax.Array
    c_in: jax.Array
    c_noise: jax.Array


def precondition(sigma: jax.Array, sigma_data: float = SIGMA_DATA) -> Preconditioning:
    """c_skip, c_out, c_in and c_noise (EDM, table 1)."""
    variance = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data / jnp.sqrt(variance),
        c_in=1 / jnp.sqrt(variance),
        c_noise=jnp.log(sigma) / 4,
    )


def denoise(F: Network, x: jax.Array, sigma: jax.Array, y: jax.Array, sigma_data: float = SIGMA_DATA) -> jax.Array:
    """D(x; sigma) = c_skip·x + c_out·F(c_in·x, c_noise, y) (EDM, equation 7).

    Args:
        F: the network.
        x: (B, H, W, C) float32, noisy latents.
        sigma: (B,) or (1,) float32, noise levels.
        y: (B, L, Y) caption embeddings.
    """
    c_skip, c_out, c_in, c_noise = precondition(sigma, sigma_data)
    c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
    return c_skip * x + c_out * F(c_in * x, c_noise, y)


def draw_sigma(key: jax.Array, images: int, P_mean: float, P_std: float) -> jax.Array:
    """(B,) float32 noise levels with ln sigma ~ Normal(P_mean, P_std²)."""
    return jnp.exp(P_mean + P_std * jax.random.normal(key, (images,)))


def loss(
    F: Network,
    x: jax.Array,
    y: jax.Array,
    sigma: jax.Array,
    noise: jax.Array,
    *,
    mask: TokenMask | None = None,
    patch_size: int = 2,
    sigma_data: float = SIGMA_DATA,
    reconstruction: float = 0.0,
) -> jax.Array:
    """Each image's weighted squared error, (B,) float32 (EDM, equation 8).

    Unmasked: the mean over everything. Masked: the mean over channels, then per patch, then over the kept patches.

    Args:
        F: the network; if `mask` is given, F is expected to drop by it.
        x: (B, H, W, C) float32, clean latents.
        y: (B, L, Y) caption embeddings.
        sigma: (B,) float32, noise levels.
        noise: (B, H, W, C) float32, unit normal.
        mask: the tokens kept.
        patch_size: side of a token in latent pixels; used only with a mask.
        reconstruction: weight of `reconstruction_loss`, which is added; used only with a mask.
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    noisy = x + sigma[:, None, None, None] * noise
    D_x = denoise(F, noisy, sigma, y, sigma_data)
    error = weight[:, None, None] * jnp.mean((D_x - x) ** 2, axis=-1)  # (B, H, W)
    if mask is None:
        return error.mean(axis=(1, 2))
    B, H, W = error.shape
    p = patch_size
    per_patch = error.reshape(B, H // p, p, W // p, p).mean(axis=(2, 4)).reshape(B, -1)  # (B, N)
    kept = jnp.take_along_axis(per_patch, mask.keep, axis=1).mean(axis=1)
    return kept + reconstruction * reconstruction_loss(D_x, noisy, mask, p) if reconstruction else kept


def reconstruction_loss(D_x: jax.Array, noisy: jax.Array, mask: TokenMask, patch_size: int = 2) -> jax.Array:
    """MaskDiT's second task, on the dropped patches alone, (B,): to tell, as masked autoencoders do, what is there.

    What is there is the noisy image (Zheng et al. 2023, arXiv 2306.09305). As in the release (Anima-Lab/MaskDiT,
    train_utils/loss.py), each of its patches is normalized by its own mean and unbiased variance, the denoiser's output
    is not, and the error has no weight by noise level.
    """
    target = patchify(noisy, patch_size)  # (B, N, p·p·C)
    deviation = jnp.sqrt(target.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    target = (target - target.mean(axis=-1, keepdims=True)) / deviation
    error = jnp.mean((patchify(D_x, patch_size) - target) ** 2, axis=-1)  # (B, N)
    return jnp.sum(error * mask.dropped, axis=1) / jnp.sum(mask.dropped, axis=1)
