"""Embeddings of the network's inputs: patches, positions, noise level, caption.

B images · H W latent rows, columns · C latent channels · N tokens · D width · L caption tokens · Y caption channels.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from micro_dit.models.layers import layer_norm, linear, normal_init

NOISE_FREQUENCIES = 256


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """Splits images into patches: (B, H, W, C) → (B, N, p·p·C).

    Tokens are in row-major order, channels in the order (row in patch, column in patch, C).
    """
    (B, H, W, C), p = x.shape, patch_size
    x = x.reshape(B, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(x: jax.Array, patch_size: int, height: int, width: int) -> jax.Array:
    """Assembles patches into images, (B, N, p·p·C) → (B, H, W, C): the inverse of `patchify`."""
    p = patch_size
    B, _, channels = x.shape
    x = x.reshape(B, height // p, width // p, p, p, channels // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, height, width, channels // (p * p))


@lru_cache(maxsize=8)
def position_table(dim: int, grid: int, pos_interp_scale: float) -> np.ndarray:
    """Computes the fixed 2-D sin-cos position table, (grid², dim) float32, on the host.

    The first dim/2 channels encode the column, the last dim/2 the row; each half is [sin(pos·w), cos(pos·w)] with
    w_i = 10000^(-i/(dim/4)). Positions are divided by `pos_interp_scale`, so that a larger grid has the range of
    positions that the model was trained on. As in the public release, positions are float32 and the rest is
    computed in float64.
    """
    w = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    positions = np.arange(grid, dtype=np.float32) / np.float32(pos_interp_scale)
    angles = positions[:, None] * w  # (grid, dim/4) float64
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, dim/2)
    return np.concatenate([np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)], axis=1).astype(np.float32)


@lru_cache(maxsize=8)
def rotary_table(head_dim: int, grid: int, pos_interp_scale: float) -> np.ndarray:
    """Computes the cosines, then the sines, of 2-D rotary position embeddings: (grid², head_dim) float32, on the host.

    Of the head_dim/2 angles of a token, the first half encodes the column, the second half the row, each as pos·w with
    w_i = 100^(-i/(head_dim/4)): RoPE-Axial of Heo et al. 2024, arXiv 2403.13298. Positions are divided by
    `pos_interp_scale`, as those of `position_table`.
    """
    w = 100.0 ** (-np.arange(head_dim // 4) / (head_dim / 4))
    axis = np.arange(grid)[:, None] / pos_interp_scale * w  # (grid, head_dim/4) float64
    angles = np.concatenate([np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)], axis=1)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class PatchEmbedding(nnx.Module):
    """A p×p convolution of stride p, written as a product over flattened patches: (B, H, W, C) → (B, N, D)."""

    def __init__(self, patch_size: int, channels: int, dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.patch_size = patch_size
        fan_in = patch_size * patch_size * channels
        # The release leaves this bias at the convolution's default.
        bias_init = nnx.initializers.uniform(2.0 / np.sqrt(fan_in))
        self.proj = linear(
            fan_in, dim, bias_init=lambda *a: bias_init(*a) - 1.0 / np.sqrt(fan_in), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(patchify(x, self.patch_size))


class NoiseEmbedding(nnx.Module):
    """Embeds the noise level c_noise: (B,) float32 → (B, D), by a 512-wide sinusoid (cosines first) and two Linears."""

    def __init__(self, dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = normal_init(0.02)
        self.fc1 = linear(2 * NOISE_FREQUENCIES, dim, kernel_init=init, dtype=dtype, rngs=rngs)
        self.fc2 = linear(dim, dim, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, t: jax.Array) -> jax.Array:
        frequencies = np.exp(-np.log(10000.0) * np.arange(NOISE_FREQUENCIES) / NOISE_FREQUENCIES).astype(np.float32)
        angles = t.astype(jnp.float32)[:, None] * frequencies  # (B, 256)
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class CaptionMLP(nnx.Module):
    """Linear → GELU-tanh → LayerNorm → Linear to width D, of captions (B, L, Y) and of pooled captions (B, D)."""

    def __init__(self, features: int, dim: int, *, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = normal_init(0.02)
        self.fc1 = linear(features, dim, kernel_init=init, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
        self.fc2 = linear(dim, dim, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, y: jax.Array) -> jax.Array:
        return self.fc2(self.norm(jax.nn.gelu(self.fc1(y), approximate=True)))
