import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion import edm
from micro_dit.models.masking import mask_from_noise

B, SIDE, C = 4, 8, 3
SIGMAS = jnp.asarray([0.002, 0.3, 0.9, 80.0])


def images(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, SIDE, SIDE, C), dtype=np.float32))


Y = jnp.zeros((B, 2, 5))


def network(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.tanh(x) + t[:, None, None, None]


@pytest.mark.parametrize("sigma_data", [0.9, 0.5])
def test_preconditioning_keeps_unit_variance(sigma_data: float) -> None:
    c_skip, c_out, c_in, c_noise = edm.precondition(SIGMAS, sigma_data)
    # The network's input and its target have unit variance (EDM, equations 114 to 122).
    np.testing.assert_allclose(c_in**2 * (SIGMAS**2 + sigma_data**2), 1, rtol=1e-6)
    np.testing.assert_allclose((c_skip - 1) ** 2 * sigma_data**2 + c_skip**2 * SIGMAS**2, c_out**2, rtol=1e-4)
    np.testing.assert_allclose(c_noise, np.log(SIGMAS) / 4, rtol=1e-6)
    # Therefore the error of F has weight 1 at every noise level.
    weight = (SIGMAS**2 + sigma_data**2) / (SIGMAS * sigma_data) ** 2
    np.testing.assert_allclose(weight * c_out**2, 1, rtol=1e-5)


def test_denoiser_is_the_identity_at_low_noise_and_the_network_at_high_noise() -> None:
    x = images(0)
    np.testing.assert_allclose(edm.denoise(network, x, jnp.asarray([1e-6]), Y), x, atol=1e-5)
    large = jnp.asarray([1e6])
    expected = 0.9 * network(x / 1e6, jnp.log(large) / 4, Y)
    np.testing.assert_allclose(edm.denoise(network, x, large, Y), expected, atol=1e-5)


def brute_force(x: np.ndarray, D_x: np.ndarray, sigma: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    """Computes the loss patch by patch in float64."""
    losses = []
    for image in range(B):
        weight = (sigma[image] ** 2 + 0.81) / (sigma[image] * 0.9) ** 2
        squares = weight * (D_x[image].astype(float) - x[image]) ** 2
        if keep is None:
            losses.append(squares.mean())
            continue
        patches = []
        for token in keep[image]:
            row, column = divmod(int(token), SIDE // 2)
            patches.append(squares[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean())
        losses.append(np.mean(patches))
    return np.asarray(losses)


@pytest.mark.parametrize("masked", [True, False])
def test_loss_matches_a_loop_over_the_kept_patches(masked: bool) -> None:
    x, noise, sigma = images(1), images(2), jnp.asarray([0.1, 0.5, 1.0, 3.0])
    mask = mask_from_noise(jax.random.uniform(jax.random.key(0), (B, 16)), 5) if masked else None
    loss = edm.loss(network, x, Y, sigma, noise, mask=mask)
    D_x = edm.denoise(network, x + sigma[:, None, None, None] * noise, sigma, Y)
    expected = brute_force(
        np.asarray(x), np.asarray(D_x), np.asarray(sigma), None if mask is None else np.asarray(mask.keep)
    )
    assert loss.shape == (B,)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_dropped_patches_do_not_affect_the_loss() -> None:
    x, noise, sigma = images(1), images(2), jnp.ones(B)
    mask = mask_from_noise(jax.random.uniform(jax.random.key(0), (B, 16)), 5)
    dropped = jnp.repeat(jnp.repeat(mask.dropped.reshape(B, 4, 4), 2, 1), 2, 2)[..., None]

    def wrong_where_dropped(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        return network(x, t, y) + 100 * dropped

    right = edm.loss(network, x, Y, sigma, noise, mask=mask)
    np.testing.assert_array_equal(edm.loss(wrong_where_dropped, x, Y, sigma, noise, mask=mask), right)
    assert np.all(edm.loss(wrong_where_dropped, x, Y, sigma, noise) > 1000)


def test_ideal_denoiser_of_gaussian_data_has_loss_1() -> None:
    """For data ~ Normal(0, sigma_data²), the ideal denoiser is c_skip·x, so F = 0 and the weighted error is 1."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(0.9 * generator.standard_normal((2000, 4, 4, 2), dtype=np.float32))
    noise = jnp.asarray(generator.standard_normal(x.shape, dtype=np.float32))
    sigma = edm.draw_sigma(jax.random.key(0), 2000, -0.6, 1.2)
    loss = edm.loss(lambda x, t, y: jnp.zeros_like(x), x, jnp.zeros((2000, 1, 1)), sigma, noise)
    assert float(loss.mean()) == pytest.approx(1, abs=0.02)


def test_training_noise_levels_are_log_normal() -> None:
    log_sigma = np.log(np.asarray(edm.draw_sigma(jax.random.key(0), 40_000, -0.6, 1.2), np.float64))
    assert log_sigma.mean() == pytest.approx(-0.6, abs=0.03)
    assert log_sigma.std() == pytest.approx(1.2, abs=0.03)
    standard = (log_sigma + 0.6) / 1.2
    assert (standard**3).mean() == pytest.approx(0, abs=0.08)
    assert (standard**4).mean() == pytest.approx(3, abs=0.2)
