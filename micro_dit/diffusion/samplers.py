"""From noise to latents: deterministic samplers of the probability-flow ODE dx/dsigma = (x - D(x; sigma))/sigma.

Heun's and Euler's method are those of Karras et al. 2022 (EDM, arXiv 2206.00364, algorithm 1). Euler's steps in sigma
are DDIM's (Song et al. 2020, arXiv 2010.02502): one method, two names. DPM-Solver++(2M) is that of Lu et al. 2022
(arXiv 2211.01095, algorithm 2), with alpha = 1 and lambda = -ln sigma.

A sampler is a table with a row for each call of the denoiser, and what is done in a call: so it can be run as one
compiled scan (`heun`, `euler`, `dpmpp_2m`) or call by call (micro_dit/diffusion/generate.py).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]  # D(x, sigma), sigma of shape (1,)
Carry = tuple[jax.Array, ...]  # what goes from call to call; x, (B, H, W, C) float32, is the first

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def noise_levels(
    steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> np.ndarray:
    """(steps + 1,) float64 levels, from sigma_max down to 0 (EDM, equation 5). One step goes straight to 0."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, not {steps}")
    ramp = np.arange(steps) / max(steps - 1, 1)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return np.append(sigmas, 0.0)


def partial_noise_levels(steps: int, strength: float) -> np.ndarray:
    """The levels for the last part of the way, for an image to start from instead of noise.

    Args:
        steps: those of the whole way; a part of it takes as large a part of them, rounded up.
        strength: that part, above 0 (the image stays) and up to 1 (nothing of it is left), even in sigma^(1/rho).
    """
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return noise_levels(math.ceil(steps * strength), sigma_max=(low + strength * (high - low)) ** RHO)


class Sampler(NamedTuple):
    """A method to go down the noise levels.

    Attributes:
        table: (steps + 1,) levels that end with 0 → columns with a number for each call; the first is its level.
        start: x at the first level → the first call's carry.
        call: (denoiser, carry, the call's row) → the next call's carry, whose x is the result after the last.
        denoised: (carry, the call's row, the next call's carry) → what the denoiser returned in that call, up to
            rounding: the picture as it shows through the noise.
    """

    table: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    start: Callable[[jax.Array], Carry]
    call: Callable[[Denoiser, Any, Any], Carry]
    denoised: Callable[[Any, Any, Any], jax.Array]

    def columns(self, sigmas: np.ndarray) -> tuple[np.ndarray, ...]:
        """The table, float32 and bool."""
        columns = map(np.asarray, self.table(sigmas))
        return tuple(c if c.dtype == bool else c.astype(np.float32) for c in columns)

    def run(self, D: Denoiser, noise: jax.Array, sigmas: np.ndarray) -> jax.Array:
        """From unit normal noise (B, H, W, C) to latents, float32. The denoiser is compiled once, not for each call."""
        x = noise.astype(jnp.float32) * np.float32(sigmas[0])
        columns = tuple(map(jnp.asarray, self.columns(sigmas)))
        carry, _ = jax.lax.scan(lambda carry, row: (self.call(D, carry, row), None), self.start(x), columns)
        return carry[0]


def _heun_table(sigmas: np.ndarray) -> tuple[np.ndarray, ...]:
    """The level of a call, the step it belongs to, and whether it corrects that step (the last step is Euler's)."""
    calls = [call for s, n in itertools.pairwise(sigmas) for call in ((s, n - s, False), (n, n - s, True))]
    level, step, corrects = zip(*calls[:-1], strict=True)
    return np.asarray(level), np.asarray(step), np.asarray(corrects)


def _heun_call(D: Denoiser, carry: Any, row: Any) -> Carry:
    x, x_hat, d = carry  # the point to evaluate, the step's start, the slope there
    sigma, h, correct = row
    slope = (x - D(x, sigma[None])) / sigma
    predicted = x + h * slope
    corrected = x_hat + h * (d + slope) / 2
    return jnp.where(correct, corrected, predicted), jnp.where(correct, corrected, x), slope


def _euler_call(D: Denoiser, carry: Any, row: Any) -> Carry:
    (x,), (sigma, h) = carry, row
    return (x + h * (x - D(x, sigma[None])) / sigma,)


def _dpmpp_2m_table(sigmas: np.ndarray) -> tuple[np.ndarray, ...]:
    """The level of a call, the next one relative to it, and how far the denoised image is extrapolated.

    The first step has none before it, and the last, to lambda = infinity, none as long: they are of first order.
    """
    here, there = sigmas[:-1], sigmas[1:]
    extrapolation = np.zeros(len(here))
    h = np.log(here[:-1] / there[:-1])  # the steps in lambda, without the last
    extrapolation[1:-1] = h[1:] / h[:-1] / 2
    return here, there / here, extrapolation


def _dpmpp_2m_call(D: Denoiser, carry: Any, row: Any) -> Carry:
    x, previous = carry
    sigma, ratio, extrapolation = row
    D_x = D(x, sigma[None])
    return ratio * x + (1 - ratio) * (D_x + extrapolation * (D_x - previous)), D_x


def _euler_denoised(carry: Any, row: Any, after: Any) -> jax.Array:
    (x,), (sigma, h), (x_next,) = carry, row, after
    return x - sigma * (x_next - x) / h


HEUN = Sampler(
    _heun_table, lambda x: (x, x, jnp.zeros_like(x)), _heun_call, lambda carry, row, after: carry[0] - row[0] * after[2]
)
EULER = Sampler(lambda sigmas: (sigmas[:-1], np.diff(sigmas)), lambda x: (x,), _euler_call, _euler_denoised)
DPMPP_2M = Sampler(
    _dpmpp_2m_table, lambda x: (x, jnp.zeros_like(x)), _dpmpp_2m_call, lambda carry, row, after: after[1]
)
SAMPLERS = {"heun": HEUN, "euler": EULER, "dpmpp_2m": DPMPP_2M}


def heun(D: Denoiser, noise: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """Heun's method, of second order: 2·steps - 1 calls, alternately a predictor and its corrector.

    Args:
        D: the denoiser.
        noise: (B, H, W, C) float32, unit normal.
        sigmas: (steps + 1,) descending noise levels that end with 0.

    Returns:
        (B, H, W, C) float32 latents.
    """
    return HEUN.run(D, noise, sigmas)


def euler(D: Denoiser, noise: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """Euler's method, of first order, which is DDIM: a call a step. Arguments as of `heun`."""
    return EULER.run(D, noise, sigmas)


def dpmpp_2m(D: Denoiser, noise: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """DPM-Solver++(2M), of second order with a call a step: it looks back at the step before. Arguments as of `heun`.

    It takes at least 2 steps for the method to be more than Euler's.
    """
    return DPMPP_2M.run(D, noise, sigmas)


def keep_known(D: Denoiser, known: jax.Array, redraw: jax.Array) -> Denoiser:
    """The denoiser for inpainting: what is known it has right.

    Every sampler then moves the known part on a straight line, known + sigma·noise: at each level that part of x is the
    original under the noise of that level, without anything being done to x.

    Args:
        D: the denoiser.
        known: (B, H, W, C), or to be broadcast to it: the original's latents.
        redraw: bool, to be broadcast likewise: False where they are kept.
    """
    return lambda x, sigma: jnp.where(redraw, D(x, sigma), known)
