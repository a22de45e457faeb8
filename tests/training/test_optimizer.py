import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.training.optimizer import make_optimizer, update_ema
from micro_dit.training.state import TrainState, enter_phase

DECAY = 0.99975
PARAMS = {"a": np.asarray([[1.0, -2.0], [0.5, 3.0]]), "b": np.asarray([0.1, -0.4, 2.0])}
SETTINGS = dict(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1)


def gradients(step: int) -> dict[str, np.ndarray]:
    """Large at even steps, so that they are clipped, and small at odd ones, so that they are not."""
    generator = np.random.default_rng(step)
    scale = 3.0 if step % 2 == 0 else 0.01
    return {name: scale * generator.standard_normal(value.shape) for name, value in PARAMS.items()}


def by_hand(params: dict[str, np.ndarray], steps: int, clip: float, learning_rate: float) -> dict[str, np.ndarray]:
    """AdamW in float64 (Loshchilov and Hutter 2019, algorithm 2), after clipping by the norm over both parameters."""
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for t in range(1, steps + 1):
        g = gradients(t - 1)
        norm = np.sqrt(sum((value**2).sum() for value in g.values()))
        updated = {}
        for name, p in params.items():
            clipped = g[name] * min(1.0, clip / norm)
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.99 * second[name] + 0.01 * clipped**2
            m, v = first[name] / (1 - 0.9**t), second[name] / (1 - 0.99**t)
            updated[name] = p - learning_rate * (m / (np.sqrt(v) + 1e-8) + 0.1 * p)
        params = updated
    return params


@pytest.mark.parametrize("clip", [0.25, 1e6])
def test_steps_are_those_of_adamw_by_hand(clip: float) -> None:
    optimizer = make_optimizer(clip, **SETTINGS)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    state = optimizer.init(params)
    for step in range(5):
        g = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients(step))
        updates, state = optimizer.update(g, state, params)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
    expected = by_hand(PARAMS, 5, clip, 0.01)
    for name in PARAMS:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-6)
        assert np.abs(expected[name] - PARAMS[name]).max() > 0.01


def test_the_states_structure_does_not_depend_on_the_settings() -> None:
    params = jax.tree.map(jnp.asarray, PARAMS)
    first, second = make_optimizer(0.25).init(params), make_optimizer(1.0, **SETTINGS).init(params)
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_phase_takes_over_the_moments_or_starts_afresh(fresh: bool) -> None:
    optimizer = make_optimizer(1.0)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    g = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients(0))
    _, used = optimizer.update(g, optimizer.init(params), params)
    state = TrainState(jnp.int32(7), params, used, None)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    entered = enter_phase(state, optimizer, with_ema=True, fresh_optimizer=fresh, sharding=device)
    expected = optimizer.init(params) if fresh else used
    jax.tree.map(np.testing.assert_array_equal, entered.opt_state, expected)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(used))
    assert int(entered.step) == 7
    jax.tree.map(np.testing.assert_array_equal, entered.params, params)
    # The average begins as a copy, in memory of its own: the train step gives its arguments away.
    jax.tree.map(np.testing.assert_array_equal, entered.ema, params)
    for name in PARAMS:
        assert entered.ema[name].unsafe_buffer_pointer() != entered.params[name].unsafe_buffer_pointer()
    assert enter_phase(entered, optimizer, False, False, device).ema is None


# ---- EMA -------------------------------------------------------------------------------------------------------------


def test_the_ema_follows_the_formula_in_float32_and_moves_at_every_step() -> None:
    generator = np.random.default_rng(0)
    start = params = generator.standard_normal(1000).astype(np.float32)
    ema = {"w": jnp.asarray(params)}
    expected = params.astype(np.float64)
    update = jax.jit(update_ema, static_argnames="decay")
    for _ in range(50):
        params = params + 0.01 * generator.standard_normal(1000).astype(np.float32)
        before = np.asarray(ema["w"])
        ema = update(ema, {"w": jnp.asarray(params)}, DECAY)
        expected = DECAY * expected + (1 - DECAY) * params
        assert np.mean(np.asarray(ema["w"]) != before) > 0.95
    assert ema["w"].dtype == jnp.float32
    moved = np.linalg.norm(expected - start)
    assert np.linalg.norm(ema["w"] - expected) < 2e-3 * moved


def test_the_ema_converges_to_constant_parameters() -> None:
    ema, params = {"w": jnp.zeros(3)}, {"w": jnp.full(3, 7.0)}
    after = jax.lax.fori_loop(0, 20_000, lambda _, ema: update_ema(ema, params, DECAY), ema)
    np.testing.assert_allclose(after["w"], 7 * (1 - DECAY**20_000), rtol=1e-4)


def test_while_not_active_the_ema_is_a_copy() -> None:
    ema, params = {"w": jnp.zeros(3)}, {"w": jnp.asarray([0.1, 1e-8, 3e7])}
    np.testing.assert_array_equal(update_ema(ema, params, DECAY, active=jnp.asarray(False))["w"], params["w"])
    np.testing.assert_array_equal(update_ema(ema, ema, DECAY, active=jnp.asarray(True))["w"], ema["w"])
