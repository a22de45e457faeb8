"""The MaskDiT loss, denoising plus masked reconstruction, as a baseline (Zheng et al. 2023, arXiv 2306.09305)."""

import jax
import jax.numpy as jnp

from micro_dit.diffusion import edm
from micro_dit.models.embeddings import patchify
from micro_dit.models.masking import TokenMask

RECONSTRUCTION = 0.1  # weight of the reconstruction loss; the value in the MaskDiT release


def loss(
    F: edm.Network,
    x: jax.Array,
    y: jax.Array,
    sigma: jax.Array,
    noise: jax.Array,
    *,
    mask: TokenMask | None = None,
    patch_size: int = 2,
    sigma_data: float = edm.SIGMA_DATA,
) -> jax.Array:
    """Computes `edm.loss`, plus RECONSTRUCTION times the reconstruction loss if there is a mask.

    See `edm.loss` for the arguments.

    Returns:
        (B,) float32, one loss per image.
    """
    noisy = x + sigma[:, None, None, None] * noise
    D_x = edm.denoise(F, noisy, sigma, y, sigma_data)
    error = edm.weighted_error(D_x, x, sigma, mask=mask, patch_size=patch_size, sigma_data=sigma_data)
    return error if mask is None else error + RECONSTRUCTION * reconstruction_loss(D_x, noisy, mask, patch_size)


def reconstruction_loss(D_x: jax.Array, noisy: jax.Array, mask: TokenMask, patch_size: int = 2) -> jax.Array:
    """Computes the mean squared error between the denoiser's output and the noisy image over the dropped patches.

    As in the release (Anima-Lab/MaskDiT, train_utils/loss.py), each target patch is normalized with its own mean and
    unbiased variance, the denoiser's output is not normalized, and the error is not weighted by noise level.

    Args:
        D_x: (B, H, W, C) float32, output of the denoiser.
        noisy: (B, H, W, C) float32, noisy latents.
        mask: Kept tokens.
        patch_size: Side of a token in latent pixels.

    Returns:
        (B,) float32, one loss per image.
    """
    target = patchify(noisy, patch_size)  # (B, N, p·p·C)
    deviation = jnp.sqrt(target.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    target = (target - target.mean(axis=-1, keepdims=True)) / deviation
    error = jnp.mean((patchify(D_x, patch_size) - target) ** 2, axis=-1)  # (B, N)
    return jnp.sum(error * mask.dropped, axis=1) / jnp.sum(mask.dropped, axis=1)
