"""The held-out loss: EDM's loss on images outside the training split, with fixed noise levels and noise."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from micro_dit.diffusion import edm
from micro_dit.evaluation.evaluator import Results, Schedule, Weights
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import Params, bind
from micro_dit.rng import stream

# The distribution of noise levels in the paper at 256 px. It is fixed, so that the losses of recipes with different
# training distributions can be compared.
SIGMA_LEVELS, P_MEAN, P_STD = 11, -0.6, 1.2


def make_heldout_loss(
    config: DiTConfig, data: Mapping[str, Any], *, sigma_data: float, dtype: Any, sharding: Any = None
) -> Callable[..., dict[str, float]]:  # fmt: skip
    """Returns a function that computes the unmasked EDM loss of parameters on held-out data.

    Noise is added to each image once at each of SIGMA_LEVELS noise levels, the midpoints of equally likely intervals of
    ln sigma ~ Normal(P_MEAN, P_STD²). Levels and noise are the same in every call.

    Args:
        config: Network configuration.
        data: 'latent_mean' (n, h, w, C) and 'caption' (n, L, Y), as returned by `load_split`.
        sigma_data: Standard deviation of the latents, as in training.
        dtype: Dtype of the matrix products, as in training.
        sharding: Sharding of data and result, on all devices that hold the parameters; None for a single device.

    Returns:
        A function from parameters to {'heldout_loss': mean, 'heldout_loss/sigma=0.55': mean at this noise level, …}.
        The optional second argument is a function that is called before each noise level and returns whether to stop.
        The result of a stopped evaluation is {}.
    """
    slices = (np.arange(SIGMA_LEVELS) + 0.5) / SIGMA_LEVELS
    sigmas = np.exp([P_MEAN + P_STD * NormalDist().inv_cdf(q) for q in slices]).astype(np.float32)
    latents = jax.device_put(np.asarray(data["latent_mean"], np.float32), sharding)
    captions = jax.device_put(np.asarray(data["caption"]), sharding)

    @functools.partial(jax.jit, out_shardings=sharding)
    def loss_at(
        params: Params, x: jax.Array, y: jax.Array, sigma: jax.Array, level: jax.Array, seed: jax.Array
    ) -> jax.Array:
        network, key = bind(config, params, dtype), stream(jax.random.key(seed), "heldout")
        noise = jax.random.normal(jax.random.fold_in(key, level), x.shape)
        return edm.loss(network, x, y, jnp.full(x.shape[:1], sigma), noise, sigma_data=sigma_data).mean()

    def heldout_loss(params: Params, stops: Callable[[], bool] = lambda: False) -> dict[str, float]:
        by_level = []
        for level, sigma in enumerate(sigmas):
            if stops():
                return {}
            by_level.append(float(loss_at(params, latents, captions, sigma, np.uint32(level), np.uint32(0))))
        named = {f"heldout_loss/sigma={s:.2f}": loss for s, loss in zip(sigmas, by_level, strict=True)}
        return {"heldout_loss": float(np.mean(by_level))} | named

    return heldout_loss


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
    """Evaluator of the held-out loss of the raw weights and of the EMA weights.

    Losses at individual noise levels are reported for the EMA weights, or for the raw weights in a phase without EMA.

    Attributes:
        loss: A function from `make_heldout_loss`.
        schedule: When to run.
        stop_requested: Called before each noise level; returns whether to stop. A stopped evaluation has no results.
    """

    loss: Callable[..., dict[str, float]]
    schedule: Schedule
    stop_requested: Callable[[], bool]

    def due(self, step: int) -> bool:
        """Returns whether to run after a step."""
        return self.schedule.due(step)

    def run(self, weights: Weights, step: int) -> Results:
        """Computes the held-out losses."""
        raw = self.loss(weights.merge(weights.trained), self.stop_requested)
        if not raw or weights.ema is None:
            return Results(raw)
        ema = self.loss(weights.best, self.stop_requested)
        if not ema:
            return Results()
        return Results(ema | {"heldout_loss": raw["heldout_loss"], "heldout_loss_ema": ema["heldout_loss"]})
