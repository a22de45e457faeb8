"""Deterministic samplers for the probability-flow ODE dx/dsigma = (x - D(x; sigma))/sigma.

Each `*_step` function computes one step between two noise levels, in the notation of its paper. `sample` loops over the
noise levels on the host, so only the denoiser D has to be compiled, once for all steps and samplers.

Shapes: x and D_x are (B, H, W, C) float32; sigma is a Python float.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Denoiser = Callable[[jax.Array, float], jax.Array]  # D(x, sigma)
Previous = tuple[float, jax.Array]  # sigma and D_x of the previous step

SAMPLERS = ("heun", "euler", "dpmpp_2m")
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def noise_levels(
    steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> np.ndarray:
    """Returns (steps + 1,) float64 noise levels from sigma_max down to 0 (EDM, equation 5).

    With a single step, the noise levels are sigma_max and 0.

    Raises:
        ValueError: `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"The number of sampler steps must be at least 1, but is {steps}.")
    ramp = np.arange(steps) / max(steps - 1, 1)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return np.append(sigmas, 0.0)


def partial_noise_levels(steps: int, strength: float) -> np.ndarray:
    """Returns noise levels for sampling that starts from an image instead of pure noise.

    Args:
        steps: Number of sampler steps from pure noise; ⌈steps·strength⌉ of them are used.
        strength: Position of the first noise level between SIGMA_MIN and SIGMA_MAX, linear in sigma^(1/rho). Near 0
            the image is hardly changed; at 1 nothing of it is kept. Must be above 0.
    """
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return noise_levels(math.ceil(steps * strength), sigma_max=(low + strength * (high - low)) ** RHO)


def heun_step(D: Denoiser, x: jax.Array, sigma: float, sigma_next: float) -> jax.Array:
    """Computes a Heun step (Karras et al. 2022, arXiv 2206.00364, algorithm 1, or algorithm 2 with S_churn = 0)."""
    d = (x - D(x, sigma)) / sigma
    x_next = x + (sigma_next - sigma) * d
    if sigma_next != 0:
        d_prime = (x_next - D(x_next, sigma_next)) / sigma_next
        x_next = x + (sigma_next - sigma) * (d + d_prime) / 2
    return x_next


def euler_step(D: Denoiser, x: jax.Array, sigma: float, sigma_next: float) -> jax.Array:
    """Computes an Euler step, which is equivalent to DDIM (Song et al. 2020, arXiv 2010.02502, equation 13)."""
    d = (x - D(x, sigma)) / sigma
    return x + (sigma_next - sigma) * d


def dpmpp_2m_step(
    D: Denoiser, x: jax.Array, sigma: float, sigma_next: float, previous: Previous | None
) -> tuple[jax.Array, Previous]:
    """Computes a DPM-Solver++(2M) step (Lu et al. 2022, arXiv 2211.01095, algorithm 2, with alpha = 1).

    With lambda = -ln sigma, the last step is infinitely long. The first and the last step are of first order.

    Returns:
        x at `sigma_next`, and the argument `previous` of the next step.
    """
    D_x = D_bar = D(x, sigma)
    if previous is not None and sigma_next != 0:
        sigma_previous, D_x_previous = previous
        r = math.log(sigma_previous / sigma) / math.log(sigma / sigma_next)
        D_bar = D_x + 1 / (2 * r) * (D_x - D_x_previous)
    ratio = sigma_next / sigma  # exp(-h)
    return ratio * x + (1 - ratio) * D_bar, (sigma, D_x)


def sample(D: Denoiser, noise: jax.Array, sigmas: np.ndarray, sampler: str = "heun") -> jax.Array:
    """Samples latents from unit normal noise.

    Args:
        D: The denoiser.
        noise: (B, H, W, C) float32, unit normal.
        sigmas: (steps + 1,) float, descending noise levels that end with 0.
        sampler: One of SAMPLERS.

    Returns:
        (B, H, W, C) float32, latents.
    """
    x, previous = noise * np.float32(sigmas[0]), None
    for sigma, sigma_next in itertools.pairwise(map(float, sigmas)):
        if sampler == "dpmpp_2m":
            x, previous = dpmpp_2m_step(D, x, sigma, sigma_next, previous)
        else:
            x = {"heun": heun_step, "euler": euler_step}[sampler](D, x, sigma, sigma_next)
    return x


def keep_known(D: Denoiser, known: jax.Array | np.ndarray, redraw: jax.Array | np.ndarray) -> Denoiser:
    """Wraps a denoiser for inpainting: outside the mask it returns the original latents.

    With these outputs, every sampler keeps the known part of x at known + sigma·noise, the original latents with noise
    of the current level. The samplers therefore need no changes for inpainting.

    Args:
        D: The denoiser.
        known: Original latents, broadcastable to (B, H, W, C).
        redraw: Boolean mask, broadcastable to (B, H, W, C). True where latents are resampled.
    """
    return lambda x, sigma: jnp.where(redraw, D(x, sigma), known)
