import jax
import jax.numpy as jnp
import numpy as np

from micro_dit.training.optimizer import update_ema

DECAY = 0.99975


def test_it_follows_the_formula_in_float32_and_moves_at_every_step() -> None:
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


def test_it_converges_to_constant_parameters() -> None:
    ema, params = {"w": jnp.zeros(3)}, {"w": jnp.full(3, 7.0)}
    after = jax.lax.fori_loop(0, 20_000, lambda _, ema: update_ema(ema, params, DECAY), ema)
    np.testing.assert_allclose(after["w"], 7 * (1 - DECAY**20_000), rtol=1e-4)


def test_while_not_active_it_is_a_copy() -> None:
    ema, params = {"w": jnp.zeros(3)}, {"w": jnp.asarray([0.1, 1e-8, 3e7])}
    np.testing.assert_array_equal(update_ema(ema, params, DECAY, active=jnp.asarray(False))["w"], params["w"])
    np.testing.assert_array_equal(update_ema(ema, ema, DECAY, active=jnp.asarray(True))["w"], ema["w"])
