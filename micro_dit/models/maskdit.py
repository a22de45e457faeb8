"""MaskDiT's decoder, for comparison (Zheng et al. 2023, arXiv 2306.09305)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from micro_dit.models.blocks import DiTBlock, FinalLayer, NormedProjection
from micro_dit.models.config import DiTConfig
from micro_dit.models.embeddings import position_table
from micro_dit.models.layers import Constrain, normal_init
from micro_dit.models.masking import TokenMask, restore_tokens


class MaskDiTDecoder(nnx.Module):
    """MaskDiT's decoder, which returns to all tokens with a learned one for each dropped: (B, K, D) → (B, N, G).

    See figure 1 of the paper. Shape and initialization are those of its release (Anima-Lab/MaskDiT), but the blocks are
    this network's, which attend to the caption.
    """

    def __init__(self, config: DiTConfig, *, remat: str, constrain: Constrain, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, G = config.dim, config.decoder_dim
        self.dtype = dtype
        self.positions = (G, config.grid, config.pos_interp_scale)
        self.proj_in = FinalLayer(D, G, config, dtype=dtype, rngs=rngs)
        self.caption_in = NormedProjection(D, G, config, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(normal_init(0.02)(rngs.params(), (G,), jnp.float32))
        block = functools.partial(DiTBlock, config=config, remat=remat, constrain=constrain, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([block(shape) for shape in config.decoder_blocks()])

    def __call__(
        self, x: jax.Array, y: jax.Array, c: jax.Array, mask: TokenMask | None, rotary: jax.Array | None = None
    ) -> jax.Array:
        """Decodes the kept tokens x (B, K, D), all N if `mask` is None, given caption y (B, L, D) and c (B, D).

        `rotary` is (B, N, h), rotary position embeddings, or None for a network without them.
        """
        x, y = self.proj_in(x, c), self.caption_in(y)  # (B, K, G), (B, L, G)
        if mask is not None:
            x = restore_tokens(x, mask, fill=self.mask_token[...])  # (B, N, G)
        x = x + jnp.asarray(position_table(*self.positions), self.dtype)
        for block in self.blocks:
            x = block(x, y, c, rotary)
        return x
