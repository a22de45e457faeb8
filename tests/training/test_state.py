import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.models.dit import abstract_params
from micro_dit.rng import stream
from micro_dit.training.lora import Trainable
from micro_dit.training.optimizer import make_optimizer
from micro_dit.training.state import TrainState, enter_phase, init_state
from tests.helpers import tiny

NAMES = ("init", "posterior", "caption_drop", "sigma", "noise", "mask", "heldout")


def test_random_streams_differ_by_name_and_step_and_repeat_for_the_same_seed() -> None:
    key = jax.random.key(0)
    streams = itertools.product(NAMES, (None, 0, 1, 2))
    draws = {(name, step): np.asarray(jax.random.normal(stream(key, name, step), (200,))) for name, step in streams}
    for (a, x), (b, y) in itertools.combinations(draws.items(), 2):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.35, (a, b)
    again = jax.random.normal(stream(jax.random.key(0), "noise", jnp.int32(2)), (200,))
    np.testing.assert_array_equal(again, draws["noise", 2])
    other = jax.random.normal(stream(jax.random.key(1), "noise", 2), (200,))
    assert not np.array_equal(other, draws["noise", 2])


@pytest.mark.parametrize("with_ema", [True, False])
def test_an_initialized_state_is_float32(with_ema: bool) -> None:
    network, optimizer = tiny.network(), make_optimizer(1.0)
    state = jax.eval_shape(lambda: init_state(Trainable(network), optimizer, 0, None, with_ema))
    assert (state.step.shape, state.step.dtype) == ((), np.int32)
    assert (state.ema is None) is not with_ema
    floats = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert {leaf.dtype for leaf in floats} == {np.dtype("float32")}


@pytest.mark.parametrize("fresh", [True, False])
def test_the_next_phase_keeps_the_weights_bitwise_and_the_moments_unless_reset(fresh: bool) -> None:
    optimizer, generator = make_optimizer(1.0), np.random.default_rng(0)
    params = {name: generator.standard_normal((3, 4)).astype(np.float32) for name in ("a", "b")}
    moments = jax.tree.map(lambda leaf: jnp.ones_like(leaf) * 7, optimizer.init(params))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = enter_phase(TrainState(jnp.int32(5), params, moments, None), optimizer, True, fresh, sharding)
    assert state.step == 5
    for part in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, part, params)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(moments)
    for leaf in jax.tree.leaves(state.opt_state):
        np.testing.assert_array_equal(leaf, 0 if fresh else 7)


def test_networks_of_two_resolutions_have_the_same_parameters() -> None:
    """The position table is computed from the resolution and the scale, and is not a parameter."""
    low, high = (abstract_params(tiny.network(input_size=n, pos_interp_scale=n / 8)) for n in (8, 16))
    assert low == high
