"""MicroDiT, the network: patch mixer, deferred masking, layer-wise-scaled backbone.

"Stretching Each Dollar: Diffusion Training from Scratch on a Micro-Budget" (arXiv 2407.15811). Images are (B, H, W, C).
The numbers in the comments of `MicroDiT.__call__` are the steps of the method as the paper and its release take them.

B images · H W latent rows, columns · C latent channels · N tokens · K kept tokens · D backbone width · M mixer width ·
G decoder width · L caption tokens · Y caption channels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from micro_dit.errors import UserError
from micro_dit.models.embeddings import CaptionMLP, NoiseEmbedding, PatchEmbedding, position_table, unpatchify
from micro_dit.models.layers import (
    PRODUCT,
    CrossAttention,
    Product,
    SelfAttention,
    SwiGLU,
    layer_norm,
    linear,
    modulate,
    normal_init,
    round_up,
    row_product,
)
from micro_dit.models.masking import TokenMask, drop_tokens, kept_tokens, restore_tokens
from micro_dit.models.moe import Constrain, ExpertChoiceFFN, anywhere, tokens_per_expert
from micro_dit.models.quantization import quantized

Params = dict[str, jax.Array]  # one flat dict: "blocks.3.attn.qkv.kernel" → array


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Everything the network's constructor takes; the fields are those of the public release.

    A multiplier list shorter than the depth covers depth/len consecutive blocks with each of its values. The release
    has no decoder: that is MaskDiT's, for comparison.
    """

    input_size: int  # latent rows = columns
    dim: int
    depth: int
    head_dim: int
    patch_mixer_depth: int
    patch_mixer_dim: int
    qkv_multipliers: tuple[float, ...]
    ffn_multipliers: tuple[float, ...]
    patch_size: int = 2
    in_channels: int = 4
    multiple_of: int = 256
    caption_channels: int = 1024
    pos_interp_scale: float = 1.0
    norm_eps: float = 1e-6
    depth_init: bool = True
    use_patch_mixer: bool = True
    patch_mixer_qkv_ratio: float = 1.0
    patch_mixer_mlp_ratio: float = 4.0
    use_bias: bool = False
    num_experts: int = 8
    expert_capacity: float = 2.0
    experts_every_n: int = 2
    decoder_depth: int = 0
    decoder_dim: int = 0

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid**2

    def check(self, mask_ratio: float = 0.0, mask_position: str = "after_mixer") -> None:
        """Raises UserError if no such network can be built, or if masking would leave a part of it empty."""
        if self.input_size % self.patch_size:
            raise UserError(f"model.input_size {self.input_size} is not a multiple of patch_size {self.patch_size}.")
        if self.decoder_depth < 0 or (self.decoder_depth > 0) != (self.decoder_dim > 0):
            raise UserError(
                f"model.decoder_depth {self.decoder_depth} with decoder_dim {self.decoder_dim}: give both, or neither."
            )
        for name in ("dim", "patch_mixer_dim", "decoder_dim"):
            if getattr(self, name) % self.head_dim or getattr(self, name) % 4:
                raise UserError(
                    f"model.{name} {getattr(self, name)} must be a multiple of head_dim {self.head_dim} and of 4."
                )
        for name in ("qkv_multipliers", "ffn_multipliers"):
            values = getattr(self, name)
            if not values or self.depth % len(values):
                raise UserError(f"model.{name} has {len(values)} values, which do not divide the depth {self.depth}.")
        if mask_position not in MASK_POSITIONS:
            raise UserError(f"mask_position {mask_position!r} is unknown; use one of {', '.join(MASK_POSITIONS)}.")
        if not 0.0 <= mask_ratio < 1.0 or int(self.tokens * (1 - mask_ratio)) < 1:
            raise UserError(
                f"mask_ratio {mask_ratio} keeps none of the {self.tokens} tokens (or is outside [0, 1)); lower it."
            )
        kept = kept_tokens(self.tokens, mask_ratio)
        in_mixer = kept if mask_position == "before_mixer" else self.tokens
        parts = (("mixer", in_mixer, self.mixer_blocks()), ("backbone", kept, self.backbone_blocks()))
        for part, tokens, blocks in parts:
            T = tokens_per_expert(tokens, self.num_experts, self.expert_capacity)
            if any(block.moe for block in blocks) and not 1 <= T <= tokens:
                raise UserError(
                    f"each expert of the {part} would take int({self.expert_capacity}·{tokens}/{self.num_experts}) = "
                    f"{T} of {tokens} tokens: change model.expert_capacity, model.num_experts or mask_ratio so that it "
                    f"takes 1 to {tokens}."
                )

    def mixer_blocks(self) -> tuple["BlockShape", ...]:
        if not self.use_patch_mixer:
            return ()
        return tuple(
            self._block(
                self.patch_mixer_dim, self.patch_mixer_qkv_ratio, self.patch_mixer_mlp_ratio,
                moe=i >= 1 and (i + 1) % self.experts_every_n == 0,
                out_std=0.02 / np.sqrt(2 * self.depth),
            )
            for i in range(self.patch_mixer_depth)
        )  # fmt: skip

    def backbone_blocks(self) -> tuple["BlockShape", ...]:
        """Layer-wise scaling: block i has its own attention and feed-forward widths. The last block is never MoE."""
        return tuple(
            self._block(
                self.dim,
                self.qkv_multipliers[i * len(self.qkv_multipliers) // self.depth],
                self.ffn_multipliers[i * len(self.ffn_multipliers) // self.depth],
                moe=i <= self.depth - 2 and (i + 1) % self.experts_every_n == 0,
                out_std=0.02 / np.sqrt(2 * (i + 1 if self.depth_init else self.depth)),
            )
            for i in range(self.depth)
        )

    def decoder_blocks(self) -> tuple["BlockShape", ...]:
        """MaskDiT's decoder has blocks of one width, without experts."""
        out_std = 0.02 / np.sqrt(2 * self.depth)
        return (self._block(self.decoder_dim, 1.0, 4.0, moe=False, out_std=out_std),) * self.decoder_depth

    def _block(self, dim: int, qkv_ratio: float, mlp_ratio: float, *, moe: bool, out_std: float) -> "BlockShape":
        attention = dim if qkv_ratio == 1 else round_up(int(dim * qkv_ratio), 2 * self.head_dim)
        hidden_width = ExpertChoiceFFN.hidden_width if moe else SwiGLU.hidden_width
        return BlockShape(dim, attention, hidden_width(dim, mlp_ratio, self.multiple_of), moe, float(out_std))


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The widths of one DiT block, and the standard deviation its residual writers are initialized with."""

    dim: int
    attention_width: int
    hidden_width: int
    moe: bool
    out_std: float


MASK_POSITIONS = ("after_mixer", "before_mixer")  # deferred masking; naive masking
REMAT = ("none", "dots", "full")  # what the backward pass computes again; see `rematerialized`


def _layer_wise(depth: int) -> dict[str, tuple[float, ...]]:
    return {
        "qkv_multipliers": tuple(np.linspace(0.5, 1.0, depth).tolist()),
        "ffn_multipliers": tuple(np.linspace(0.5, 4.0, depth).tolist()),
    }


# fmt: off
SIZES: dict[str, dict[str, Any]] = {
    "Nano":            dict(depth=6,  dim=128,  head_dim=32, patch_mixer_depth=2, patch_mixer_dim=128,  multiple_of=32, **_layer_wise(6)),  # noqa: E501
    "MicroDiT_Tiny_2": dict(depth=16, dim=512,  head_dim=32, patch_mixer_depth=4, patch_mixer_dim=512,  **_layer_wise(16)),  # noqa: E501
    "MicroDiT_XL_2":   dict(depth=28, dim=1024, head_dim=64, patch_mixer_depth=6, patch_mixer_dim=768,  **_layer_wise(28)),  # noqa: E501
}
# fmt: on


def make_config(size: str, **overrides: Any) -> DiTConfig:
    """A row of the table of sizes, with some fields set or replaced; UserError lists the known sizes and fields."""
    if size not in SIZES:
        raise UserError(f"model size {size!r} is unknown; use one of {', '.join(SIZES)}.")
    known = {field.name for field in dataclasses.fields(DiTConfig)}
    if unknown := sorted(set(overrides) - known):
        raise UserError(f"model has no field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}.")
    values = SIZES[size] | overrides
    if overrides.get("depth"):
        values = values | {k: v for k, v in _layer_wise(values["depth"]).items() if k not in overrides}
    return DiTConfig(**values)


class CaptionBlock(nnx.Module):
    """Pre-norm self-attention, then pre-norm SwiGLU, over the caption's tokens: (B, L, D) → (B, L, D).

    Starts as the identity: its residual writers are zero.
    """

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        dim, eps, bias = config.dim, config.norm_eps, config.use_bias
        hidden = SwiGLU.hidden_width(dim, 4.0, config.multiple_of)
        zeros = nnx.initializers.zeros_init()
        self.norm1 = layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(
            dim, dim, config.head_dim, use_bias=bias, eps=eps, out_std=0.0, dtype=dtype, rngs=rngs
        )
        self.norm2 = layer_norm(dim, eps=eps, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(dim, hidden, use_bias=bias, out_std=0.02, dtype=dtype, rngs=rngs)
        self.mlp.w3.kernel[...] = zeros(rngs.params(), (hidden, dim), jnp.float32)

    def __call__(self, y: jax.Array) -> jax.Array:
        y = y + self.attn(self.norm1(y))
        return y + self.mlp(self.norm2(y))


class DiTBlock(nnx.Module):
    """Self-attention, cross-attention to the caption, feed-forward; modulated by c (adaLN): (B, T, d) → (B, T, d)."""

    def __init__(self, shape: BlockShape, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, eps, bias, out_std = shape.dim, config.norm_eps, config.use_bias, shape.out_std
        self.norm1 = layer_norm(d, eps=eps, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(
            d, shape.attention_width, config.head_dim, use_bias=bias, eps=eps, out_std=out_std, dtype=dtype, rngs=rngs
        )
        self.norm2 = layer_norm(d, eps=eps, dtype=dtype, rngs=rngs)
        self.cross_attn = CrossAttention(
            d, config.head_dim, use_bias=bias, eps=eps, out_std=out_std, dtype=dtype, rngs=rngs
        )
        self.norm3 = layer_norm(d, eps=eps, dtype=dtype, rngs=rngs)
        F, E, capacity = shape.hidden_width, config.num_experts, config.expert_capacity
        self.mlp = (
            ExpertChoiceFFN(d, F, E, capacity, out_std=out_std, dtype=dtype, rngs=rngs)
            if shape.moe
            else SwiGLU(d, F, use_bias=bias, out_std=out_std, dtype=dtype, rngs=rngs)
        )
        self.adaln = linear(config.dim, 6 * d, kernel_init=nnx.initializers.zeros_init(), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, y: jax.Array, c: jax.Array) -> jax.Array:
        """x (B, T, d) tokens, y (B, L, d) caption, c (B, D) conditioning."""
        modulation = self.adaln(jax.nn.gelu(c, approximate=True))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(modulation, 6, axis=-1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + self.cross_attn(self.norm2(x), y)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm3(x), shift_mlp, scale_mlp))


def rematerialized(block: DiTBlock, remat: str) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The block, of whose activations the backward pass keeps only some and computes the others again.

    Args:
        block: a block of the network.
        remat: "none" keeps all activations, "dots" the products with weights (so that attention's probabilities and
            everything elementwise are computed again), "full" only the block's inputs.
    """
    if remat == "none":
        return block
    dots = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    return jax.checkpoint(lambda x, y, c: block(x, y, c), policy=dots if remat == "dots" else None)


def quantize_block(block: DiTBlock, multiply: Product) -> None:
    """Has a block's attention and feed-forward multiply with their weights by another product."""
    layers = [block.attn.qkv, block.attn.proj, block.cross_attn.q, block.cross_attn.kv, block.cross_attn.proj]
    if isinstance(block.mlp, ExpertChoiceFFN):
        block.mlp.multiply = multiply
    else:
        layers += [block.mlp.w1, block.mlp.w2, block.mlp.w3]
    for layer in layers:
        layer.dot_general = functools.partial(row_product, multiply=multiply)


class FinalLayer(nnx.Module):
    """Modulated LayerNorm and a Linear, to the pixels of a patch or to the decoder: (B, T, d) → (B, T, out).

    Starts at zero.
    """

    def __init__(self, dim: int, out: int, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.adaln = linear(config.dim, 2 * dim, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(dim, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.linear = linear(dim, out, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.adaln(jax.nn.gelu(c, approximate=True)), 2, axis=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class NormedProjection(nnx.Module):
    """LayerNorm, then Linear: the way between the backbone's width and the mixer's."""

    def __init__(self, dim: int, out: int, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = layer_norm(dim, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.linear = linear(dim, out, use_bias=config.use_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x))


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


class MicroDiT(nnx.Module):
    """The denoising network F: noisy latents, noise level and caption in, a prediction of the latents' shape out."""

    def __init__(self, config: DiTConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), "none"
        self.constrain: Constrain = anywhere
        D, M, eps = config.dim, config.patch_mixer_dim, config.norm_eps
        args: dict[str, Any] = dict(dtype=self.dtype, rngs=rngs)
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
        self.mixer = nnx.List([DiTBlock(shape, config, **args) for shape in config.mixer_blocks()])
        self.blocks = nnx.List([DiTBlock(shape, config, **args) for shape in config.backbone_blocks()])
        if config.decoder_depth:
            self.decoder = Decoder(config, **args)
        patch = config.patch_size**2 * config.in_channels
        self.final_layer = FinalLayer(config.decoder_dim or D, patch, config, **args)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        mask: TokenMask | None = None,
        mask_position: str = "after_mixer",
    ) -> jax.Array:
        """F(x, t, y).

        Args:
            x: (B, H, W, C) latents, already multiplied by c_in.
            t: (B,) or (1,) c_noise.
            y: (B, L, Y) caption embedding; all zeros is the unconditional input.
            mask: the tokens to keep; None keeps all. Dropped patches come out as zeros, unless there is a decoder.
            mask_position: "after_mixer" (deferred masking) or "before_mixer" (naive masking, for comparison).

        Returns:
            (B, H, W, C) float32.
        """
        config, dtype, constrain = self.config, self.dtype, self.constrain
        B, H, W, _ = x.shape

        # 1. Patch embedding, and where each patch is.
        x = self.patch_embedding(x.astype(dtype))  # (B, N, D)
        x = constrain(x + jnp.asarray(position_table(config.dim, config.grid, config.pos_interp_scale), dtype), "BND")
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
            x = constrain(rematerialized(block, self.remat)(x, mixer_y, c), "BNM")
        # 7. Deferred masking.
        if mask is not None and mask_position == "after_mixer":
            x = drop_tokens(x, mask)  # (B, K, M)
        # 8. Back to the backbone's width, after the drop.
        if self.project_mixer:
            x = self.mixer_out(x)  # (B, K, D)
        # 9. Backbone, on the kept tokens.
        for block in self.blocks:
            x = constrain(rematerialized(block, self.remat)(x, y, c), "BKD")
        # In MaskDiT, for comparison, a decoder goes back to all tokens here.
        if config.decoder_depth:
            x = constrain(self.decoder(x, y, c, mask, self.remat), "BNG")
        # 10. Final layer.
        x = self.final_layer(x, c).astype(jnp.float32)  # (B, K, p·p·C)
        # 11. Zeros where tokens were dropped, then back to an image.
        if mask is not None and not config.decoder_depth:
            x = restore_tokens(x, mask)  # (B, N, p·p·C)
        return unpatchify(x, config.patch_size, H, W)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


@functools.lru_cache(maxsize=16)
def _skeleton(config: DiTConfig, dtype: Any) -> tuple[Any, tuple[tuple[tuple[Any, ...], Any], ...]]:
    """The network's structure and its abstract parameters by path; building it costs seconds for XL."""
    model = nnx.eval_shape(lambda: MicroDiT(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    return graphdef, tuple(nnx.to_flat_state(abstract))


def init_params(config: DiTConfig, key: jax.Array) -> Params:
    """Freshly initialized float32 parameters, as the public release initializes them. Can be jitted."""
    model = MicroDiT(config, rngs=nnx.Rngs(params=key))
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def abstract_params(config: DiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of the parameters, without making them."""
    _, leaves = _skeleton(config, jnp.float32)
    return {_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def bind(
    config: DiTConfig, params: Params, dtype: Any = jnp.float32, remat: str = "none", constrain: Constrain = anywhere,
    quantize: str = "",
) -> MicroDiT:  # fmt: skip
    """The network with these parameters; matrix products run in `dtype`. Cheap enough to call while tracing.

    `remat`, one of REMAT, saves memory in the backward pass; it changes no numbers but by rounding. `constrain` is
    called as (x, dimension letters) at the blocks' and the experts' boundaries and returns x, wherever it may live.
    `quantize`, one of `micro_dit.models.quantization.FORMATS`, has the blocks multiply with their weights in 8 bits;
    not adaLN, whose products are small, and not the router.

    Raises:
        ValueError: a parameter is missing or superfluous.
    """
    graphdef, leaves = _skeleton(config, dtype)
    if differing := {_name(path) for path, _ in leaves} ^ set(params):
        raise ValueError(f"parameters differ from the network's: {sorted(differing)[:10]}")
    model = nnx.merge(graphdef, nnx.from_flat_state((path, leaf.replace(params[_name(path)])) for path, leaf in leaves))
    model.remat, model.constrain = remat, constrain
    multiply = quantized(quantize) if quantize else None
    for block in (*model.mixer, *model.blocks, *(model.decoder.blocks if config.decoder_depth else ())):
        if isinstance(block.mlp, ExpertChoiceFFN):
            block.mlp.constrain = constrain
        if multiply:
            quantize_block(block, multiply)
    return model
