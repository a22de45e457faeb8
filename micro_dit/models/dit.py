"""MicroDiT, the network: patch mixer, deferred masking, layer-wise-scaled backbone.

"Stretching Each Dollar: Diffusion Training from Scratch on a Micro-Budget" (arXiv 2407.15811), whose steps are numbered
in the comments of `MicroDiT.__call__`.

B images · H W latent rows, columns · C latent channels · N tokens · K kept tokens · D backbone width · M mixer width ·
G decoder width · L caption tokens · Y caption channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from micro_dit.models.blocks import CaptionBlock, DiTBlock, FinalLayer, NormedProjection
from micro_dit.models.config import DiTConfig
from micro_dit.models.embeddings import (
    CaptionMLP,
    NoiseEmbedding,
    PatchEmbedding,
    position_table,
    rotary_table,
    unpatchify,
)
from micro_dit.models.fusion import FusionDecoder
from micro_dit.models.layers import Constrain, unconstrained
from micro_dit.models.maskdit import MaskDiTDecoder
from micro_dit.models.masking import TokenMask, drop_tokens, restore_tokens

Params = dict[str, jax.Array]  # one flat dict: "blocks.3.attn.qkv.kernel" → array


class MicroDiT(nnx.Module):
    """The denoising network F, from noisy latents, noise level and caption to a prediction of the latents' shape."""

    def __init__(
        self, config: DiTConfig, *, remat: str = "none", constrain: Constrain = unconstrained,
        dtype: Any = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        """Initializes the network as the public release does; the arguments are those of `bind`."""
        self.config, self.constrain, self.dtype = config, constrain, jnp.dtype(dtype)
        D, M, eps = config.dim, config.patch_mixer_dim, config.norm_eps
        args: dict[str, Any] = dict(dtype=self.dtype, rngs=rngs)
        block_args = args | dict(remat=remat, constrain=constrain)
        self.patch_embedding = PatchEmbedding(config.patch_size, config.in_channels, D, **args)
        self.noise_embedding = NoiseEmbedding(D, **args)
        self.caption_projection = CaptionMLP(config.caption_channels, D, eps=eps, **args)
        self.caption_block = CaptionBlock(config, **args)
        self.pooled_caption = CaptionMLP(D, D, eps=eps, **args)
        self.project_mixer = config.use_patch_mixer and M != D
        if self.project_mixer:
            self.mixer_in = NormedProjection(D, M, config, **args)
            self.mixer_caption_in = NormedProjection(D, M, config, **args)
            self.mixer_out = NormedProjection(M, D, config, **args)
        self.mixer = nnx.List([DiTBlock(shape, config, **block_args) for shape in config.mixer_blocks()])
        self.blocks = nnx.List([DiTBlock(shape, config, **block_args) for shape in config.backbone_blocks()])
        if config.fusion:
            self.fusion = FusionDecoder(config, **block_args)
        elif config.decoder_depth:
            self.decoder = MaskDiTDecoder(config, **block_args)
        patch = config.patch_size**2 * config.in_channels
        self.final_layer = FinalLayer(config.decoder_dim or D, patch, config, **args)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        mask: TokenMask | None = None,
        mask_position: str = "after_mixer",
        path_drop: jax.Array | None = None,
        shallow: bool = False,
    ) -> jax.Array:
        """Computes F(x, t, y), (B, H, W, C) float32.

        Args:
            x: (B, H, W, C) latents, already multiplied by c_in.
            t: (B,) or (1,) c_noise.
            y: (B, L, Y) caption embedding; all zeros is the unconditional input.
            mask: Tokens to keep; None keeps all. Dropped patches are zeros in the output, unless there is a decoder.
            mask_position: "after_mixer" (deferred masking) or "before_mixer" (naive masking).
            path_drop: (B,) bool, images that skip the backbone; needs `fusion`.
            shallow: Whether all images skip the backbone, which is then not computed; needs `fusion`.
        """
        config, dtype, constrain = self.config, self.dtype, self.constrain
        B, H, W, _ = x.shape
        # 1. Patch embedding and positions.
        x = self.patch_embedding(x.astype(dtype))  # (B, N, D)
        x = constrain(x + jnp.asarray(position_table(config.dim, config.grid, config.pos_interp_scale), dtype), "BND")
        rotary = kept_rotary = None
        if config.rope:
            table = rotary_table(config.head_dim, config.grid, config.pos_interp_scale)
            rotary = kept_rotary = jnp.broadcast_to(table, (B, *table.shape))  # (B, N, h)
            if mask is not None:
                kept_rotary = drop_tokens(rotary, mask)  # (B, K, h)
        # 2. Noise embedding.
        noise = self.noise_embedding(jnp.broadcast_to(t, (B,)))  # (B, D)
        # 3, 4. Caption projection and caption block.
        y = constrain(self.caption_block(self.caption_projection(y.astype(dtype))), "BLD")
        # 5. Pooled caption: the mean over all L tokens, padding included.
        c = constrain(noise + self.pooled_caption(y.mean(axis=1)), "BD")

        if mask is not None and mask_position == "before_mixer":
            x = drop_tokens(x, mask)  # (B, K, D)
        # 6. Patch mixer, on all N tokens.
        mixer_y = y
        if self.project_mixer:
            x, mixer_y = self.mixer_in(x), self.mixer_caption_in(y)  # (B, N, M), (B, L, M)
        for block in self.mixer:
            x = constrain(block(x, mixer_y, c, kept_rotary if mask_position == "before_mixer" else rotary), "BNM")
        mixed, deep = x, None
        if not shallow:
            # 7. Deferred masking.
            if mask is not None and mask_position == "after_mixer":
                x = drop_tokens(x, mask)  # (B, K, M)
            if self.project_mixer:
                x = self.mixer_out(x)  # 8. Back to the backbone's width, after the drop: (B, K, D).
            # 9. Backbone, on the kept tokens.
            for block in self.blocks:
                x = constrain(block(x, y, c, kept_rotary), "BKD")
            deep = x
        # 10. Dense residual: all tokens again, the mixer's output added to the backbone's.
        if config.fusion:
            x = constrain(self.fusion(deep, mixed, y, c, mask, path_drop, rotary), "BNG")
        elif config.decoder_depth:
            x = constrain(self.decoder(x, y, c, mask, rotary), "BNG")  # MaskDiT, for comparison.
        x = self.final_layer(x, c).astype(jnp.float32)  # 11. Final layer: (B, K, p·p·C).
        # 12. Zeros where tokens were dropped, then back to an image.
        if mask is not None and not config.decoder_depth:
            x = restore_tokens(x, mask)  # (B, N, p·p·C)
        return unpatchify(x, config.patch_size, H, W)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


@functools.lru_cache(maxsize=16)
def _skeleton(
    config: DiTConfig, dtype: Any = jnp.float32, remat: str = "none", constrain: Constrain = unconstrained
) -> tuple[nnx.GraphDef, dict[str, tuple[tuple[Any, ...], Any]]]:
    """Returns the structure of the network, and the path and abstract value of each parameter by name.

    Building XL takes seconds, hence the cache.
    """
    model = nnx.eval_shape(lambda: MicroDiT(config, remat=remat, constrain=constrain, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    return graphdef, {_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(abstract)}


def init_params(config: DiTConfig, key: jax.Array) -> Params:
    """Initializes float32 parameters as the public release does; can be jitted."""
    model = MicroDiT(config, rngs=nnx.Rngs(params=key))
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def abstract_params(config: DiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns names, shapes and dtypes of the parameters without allocating them."""
    leaves = _skeleton(config)[1].items()
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, (_, leaf) in leaves}


def bind(
    config: DiTConfig, params: Params, dtype: Any = jnp.float32, remat: str = "none",
    constrain: Constrain = unconstrained,
) -> MicroDiT:  # fmt: skip
    """Returns the network with these parameters; cheap enough to call while tracing.

    Matrix products run in `dtype`. `remat`, one of REMAT (see `DiTBlock`), saves memory in the backward pass and
    changes results only by rounding. `constrain` shards activations at the boundaries of blocks and experts.

    Raises:
        ValueError: A parameter is missing or superfluous.
    """
    graphdef, leaves = _skeleton(config, dtype, remat, constrain)
    if differing := leaves.keys() ^ params.keys():
        raise ValueError(f"parameters differ from the network's: {sorted(differing)[:10]}")
    state = nnx.from_flat_state((path, leaf.replace(params[name])) for name, (path, leaf) in leaves.items())
    return nnx.merge(graphdef, state)
