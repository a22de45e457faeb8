"""The blocks that the network stacks: caption block, DiT block, final layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from micro_dit.models.config import BlockShape, DiTConfig
from micro_dit.models.layers import (
    PRODUCT,
    CrossAttention,
    SelfAttention,
    SwiGLU,
    layer_norm,
    linear,
    modulate,
)
from micro_dit.models.moe import ExpertChoiceFFN


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
