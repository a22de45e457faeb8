"""The moving average of the parameters, in float32: what is sampled from and evaluated."""

import jax
import jax.numpy as jnp

from micro_dit.models.dit import Params


def update_ema(ema: Params, params: Params, decay: float, active: jax.Array | bool = True) -> Params:
    """decay·ema + (1 - decay)·params; a copy of the parameters while not `active`.

    It starts as a copy, so it needs no correction of its bias. Written as ema + (1 - decay)·(params - ema), whose small
    second term float32 keeps where decay is close to 1.
    """
    return jax.tree.map(lambda e, p: jnp.where(active, e + jnp.float32(1 - decay) * (p - e), p), ema, params)
