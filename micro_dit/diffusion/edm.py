"""EDM: preconditioning, noise distribution and loss (Karras et al. 2022, arXiv 2206.00364, table 1 and equations 7-8).

The network is a function F(x, t, y); this module does not depend on its architecture.

Shapes: B images, H×W latents with C channels, N tokens, L caption tokens with Y channels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from micro_dit.models.masking import TokenMask

Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # F(x, t, y)

SIGMA_DATA = 0.9  # standard deviation of the latents; the MicroDiT paper's value


def precondition(sigma: jax.Array, sigma_data: float = SIGMA_DATA) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes (c_skip, c_out, c_in, c_noise), each with the shape of sigma (EDM, table 1)."""
    variance = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data / jnp.sqrt(variance)
    return c_skip, c_out, 1 / jnp.sqrt(variance), jnp.log(sigma) / 4


def denoise(F: Network, x: jax.Array, sigma: jax.Array, y: jax.Array, sigma_data: float = SIGMA_DATA) -> jax.Array:
    """Computes D(x; sigma) = c_skip·x + c_out·F(c_in·x, c_noise, y) (EDM, equation 7).

    Args:
        F: The network.
        x: (B, H, W, C) float32, noisy latents.
        sigma: (B,) or (1,) float32, noise levels.
        y: (B, L, Y), caption embeddings.
        sigma_data: Standard deviation of the latents.

    Returns:
        (B, H, W, C) float32, denoised latents.
    """
    c_skip, c_out, c_in, c_noise = precondition(sigma, sigma_data)
    c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
    return c_skip * x + c_out * F(c_in * x, c_noise, y)


def draw_sigma(key: jax.Array, images: int, P_mean: float, P_std: float) -> jax.Array:
    """Samples (images,) float32 noise levels with ln sigma ~ Normal(P_mean, P_std²)."""
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
) -> jax.Array:
    """Computes the weighted squared error of the denoiser for each image (EDM, equation 8).

    Args:
        F: The network. If `mask` is not None, F has to drop the same tokens.
        x: (B, H, W, C) float32, clean latents.
        y: (B, L, Y), caption embeddings.
        sigma: (B,) float32, noise levels.
        noise: (B, H, W, C) float32, unit normal.
        mask: Kept tokens; only they contribute to the error. None keeps all tokens.
        patch_size: Side of a token in latent pixels. Only used with a mask.
        sigma_data: Standard deviation of the latents.

    Returns:
        (B,) float32, one loss per image.
    """
    D_x = denoise(F, x + sigma[:, None, None, None] * noise, sigma, y, sigma_data)
    return weighted_error(D_x, x, sigma, mask=mask, patch_size=patch_size, sigma_data=sigma_data)


def weighted_error(
    D_x: jax.Array,
    x: jax.Array,
    sigma: jax.Array,
    *,
    mask: TokenMask | None = None,
    patch_size: int = 2,
    sigma_data: float = SIGMA_DATA,
) -> jax.Array:
    """Computes λ(sigma)·‖D_x - x‖² for each image, where D_x is the denoiser's output.

    Without a mask, the result is the mean over all values. With a mask, it is the mean over channels, then over the
    pixels of each patch, then over the kept patches. See `loss` for the arguments.

    Returns:
        (B,) float32, one loss per image.
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2  # λ(sigma)
    error = weight[:, None, None] * jnp.mean((D_x - x) ** 2, axis=-1)  # (B, H, W)
    if mask is None:
        return error.mean(axis=(1, 2))
    B, H, W = error.shape
    p = patch_size
    per_patch = error.reshape(B, H // p, p, W // p, p).mean(axis=(2, 4)).reshape(B, -1)  # (B, N)
    return jnp.take_along_axis(per_patch, mask.keep, axis=1).mean(axis=1)
