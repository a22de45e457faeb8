import numpy as np
import pytest

from micro_dit.models.embeddings import position_table


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
