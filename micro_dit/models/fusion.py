"""The dense residual: a short decoder on all tokens that fuses the mixer's output with the backbone's.

SPRINT (Park et al. 2025, arXiv 2510.21986), but with tokens dropped at random, as in deferred masking.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from micro_dit.models.blocks import DiTBlock, NormedProjection
from micro_dit.models.config import DiTConfig
from micro_dit.models.layers import Constrain, normal_init
from micro_dit.models.masking import TokenMask, restore_tokens


class FusionDecoder(nnx.Module):
    """Restores the backbone's tokens, adds the mixer's and decodes the sum: (B, K, D), (B, N, M) → (B, N, G)."""

    def __init__(self, config: DiTConfig, *, remat: str, constrain: Constrain, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, M, G = config.dim, config.patch_mixer_dim, config.decoder_dim
        self.proj_in = NormedProjection(D, G, config, dtype=dtype, rngs=rngs)
        self.mixer_in = NormedProjection(M, G, config, dtype=dtype, rngs=rngs)
        self.caption_in = NormedProjection(D, G, config, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(normal_init(0.02)(rngs.params(), (G,), jnp.float32))
        block = functools.partial(DiTBlock, config=config, remat=remat, constrain=constrain, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([block(shape) for shape in config.decoder_blocks()])

    def __call__(
        self, x: jax.Array | None, mixed: jax.Array, y: jax.Array, c: jax.Array, mask: TokenMask | None,
        path_drop: jax.Array | None = None, rotary: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """Decodes all tokens.

        Args:
            x: (B, K, D), the backbone's output; None if it was skipped for all images.
            mixed: (B, N, M), the mixer's output.
            y: (B, L, D), captions.
            c: (B, D), noise level and pooled caption.
            mask: The tokens that the backbone has seen; None for all.
            path_drop: (B,) bool, images whose x is replaced by mask tokens; None for no image.
            rotary: (B, N, h), rotary position embeddings; None for a network without them.
        """
        fused, y = self.mixer_in(mixed), self.caption_in(y)  # (B, N, G), (B, L, G)
        token = self.mask_token[...].astype(fused.dtype)
        if x is None:
            x = token
        else:
            x = self.proj_in(x)  # (B, K, G)
            if mask is not None:
                x = restore_tokens(x, mask, fill=token)  # (B, N, G)
            if path_drop is not None:
                x = jnp.where(path_drop[:, None, None], token, x)
        x = x + fused
        for block in self.blocks:
            x = block(x, y, c, rotary)
        return x
