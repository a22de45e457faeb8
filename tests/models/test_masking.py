import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.models.masking import drop_tokens, kept_tokens, random_mask, restore_tokens

B, N, D = 6, 16, 5


def test_drop_and_restore_keeps_kept_tokens_and_zeroes_dropped_ones() -> None:
    x = jax.random.normal(jax.random.key(0), (B, N, D)) + 10
    mask = random_mask(jax.random.key(1), B, N, 0.75)
    kept = drop_tokens(x, mask)
    assert kept.shape == (B, 4, D)
    restored = np.asarray(restore_tokens(kept, mask))
    is_kept = np.asarray(mask.dropped) == 0
    np.testing.assert_array_equal(restored[is_kept], np.asarray(x)[is_kept])
    np.testing.assert_array_equal(restored[~is_kept], 0)
    np.testing.assert_array_equal(is_kept.sum(axis=1), 4)
    # Dropping again returns the kept tokens in the same order.
    np.testing.assert_array_equal(drop_tokens(restored, mask), kept)


def test_masks_are_independent_and_uniform_without_replacement() -> None:
    images = 4000
    mask = random_mask(jax.random.key(0), images, N, 0.75)
    keep = np.asarray(mask.keep)
    assert all(len(set(row)) == 4 for row in keep)
    frequency = np.bincount(keep.ravel(), minlength=N) / images
    np.testing.assert_allclose(frequency, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / images))
    assert len({tuple(sorted(row)) for row in keep}) > 1000


def test_only_kept_tokens_have_gradients() -> None:
    x = jax.random.normal(jax.random.key(0), (B, N, D))
    mask = random_mask(jax.random.key(1), B, N, 0.5)
    gradient = jax.grad(lambda x: jnp.sum(restore_tokens(drop_tokens(x, mask), mask) * 3))(x)
    np.testing.assert_array_equal(gradient, 3 * (1 - mask.dropped)[:, :, None] * jnp.ones(D))


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 16), (0.5, 8), (0.75, 4), (0.9, 1), (0.7, 4)])
def test_kept_tokens_rounds_down(ratio: float, kept: int) -> None:
    assert kept_tokens(16, ratio) == kept


@pytest.mark.parametrize("ratio", [0.95, 1.0, -0.1])
def test_rejects_ratios_that_keep_no_token_and_negative_ratios(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        kept_tokens(16, ratio)


def test_ratio_zero_gives_no_mask() -> None:
    assert random_mask(jax.random.key(0), B, N, 0.0) is None
