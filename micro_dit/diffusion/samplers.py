"""From noise to latents: the deterministic Heun sampler (Karras et al. 2022, arXiv 2206.00364, algorithm 1)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]  # D(x, sigma), sigma of shape (1,)


def noise_levels(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """(steps + 1,) float64 levels, from sigma_max down to 0 (EDM, equation 5). One step goes straight to 0."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, not {steps}")
    ramp = np.arange(steps) / max(steps - 1, 1)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return np.append(sigmas, 0.0)


def heun(D: Denoiser, noise: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """Integrates dx/dsigma = (x - D(x; sigma))/sigma from sigmas[0] to 0 by Heun's method; the last step is Euler's.

    Written as one scan over the denoiser's 2·steps - 1 calls, alternately a predictor and its corrector, so that the
    network is compiled once and not once for each kind of call.

    Args:
        D: the denoiser.
        noise: (B, H, W, C) float32, unit normal.
        sigmas: (steps + 1,) descending noise levels that end with 0.

    Returns:
        (B, H, W, C) float32 latents.
    """
    # One row a call: the level it is made at, the step it belongs to, and whether it corrects that step.
    here, there = sigmas[:-1], sigmas[1:]
    calls = [call for s, n in zip(here, there, strict=True) for call in ((s, n - s, False), (n, n - s, True))]
    level, step, corrects = (np.asarray(column) for column in zip(*calls[:-1], strict=True))

    def call(carry: Any, row: Any) -> tuple[Any, None]:
        x, x_hat, d = carry  # the point to evaluate, the step's start, the slope there
        sigma, h, correct = row
        slope = (x - D(x, sigma[None])) / sigma
        predicted = x + h * slope
        corrected = x_hat + h * (d + slope) / 2
        return (jnp.where(correct, corrected, predicted), jnp.where(correct, corrected, x), slope), None

    x = noise.astype(jnp.float32) * np.float32(sigmas[0])
    rows = (jnp.asarray(level, jnp.float32), jnp.asarray(step, jnp.float32), jnp.asarray(corrects))
    (x, _, _), _ = jax.lax.scan(call, (x, x, jnp.zeros_like(x)), rows)
    return x
