"""MaskDiT's decoder, for comparison (Zheng et al. 2023, arXiv 2306.09305)."""

import jax
import jax.numpy as jnp
from flax import nnx

from micro_dit.models.blocks import DiTBlock, FinalLayer, NormedProjection, rematerialized
from micro_dit.models.config import DiTConfig
from micro_dit.models.embeddings import position_table
from micro_dit.models.layers import (
    normal_init,
)
from micro_dit.models.masking import TokenMask, restore_tokens


class Decoder(nnx.Module):
    """MaskDiT's decoder: back to all tokens, a learned one in place of each that was dropped: (B, K, D) → (B, N, G).

    Zheng et al. 2023, arXiv 2306.09305, figure 1; shape and initialization as in its release (Anima-Lab/MaskDiT), but
    of this network's blocks, which attend to the caption.
    """

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, G = config.dim, config.decoder_dim
        self.dtype = dtype
        self.positions = (G, config.grid, config.pos_interp_scale)
        self.proj_in = FinalLayer(D, G, config, dtype=dtype, rngs=rngs)
        self.caption_in = NormedProjection(D, G, config, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(normal_init(0.02)(rngs.params(), (G,), jnp.float32))
        self.blocks = nnx.List([DiTBlock(shape, config, dtype=dtype, rngs=rngs) for shape in config.decoder_blocks()])

    def __call__(self, x: jax.Array, y: jax.Array, c: jax.Array, mask: TokenMask | None, remat: str) -> jax.Array:
        """x (B, K, D) tokens, all N if `mask` is None, y (B, L, D) caption, c (B, D) conditioning."""
        x, y = self.proj_in(x, c), self.caption_in(y)  # (B, K, G), (B, L, G)
        if mask is not None:
            x = restore_tokens(x, mask, fill=self.mask_token[...])  # (B, N, G)
        x = x + jnp.asarray(position_table(*self.positions), self.dtype)
        for block in self.blocks:
            x = rematerialized(block, remat)(x, y, c)
        return x
