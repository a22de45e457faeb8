import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion.samplers import heun, noise_levels


@pytest.mark.parametrize("steps", [1, 2, 18, 30])
def test_noise_levels_go_down_to_zero(steps: int):
    levels = noise_levels(steps)
    assert levels.shape == (steps + 1,)
    assert levels[0] == pytest.approx(80)
    assert levels[-1] == 0
    assert np.all(np.diff(levels) < 0)
    if steps > 1:
        assert levels[-2] == pytest.approx(0.002)
        # Evenly spaced in the seventh root.
        np.testing.assert_allclose(np.diff(levels[:-1] ** (1 / 7), 2), 0, atol=1e-12)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        noise_levels(0)


def noise() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 1), dtype=np.float32))


def linear_denoiser(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """The ideal one for data ~ Normal(0, 1): x(sigma) goes as sqrt(1 + sigma²)."""
    return x / (1 + sigma**2)


def error(steps: int) -> float:
    """Relative error at the last level above 0."""
    levels = noise_levels(steps, sigma_min=0.5, sigma_max=5.0)
    x = heun(linear_denoiser, noise(), levels)
    # The last step, to 0, is Euler's by design and ends at D(x; 0.5).
    exact = noise() * 5.0 * np.sqrt((1 + 0.25) / (1 + 25)) / (1 + 0.25)
    return float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact))


def test_the_error_falls_with_the_square_of_the_steps():
    errors = [error(steps) for steps in (9, 17, 33)]  # 8, 16 and 32 steps above the last
    assert errors[0] < 0.05
    for coarse, fine in itertools.pairwise(errors):
        assert 3.3 < coarse / fine < 5.0


def test_one_step_is_the_denoiser_itself():
    x = heun(linear_denoiser, noise(), noise_levels(1))
    np.testing.assert_allclose(x, linear_denoiser(80 * noise(), 80.0), atol=2e-5)


def test_a_denoiser_that_knows_the_answer_is_believed():
    answer = jnp.full((2, 4, 4, 1), 0.7)
    np.testing.assert_allclose(heun(lambda x, sigma: answer, noise(), noise_levels(10)), answer, atol=2e-5)


def test_the_network_is_traced_once_and_called_twice_a_step_but_the_last():
    calls, traces = [], []

    def counting(x: jax.Array, sigma: jax.Array) -> jax.Array:
        traces.append(sigma.shape)
        jax.debug.callback(lambda s: calls.append(float(s[0])), sigma, ordered=True)
        return linear_denoiser(x, sigma)

    levels = noise_levels(4)
    jax.block_until_ready(heun(counting, noise(), levels))
    jax.effects_barrier()
    assert len(traces) <= 2
    expected = [levels[0], levels[1], levels[1], levels[2], levels[2], levels[3], levels[3]]
    np.testing.assert_allclose(calls, expected, rtol=1e-6)
