"""Model FLOPs of the network: 2 × MACs of its matrix products. Other operations are not counted, as is usual.

N tokens · K kept tokens · T tokens a block sees · D backbone width · M mixer width · G decoder width · d block width ·
F hidden width · L caption tokens · E experts.
"""

from micro_dit.models.config import BlockShape, DiTConfig, swiglu_width, tokens_per_expert
from micro_dit.models.masking import kept_tokens


def forward_flops(
    config: DiTConfig,
    mask_ratio: float = 0.0,
    caption_tokens: int = 77,
    mask_position: str = "after_mixer",
    one_hot_dispatch: bool = False,
) -> dict[str, int]:
    """Counts FLOPs of one image's forward pass, by part; the total is the sum of the values.

    Each stack of blocks has three entries: "mixer" (Linear layers), "mixer/attention" (the two products of scaled
    dot-product attention) and "mixer/dispatch" (one-hot products of the experts, 0 unless asked for).

    With `one_hot_dispatch`, dispatch and combine are products with one-hot matrices, as in the public release. This
    implementation uses gathers and scatter-adds, which have no products.

    Raises:
        UserError: No such network can be built.
    """
    config.check(mask_ratio, mask_position)
    D, M, L = config.dim, config.patch_mixer_dim, caption_tokens
    N, K = config.tokens, kept_tokens(config.tokens, mask_ratio)
    in_mixer = K if mask_position == "before_mixer" else N
    patch = config.patch_size**2 * config.in_channels
    projected = config.use_patch_mixer and M != D
    caption_hidden = swiglu_width(D, 4.0, config.multiple_of)

    parts = {
        "patch_embedding": _linear(N, patch, D),
        "noise_embedding": _linear(1, 512, D) + _linear(1, D, D),
        "caption_projection": _linear(L, config.caption_channels, D) + _linear(L, D, D),
        "caption_block": _linear(L, D, 4 * D) + _linear(L, D, 3 * caption_hidden),
        "caption_block/attention": _attention(L, L, D),
        "pooled_caption": 2 * _linear(1, D, D),
        "mixer_in": projected * _linear(in_mixer, D, M),
        "mixer_caption_in": projected * _linear(L, D, M),
        "mixer_out": projected * _linear(K, M, D),
        "final_layer": _linear(1, D, 2 * D) + _linear(K, D, patch),
    }
    stacks = [("mixer", config.mixer_blocks(), in_mixer), ("backbone", config.backbone_blocks(), K)]
    if config.decoder_depth:
        G = config.decoder_dim
        parts["decoder_in"] = _linear(K, D, G) + _linear(L, D, G)
        parts["decoder_in"] += _linear(N, M, G) if config.fusion else _linear(1, D, 2 * D)
        parts["final_layer"] = _linear(1, D, 2 * G) + _linear(N, G, patch)
        stacks.append(("decoder", config.decoder_blocks(), N))
    for name, blocks, T in stacks:
        parts[name] = sum(_block(block, config, T, L) for block in blocks)
        parts[f"{name}/attention"] = sum(
            _attention(T, T, block.attention_width) + _attention(T, L, block.dim) for block in blocks
        )
        parts[f"{name}/dispatch"] = one_hot_dispatch * sum(_dispatch(b, config, T) for b in blocks if b.moe)
    return parts


def training_flops(
    config: DiTConfig,
    mask_ratio: float = 0.0,
    caption_tokens: int = 77,
    mask_position: str = "after_mixer",
    one_hot_dispatch: bool = False,
) -> int:
    """Counts FLOPs of training on one image, once forward and twice backward; arguments as of `forward_flops`."""
    return 3 * sum(forward_flops(config, mask_ratio, caption_tokens, mask_position, one_hot_dispatch).values())


def _linear(rows: int, features: int, out: int) -> int:
    return 2 * rows * features * out


def _attention(queries: int, keys: int, width: int) -> int:
    """q·kᵀ and the weighted sum of v, all heads together."""
    return 2 * _linear(queries, keys, width)


def _block(block: BlockShape, config: DiTConfig, T: int, L: int) -> int:
    d, w, F = block.dim, block.attention_width, block.hidden_width
    modulation = _linear(1, config.dim, 6 * d)
    self_attention = _linear(T, d, 3 * w) + _linear(T, w, d)
    cross_attention = _linear(T, d, d) + _linear(L, d, 2 * d) + _linear(T, d, d)
    if block.moe:
        taken = config.num_experts * tokens_per_expert(T, config.num_experts, config.expert_capacity)
        feed_forward = _linear(T, d, config.num_experts) + 2 * _linear(taken, d, F)  # router, then w1 and w2
    else:
        feed_forward = 3 * _linear(T, d, F)
    return modulation + self_attention + cross_attention + feed_forward


def _dispatch(block: BlockShape, config: DiTConfig, T: int) -> int:
    """Dispatch and combine as two products with an (E·tokens per expert, T) one-hot matrix."""
    taken = config.num_experts * tokens_per_expert(T, config.num_experts, config.expert_capacity)
    return 2 * _linear(taken, T, block.dim)
