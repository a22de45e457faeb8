"""Token masks: chooses the tokens to keep, drops the others, and restores the original order.

All gathers of image tokens use `take_along_axis`, not explicitly broadcast indices: under SPMD, the former stays local
to each device's shard of the batch, and the latter all-gathers the batch.

B images · N tokens · K kept tokens · D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenMask(NamedTuple):
    """A random subset of each image's tokens."""

    keep: jax.Array  # (B, K) int32, positions of the kept tokens, in random order
    restore: jax.Array  # (B, N) int32, for each position its rank in the random order; ranks below K are kept

    @property
    def dropped(self) -> jax.Array:
        """(B, N) float32, 1 where the token is dropped, 0 where it is kept."""
        return (self.restore >= self.keep.shape[1]).astype(jnp.float32)


def kept_tokens(tokens: int, mask_ratio: float) -> int:
    """Returns K = int(N·(1 - mask_ratio)), the number of kept tokens."""
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}, but must be at least 0 and below 1")
    kept = int(tokens * (1.0 - mask_ratio))
    if kept < 1:
        raise ValueError(f"mask_ratio {mask_ratio} keeps none of {tokens} tokens; lower it")
    return kept


def mask_from_noise(noise: jax.Array, kept: int) -> TokenMask:
    """Keeps the positions of the `kept` smallest values of `noise` (B, N): uniform sampling without replacement."""
    order = jnp.argsort(noise, axis=1)
    return TokenMask(keep=order[:, :kept].astype(jnp.int32), restore=jnp.argsort(order, axis=1).astype(jnp.int32))


def random_mask(key: jax.Array, images: int, tokens: int, mask_ratio: float) -> TokenMask | None:
    """Samples a set of kept tokens for each image; returns None if no token is dropped."""
    kept = kept_tokens(tokens, mask_ratio)
    return None if kept == tokens else mask_from_noise(jax.random.uniform(key, (images, tokens)), kept)


def drop_tokens(x: jax.Array, mask: TokenMask) -> jax.Array:
    """Drops tokens by gathering the kept ones, in the mask's order: (B, N, D) → (B, K, D)."""
    return jnp.take_along_axis(x, mask.keep[:, :, None], axis=1)


def restore_tokens(x: jax.Array, mask: TokenMask, fill: jax.Array | float = 0.0) -> jax.Array:
    """Restores kept tokens to their positions, with `fill`, (D,) or a scalar, at the others: (B, K, D) → (B, N, D)."""
    B, K, D = x.shape
    dropped = jnp.broadcast_to(jnp.asarray(fill, x.dtype), (B, mask.restore.shape[1] - K, D))
    padded = jnp.concatenate([x, dropped], axis=1)
    return jnp.take_along_axis(padded, mask.restore[:, :, None], axis=1)
