import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion.samplers import SAMPLERS, keep_known, noise_levels, partial_noise_levels, sample


@pytest.mark.parametrize("steps", [1, 2, 18, 30])
def test_noise_levels_descend_to_zero(steps: int) -> None:
    levels = noise_levels(steps)
    assert levels.shape == (steps + 1,)
    assert levels[0] == pytest.approx(80)
    assert levels[-1] == 0
    assert np.all(np.diff(levels) < 0)
    if steps > 1:
        assert levels[-2] == pytest.approx(0.002)
        # The levels are evenly spaced in sigma^(1/7).
        np.testing.assert_allclose(np.diff(levels[:-1] ** (1 / 7), 2), 0, atol=1e-12)


def test_zero_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="must be at least 1, but is 0"):
        noise_levels(0)


def test_partial_noise_levels_use_a_fraction_of_the_steps() -> None:
    np.testing.assert_allclose(partial_noise_levels(14, 1.0), noise_levels(14), rtol=1e-12)
    half = partial_noise_levels(14, 0.5)
    assert len(half) == 8
    whole = noise_levels(3) ** (1 / 7)
    assert half[0] ** (1 / 7) == pytest.approx(whole[1])
    assert half[-2] == pytest.approx(0.002)
    np.testing.assert_allclose(partial_noise_levels(14, 1e-9), [0.002, 0], rtol=1e-6)


def noise() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 1), dtype=np.float32))


def linear_denoiser(x: jax.Array, sigma: float) -> jax.Array:
    """The ideal denoiser for data ~ Normal(0, 1): x(sigma) is proportional to sqrt(1 + sigma²)."""
    return x / (1 + sigma**2)


def error(sampler: str, steps: int, variance: float) -> float:
    """Returns the relative error of a sampler for data ~ Normal(0, variance)."""
    levels = noise_levels(steps, sigma_min=0.5, sigma_max=5.0)
    x = sample(lambda x, sigma: x * variance / (variance + sigma**2), noise(), levels, sampler)
    # The last step, from 0.5 to 0, is an Euler step for every sampler and returns D(x; 0.5).
    exact = noise() * 5.0 * np.sqrt((variance + 0.25) / (variance + 25)) * variance / (variance + 0.25)
    return float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact))


# The errors of dpmpp_2m nearly cancel at variance 1, so it is tested at another variance.
@pytest.mark.parametrize(("sampler", "order", "variance"), [("heun", 2, 1.0), ("euler", 1, 1.0), ("dpmpp_2m", 2, 0.25)])
def test_error_decreases_with_the_order_of_the_sampler(sampler: str, order: int, variance: float) -> None:
    errors = [error(sampler, steps, variance) for steps in (9, 17, 33)]  # 8, 16 and 32 before the last step
    assert errors[0] < (0.05 if order == 2 else 0.25)
    for coarse, fine in itertools.pairwise(errors):
        assert 0.82 * 2**order < coarse / fine < 1.3 * 2**order


def test_euler_is_ddim() -> None:
    levels = noise_levels(5)
    x = np.asarray(noise(), np.float64) * levels[0]
    for sigma, sigma_next in itertools.pairwise(levels):  # DDIM adds the predicted noise to D(x) at the next level
        D_x = x / (1 + sigma**2)
        x = D_x + sigma_next * (x - D_x) / sigma
    np.testing.assert_allclose(sample(linear_denoiser, noise(), levels, "euler"), x, rtol=2e-3, atol=2e-5)


def test_dpmpp_2m_matches_the_paper() -> None:
    """Compares with algorithm 2 of arXiv 2211.01095, written in terms of lambda with alpha = 1."""
    levels = noise_levels(6, sigma_min=0.1, sigma_max=10.0)
    x, t = np.asarray(noise(), np.float64) * levels[0], -np.log(levels[:-1])
    images = []
    for i in range(5):
        images.append(x / (1 + levels[i] ** 2))
        h = t[i + 1] - t[i]
        D_x = images[i]
        if i > 0:
            r = (t[i] - t[i - 1]) / h
            D_x = (1 + 1 / (2 * r)) * images[i] - images[i - 1] / (2 * r)
        x = levels[i + 1] / levels[i] * x - np.expm1(-h) * D_x
    expected = x / (1 + levels[5] ** 2)
    np.testing.assert_allclose(sample(linear_denoiser, noise(), levels, "dpmpp_2m"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_returns_the_denoiser_output(name: str) -> None:
    x = sample(linear_denoiser, noise(), noise_levels(1), name)
    np.testing.assert_allclose(x, linear_denoiser(80 * noise(), 80.0), atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_constant_denoiser_output_is_the_sample(name: str) -> None:
    constant = jnp.full((2, 4, 4, 1), 0.7)
    x = sample(lambda x, sigma: constant, noise(), noise_levels(10), name)
    np.testing.assert_allclose(x, constant, atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_known_part_stays_at_the_original_plus_noise_of_each_level(name: str) -> None:
    levels = noise_levels(6)
    known = jnp.linspace(-1, 1, 16).reshape(4, 4, 1)
    redraw = jnp.arange(4)[:, None, None] < 2
    calls = []

    def recording(x: jax.Array, sigma: float) -> jax.Array:
        calls.append((np.asarray(x), sigma))
        return linear_denoiser(x, sigma)

    x = sample(keep_known(recording, known, redraw), noise() + known / 80, levels, name)
    assert len(calls) == (11 if name == "heun" else 6)
    for state, sigma in calls:
        np.testing.assert_allclose(state[:, 2:], (known + sigma * noise())[:, 2:], atol=1e-4)
    np.testing.assert_allclose(x[:, 2:], jnp.broadcast_to(known, x.shape)[:, 2:], atol=1e-5)
    assert np.abs(x[:, :2] - known[:2]).max() > 0.1


def test_heun_calls_the_denoiser_twice_per_step_except_in_the_last() -> None:
    calls = []

    def counting(x: jax.Array, sigma: float) -> jax.Array:
        calls.append(sigma)
        return linear_denoiser(x, sigma)

    levels = noise_levels(4)
    sample(counting, noise(), levels)
    assert calls == [levels[0], levels[1], levels[1], levels[2], levels[2], levels[3], levels[3]]
