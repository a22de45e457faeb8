"""MaskDiT's loss, for comparison (Zheng et al. 2023, arXiv 2306.09305): denoising plus masked reconstruction."""

import jax
import jax.numpy as jnp

from micro_dit.diffusion import edm
from micro_dit.models.embeddings import patchify
from micro_dit.models.masking import TokenMask

RECONSTRUCTION = 0.1  # weight of the reconstruction term, as MaskDiT's release sets it


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
    """Computes `edm.loss` and, with a mask, adds RECONSTRUCTION times the reconstruction loss; arguments as there."""
    noisy = x + sigma[:, None, None, None] * noise
    D_x = edm.denoise(F, noisy, sigma, y, sigma_data)
    error = edm.weighted_error(D_x, x, sigma, mask=mask, patch_size=patch_size, sigma_data=sigma_data)
    return error if mask is None else error + RECONSTRUCTION * reconstruction_loss(D_x, noisy, mask, patch_size)


def reconstruction_loss(D_x: jax.Array, noisy: jax.Array, mask: TokenMask, patch_size: int = 2) -> jax.Array:
    """Computes the squared error of the denoiser's output D_x as a reconstruction of the dropped patches, (B,).

    The target is the noisy image. As in the release (Anima-Lab/MaskDiT, train_utils/loss.py), each of its patches is
    normalized by its own mean and unbiased variance, the denoiser's output is not, and the error has no weight by
    noise level.
    """
    target = patchify(noisy, patch_size)  # (B, N, p·p·C)
    deviation = jnp.sqrt(target.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    target = (target - target.mean(axis=-1, keepdims=True)) / deviation
    error = jnp.mean((patchify(D_x, patch_size) - target) ** 2, axis=-1)  # (B, N)
    return jnp.sum(error * mask.dropped, axis=1) / jnp.sum(mask.dropped, axis=1)
