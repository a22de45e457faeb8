"""The network's configuration: widths, depths, and the table of published sizes."""

import dataclasses
from typing import Any

import numpy as np

from micro_dit.errors import UserError
from micro_dit.models.masking import kept_tokens

MASK_POSITIONS = ("after_mixer", "before_mixer")  # deferred masking; naive masking
REMAT = ("none", "dots", "full")  # what the backward pass recomputes; see `micro_dit.models.blocks.DiTBlock`


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The network's configuration, with the fields of the public release.

    A multiplier list shorter than the depth covers depth/len consecutive blocks with each of its values. The release
    has no decoder: that is MaskDiT's, for comparison, or with `fusion` that of the dense residual.

    Raises:
        UserError: No such network can be built.
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
    rope: bool = False  # whether self-attention of image tokens has 2-D rotary position embeddings
    fusion: bool = False  # whether the decoder adds the mixer's output, of all tokens, to the backbone's

    def __post_init__(self) -> None:
        if self.input_size % self.patch_size:
            raise UserError(f"model.input_size {self.input_size} is not a multiple of patch_size {self.patch_size}.")
        if self.decoder_depth < 0 or (self.decoder_depth > 0) != (self.decoder_dim > 0):
            depth, dim = self.decoder_depth, self.decoder_dim
            raise UserError(f"model.decoder_depth is {depth} and model.decoder_dim is {dim}. Set both, or neither.")
        if self.fusion and not (self.use_patch_mixer and self.decoder_depth):
            raise UserError("model.fusion needs a patch mixer and a decoder. Set model.decoder_depth and decoder_dim.")
        for name in ("dim", "patch_mixer_dim", "decoder_dim"):
            if (dim := getattr(self, name)) % self.head_dim or dim % 4:
                raise UserError(f"model.{name} {dim} must be a multiple of head_dim {self.head_dim} and of 4.")
        for name in ("qkv_multipliers", "ffn_multipliers"):
            values = getattr(self, name)
            if not values or self.depth % len(values):
                raise UserError(f"model.{name} has {len(values)} values, but the depth {self.depth} is not a multiple.")

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of an image, N."""
        return self.grid**2

    def check(self, mask_ratio: float = 0.0, mask_position: str = "after_mixer") -> None:
        """Raises UserError if masking would drop all tokens, or if experts would process no tokens or too many."""
        if mask_position not in MASK_POSITIONS:
            raise UserError(f"mask_position {mask_position!r} is unknown. Use one of {', '.join(MASK_POSITIONS)}.")
        if not 0.0 <= mask_ratio < 1.0 or int(self.tokens * (1 - mask_ratio)) < 1:
            raise UserError(
                f"mask_ratio {mask_ratio} keeps none of the {self.tokens} tokens, or is outside [0, 1). Decrease it."
            )
        if self.fusion and mask_position != "after_mixer":
            raise UserError("model.fusion needs mask_position 'after_mixer': its mixer sees all tokens.")
        kept = kept_tokens(self.tokens, mask_ratio)
        in_mixer = kept if mask_position == "before_mixer" else self.tokens
        parts = (("mixer", in_mixer, self.mixer_blocks()), ("backbone", kept, self.backbone_blocks()))
        for part, tokens, blocks in parts:
            T = tokens_per_expert(tokens, self.num_experts, self.expert_capacity)
            if any(block.moe for block in blocks) and not 1 <= T <= tokens:
                raise UserError(
                    f"Each expert of the {part} would process int({self.expert_capacity}·{tokens}/{self.num_experts}) "
                    f"= {T} of {tokens} tokens. Change model.expert_capacity, model.num_experts or mask_ratio so that "
                    f"it processes 1 to {tokens}."
                )

    def mixer_blocks(self) -> tuple["BlockShape", ...]:
        """Returns the shapes of the patch mixer's blocks."""
        if not self.use_patch_mixer:
            return ()
        dim, qkv, mlp = self.patch_mixer_dim, self.patch_mixer_qkv_ratio, self.patch_mixer_mlp_ratio
        return tuple(
            self._block(dim, qkv, mlp, moe=i >= 1 and (i + 1) % self.experts_every_n == 0, scale=self.depth)
            for i in range(self.patch_mixer_depth)
        )

    def backbone_blocks(self) -> tuple["BlockShape", ...]:
        """Returns the shapes of the backbone's blocks.

        By layer-wise scaling, each block has its own attention and feed-forward widths. The last block is never MoE.
        """
        return tuple(
            self._block(
                self.dim,
                self.qkv_multipliers[i * len(self.qkv_multipliers) // self.depth],
                self.ffn_multipliers[i * len(self.ffn_multipliers) // self.depth],
                moe=i <= self.depth - 2 and (i + 1) % self.experts_every_n == 0,
                scale=i + 1 if self.depth_init else self.depth,
            )
            for i in range(self.depth)
        )

    def decoder_blocks(self) -> tuple["BlockShape", ...]:
        """Returns the shapes of the decoder's blocks: all of one width, without experts."""
        return (self._block(self.decoder_dim, 1.0, 4.0, moe=False, scale=self.depth),) * self.decoder_depth

    def _block(self, dim: int, qkv_ratio: float, mlp_ratio: float, *, moe: bool, scale: int) -> "BlockShape":
        attention = dim if qkv_ratio == 1 else round_up(int(dim * qkv_ratio), 2 * self.head_dim)
        hidden = (expert_width if moe else swiglu_width)(dim, mlp_ratio, self.multiple_of)
        return BlockShape(dim, attention, hidden, moe, float(0.02 / np.sqrt(2 * scale)))


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The widths of one DiT block, and the standard deviation that initializes its residual writers."""

    dim: int
    attention_width: int
    hidden_width: int
    moe: bool
    out_std: float


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def swiglu_width(dim: int, ratio: float, multiple_of: int) -> int:
    """Returns the hidden width of a dense feed-forward: int(2·int(d·ratio)/3), rounded up to `multiple_of`."""
    return round_up(int(2 * int(dim * ratio) / 3), multiple_of)


def expert_width(dim: int, ratio: float, multiple_of: int) -> int:
    """Returns the hidden width of an expert: int(d·ratio), rounded up to `multiple_of`."""
    return round_up(int(dim * ratio), multiple_of)


def tokens_per_expert(tokens: int, experts: int, capacity: float) -> int:
    """Returns T = int(capacity·N/E). With T = 0 a layer would output zeros, which `DiTConfig.check` rejects."""
    return int(capacity * tokens / experts)


def _layer_wise(depth: int) -> dict[str, tuple[float, ...]]:
    ends = {"qkv_multipliers": 1.0, "ffn_multipliers": 4.0}
    return {name: tuple(np.linspace(0.5, end, depth).tolist()) for name, end in ends.items()}


# fmt: off
SIZES: dict[str, dict[str, Any]] = {
    "Nano":            dict(depth=6,  dim=128,  head_dim=32, patch_mixer_depth=2, patch_mixer_dim=128,  multiple_of=32, **_layer_wise(6)),  # noqa: E501
    "MicroDiT_Tiny_2": dict(depth=16, dim=512,  head_dim=32, patch_mixer_depth=4, patch_mixer_dim=512,  **_layer_wise(16)),  # noqa: E501
    "MicroDiT_XL_2":   dict(depth=28, dim=1024, head_dim=64, patch_mixer_depth=6, patch_mixer_dim=768,  **_layer_wise(28)),  # noqa: E501
}
# fmt: on


def make_config(size: str, **overrides: Any) -> DiTConfig:
    """Returns the config of a published size, with overrides.

    Raises:
        UserError: The size or a field is unknown, or no such network can be built.
    """
    if size not in SIZES:
        raise UserError(f"model.size {size!r} is unknown. Use one of {', '.join(SIZES)}.")
    known = {field.name for field in dataclasses.fields(DiTConfig)}
    if unknown := sorted(set(overrides) - known):
        raise UserError(f"model has no field {', '.join(unknown)}. The fields are {', '.join(sorted(known))}.")
    scaling = _layer_wise(overrides["depth"]) if overrides.get("depth") else {}
    return DiTConfig(**SIZES[size] | scaling | overrides)
