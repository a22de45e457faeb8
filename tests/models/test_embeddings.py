import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.models.embeddings import position_table, rotary_table
from micro_dit.models.layers import rotate


def release_table(dim: int, grid: int, scale: float) -> np.ndarray:
    """Computes the position table like the public release, whose base size equals the grid."""
    positions = np.arange(grid, dtype=np.float32) / (grid / grid) / scale
    assert positions.dtype == np.float32
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    halves = []
    for position in np.meshgrid(positions, positions):  # columns, then rows
        angles = np.einsum("m,d->md", position.reshape(-1), omega)
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize(("dim", "grid"), [(32, 4), (64, 16), (512, 16), (1024, 32)])
def test_position_table_matches_the_release_bitwise(dim: int, grid: int, scale: float) -> None:
    table = position_table(dim, grid, scale)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table.view(np.int32), release_table(dim, grid, scale).view(np.int32))


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
def test_published_scales_give_the_same_table_in_float64(scale: float) -> None:
    """Checks that tables of earlier versions, which divided positions in float64, remain valid."""
    angles = np.arange(32)[:, None] / scale * 10000.0 ** (-np.arange(16) / 16)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(position_table(64, 32, scale)[:32, :32], axis)


def test_products_of_rotated_queries_and_keys_depend_on_the_offset_between_tokens_only() -> None:
    table = jnp.asarray(rotary_table(8, 6, 1.0))
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 3 * 8))
    rotated_q, rotated_k = (rotate(jnp.tile(x, (1, 36, 1)), table[None], heads=3)[0] for x in (q, k))
    scores = (rotated_q.reshape(36, 3, 8)[:, None] * rotated_k.reshape(36, 3, 8)).sum(-1).reshape(6, 6, 6, 6, 3)
    for row, column in ((0, 0), (1, 2), (-2, 1), (3, -3)):
        same = [
            scores[r, c, r + row, c + column]
            for r in range(6) for c in range(6) if 0 <= r + row < 6 and 0 <= c + column < 6
        ]  # fmt: skip
        np.testing.assert_allclose(same, np.broadcast_to(same[0], np.shape(same)), atol=1e-5)
    assert float(jnp.std(scores)) > 0.1
    np.testing.assert_allclose(jnp.linalg.norm(rotated_q, axis=-1), jnp.linalg.norm(q), rtol=1e-5)


def test_twice_the_grid_at_half_the_distance_has_the_same_angles_at_every_second_token() -> None:
    fine = rotary_table(16, 8, 2.0).reshape(8, 8, 16)
    np.testing.assert_array_equal(fine[::2, ::2], rotary_table(16, 4, 1.0).reshape(4, 4, 16))
