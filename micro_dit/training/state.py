"""Everything that a training step changes, and the random streams it draws from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from micro_dit.models.dit import Params
from micro_dit.rng import stream
from micro_dit.training.lora import Trainable


class TrainState(NamedTuple):
    """The state of a run between two steps; float32 except for the step.

    Attributes:
        step: () int32, optimizer steps since the run began, over all phases.
        params: The trained parameters: the network's, or a LoRA adapter's.
        opt_state: State of the optimizer.
        ema: EMA weights, or None in a phase without them.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None


def init_state(
    trainable: Trainable, optimizer: optax.GradientTransformation, seed: int, sharding: Any, with_ema: bool
) -> TrainState:
    """Initializes a state on its devices, without a full copy on the host or on any device.

    `sharding` is the sharding of every array, or a TrainState of shardings.
    """

    def init(seed: jax.Array) -> TrainState:
        params = trainable.init(stream(jax.random.key(seed), "init"))
        ema = jax.tree.map(jnp.copy, params) if with_ema else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), ema)

    # The seed is a numpy array, not one of jax: of the latter, each process would have its own.
    return jax.jit(init, out_shardings=sharding)(np.uint32(seed))


def state_from(
    params: Params, optimizer: optax.GradientTransformation, sharding: TrainState, with_ema: bool
) -> TrainState:
    """Returns a fresh state with given parameters, which must already be placed as in `sharding`."""

    def rest(params: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if with_ema else None
        return TrainState(jnp.int32(0), {}, optimizer.init(params), ema)

    return jax.jit(rest, out_shardings=sharding._replace(params={}))(params)._replace(params=params)


def abstract_state(trainable: Trainable, optimizer: optax.GradientTransformation, with_ema: bool) -> TrainState:
    """Returns shapes and dtypes of a state, without making it."""
    params: Any = trainable.abstract()
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step, params, jax.eval_shape(optimizer.init, params), dict(params) if with_ema else None)


def enter_phase(
    state: TrainState, optimizer: optax.GradientTransformation, with_ema: bool, fresh_optimizer: bool, sharding: Any
) -> TrainState:
    """Returns the state for the next phase: EMA weights start or end, and the optimizer may be reset.

    `sharding` is the sharding of every array, or a TrainState of shardings.
    """

    def enter(state: TrainState) -> TrainState:
        opt_state = optimizer.init(state.params) if fresh_optimizer else state.opt_state
        ema = jax.tree.map(jnp.copy, state.params) if with_ema and state.ema is None else state.ema
        return TrainState(state.step, state.params, opt_state, ema if with_ema else None)

    return jax.jit(enter, out_shardings=sharding)(state)
