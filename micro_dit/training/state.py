"""The train state: everything that a training step updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from micro_dit.models.dit import Params
from micro_dit.rng import stream
from micro_dit.training.lora import Trainable


class TrainState(NamedTuple):
    """The state of a run between two steps. All floating-point arrays are float32.

    Attributes:
        step: () int32, optimizer steps completed, over all phases.
        params: The trained parameters by name: all of the network, or a LoRA adapter.
        opt_state: State of the optimizer.
        ema: EMA weights by name; None in a phase without EMA.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None


def init_state(
    trainable: Trainable, optimizer: optax.GradientTransformation, seed: int, sharding: Any, with_ema: bool
) -> TrainState:
    """Initializes a train state in its shards, without a full copy on the host or on any device.

    Args:
        trainable: The parameters to initialize.
        optimizer: The optimizer.
        seed: Seed of the parameters.
        sharding: The sharding of every array, or a TrainState of shardings.
        with_ema: Whether the state has EMA weights.
    """

    def init(seed: jax.Array) -> TrainState:
        params = trainable.init(stream(jax.random.key(seed), "init"))
        ema = jax.tree.map(jnp.copy, params) if with_ema else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), ema)

    # A NumPy value is replicated over all processes, whereas a JAX array would be local to each process.
    return jax.jit(init, out_shardings=sharding)(np.uint32(seed))


def state_from(
    params: Params, optimizer: optax.GradientTransformation, sharding: TrainState, with_ema: bool
) -> TrainState:
    """Returns a state at step 0 with the given parameters, which must already be sharded as in `sharding`."""

    def rest(params: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if with_ema else None
        return TrainState(jnp.int32(0), {}, optimizer.init(params), ema)

    return jax.jit(rest, out_shardings=sharding._replace(params={}))(params)._replace(params=params)


def abstract_state(trainable: Trainable, optimizer: optax.GradientTransformation, with_ema: bool) -> TrainState:
    """Returns the shapes and dtypes of a train state without allocating it."""
    params: Any = trainable.abstract()
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step, params, jax.eval_shape(optimizer.init, params), dict(params) if with_ema else None)


def enter_phase(
    state: TrainState, optimizer: optax.GradientTransformation, with_ema: bool, fresh_optimizer: bool, sharding: Any
) -> TrainState:
    """Returns the state for the next phase, with EMA weights added or dropped and the optimizer reset if requested.

    Args:
        state: The state at the end of the previous phase.
        optimizer: The optimizer of the next phase.
        with_ema: Whether the next phase has EMA weights. New ones start as a copy of the parameters.
        fresh_optimizer: Whether to reset the optimizer state.
        sharding: The sharding of every array, or a TrainState of shardings.
    """

    def enter(state: TrainState) -> TrainState:
        opt_state = optimizer.init(state.params) if fresh_optimizer else state.opt_state
        ema = jax.tree.map(jnp.copy, state.params) if with_ema and state.ema is None else state.ema
        return TrainState(state.step, state.params, opt_state, ema if with_ema else None)

    return jax.jit(enter, out_shardings=sharding)(state)
