"""AdamW as the paper uses it, without the learning rate, which each phase schedules by its own steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from micro_dit.models.dit import Params


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """optax's, but by one factor, so that the compiled step need not write clipped gradients down."""

    def clip(gradients: Any, _: Any) -> Any:
        factor = limit / jnp.maximum(optax.tree.norm(gradients), limit)
        return jax.tree.map(lambda gradient: gradient * factor, gradients)

    return optax.stateless(clip)


def make_optimizer(
    clip: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.1
) -> optax.GradientTransformation:
    """Clip by global norm → Adam → decoupled weight decay on all parameters, as the public release decays them.

    Its state has the same structure whatever the arguments, so that a phase can take over the state of the one before.
    The learning rate is multiplied in afterwards.
    """
    return optax.chain(
        clip_by_global_norm(clip),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay),
    )


def update_ema(ema: Params, params: Params, decay: float, active: jax.Array | bool = True) -> Params:
    """decay·ema + (1 - decay)·params; a copy of the parameters while not `active`.

    It starts as a copy, so it needs no correction of its bias. Written as ema + (1 - decay)·(params - ema), whose small
    second term float32 keeps where decay is close to 1.
    """
    return jax.tree.map(lambda e, p: jnp.where(active, e + jnp.float32(1 - decay) * (p - e), p), ema, params)
