"""The loss on images that training never sees; everything random is held fixed, so that numbers can be compared."""

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

# Fixed, so that losses of recipes that train on other noise levels can be compared: the paper's levels at 256 px.
SIGMA_LEVELS, P_MEAN, P_STD = 11, -0.6, 1.2


def make_heldout_loss(
    config: DiTConfig, data: Mapping[str, Any], *, sigma_data: float, dtype: Any, sharding: Any = None
) -> Callable[..., dict[str, float]]:  # fmt: skip
    """Returns a function from parameters to the unmasked EDM loss on held-out data.

    Each image is noised once at each of 11 noise levels, the midpoints of 11 equally likely slices of
    ln sigma ~ Normal(P_MEAN, P_STD²); levels and noise are the same at every call.

    Args:
        config: The network.
        data: 'latent_mean' (n, h, w, C) and 'caption' (n, L, Y), as `load_split` returns them.
        sigma_data: Standard deviation of the latents, as in training.
        dtype: Dtype of the matrix products, as in training.
        sharding: Placement of data and result, on all devices of the parameters; None with a single device.

    Returns:
        parameters → {'heldout_loss': mean, 'heldout_loss/sigma=0.55': mean at that level, …}. A second argument, a
        function that returns whether to stop, is called before each level; the result is {} once it returns True.
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
    """Evaluates the held-out loss of the trained weights and of their EMA.

    The losses at single noise levels are those of the EMA weights if there are any.

    Attributes:
        loss: The function that `make_heldout_loss` returns.
        schedule: When to run.
        stop_requested: Asked before each noise level; an interrupted evaluation returns no results.
    """

    loss: Callable[..., dict[str, float]]
    schedule: Schedule
    stop_requested: Callable[[], bool]

    def due(self, step: int) -> bool:
        """Returns whether to run after a step."""
        return self.schedule.due(step)

    def run(self, weights: Weights, step: int) -> Results:
        """Returns the held-out losses."""
        raw = self.loss(weights.merge(weights.trained), self.stop_requested)
        if not raw or weights.ema is None:
            return Results(raw)
        ema = self.loss(weights.best, self.stop_requested)
        if not ema:
            return Results()
        return Results(ema | {"heldout_loss": raw["heldout_loss"], "heldout_loss_ema": ema["heldout_loss"]})
