import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from micro_dit.training.optimizer import make_optimizer
from micro_dit.training.state import init_state, stream

NAMES = ("init", "posterior", "caption_drop", "sigma", "noise", "mask", "heldout")


def test_streams_differ_by_name_and_step_and_repeat_by_seed():
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
def test_a_fresh_state(with_ema: bool):
    network, optimizer = tiny.network(), make_optimizer(1.0)
    state = jax.eval_shape(lambda: init_state(network, optimizer, 0, None, with_ema))
    assert (state.step.shape, state.step.dtype) == ((), np.int32)
    assert (state.ema is None) is not with_ema
    floats = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert {leaf.dtype for leaf in floats} == {np.dtype("float32")}
    assert state.best_params is (state.ema if with_ema else state.params)
