"""The blocks that the network stacks: caption block, DiT block, final layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from micro_dit.models.config import BlockShape, DiTConfig, swiglu_width
from micro_dit.models.layers import Constrain, CrossAttention, SelfAttention, SwiGLU, layer_norm, linear, modulate
from micro_dit.models.moe import ExpertChoiceFFN
from micro_dit.models.ops import PRODUCT


class CaptionBlock(nnx.Module):
    """Pre-norm self-attention, then pre-norm SwiGLU, over the caption's tokens: (B, L, D) → (B, L, D).

    Its residual writers start at zero, so the block starts as the identity.
    """

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        dim, eps, bias = config.dim, config.norm_eps, config.use_bias
        hidden = swiglu_width(dim, 4.0, config.multiple_of)
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
    """Self-attention, cross-attention to y (B, L, d), feed-forward; modulated by c (B, D): (B, T, d) → (B, T, d).

    `rotary` is (B, T, h), rotary position embeddings, or None. The backward pass recomputes activations that `remat`
    does not keep: "none" keeps all of them, "dots" the products with weights (attention and elementwise operations are
    recomputed), "full" only the inputs.
    """

    def __init__(
        self, shape: BlockShape, config: DiTConfig, *, remat: str, constrain: Constrain, dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.remat = remat
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
            ExpertChoiceFFN(d, F, E, capacity, out_std=out_std, constrain=constrain, dtype=dtype, rngs=rngs)
            if shape.moe
            else SwiGLU(d, F, use_bias=bias, out_std=out_std, dtype=dtype, rngs=rngs)
        )
        self.adaln = linear(config.dim, 6 * d, kernel_init=nnx.initializers.zeros_init(), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, y: jax.Array, c: jax.Array, rotary: jax.Array | None = None) -> jax.Array:
        if self.remat == "none":
            return self._forward(x, y, c, rotary)
        policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if self.remat == "dots" else None
        return jax.checkpoint(lambda *args: self._forward(*args), policy=policy)(x, y, c, rotary)

    def _forward(self, x: jax.Array, y: jax.Array, c: jax.Array, rotary: jax.Array | None) -> jax.Array:
        modulation = self.adaln(jax.nn.gelu(c, approximate=True))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(modulation, 6, axis=-1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotary)
        x = x + self.cross_attn(self.norm2(x), y)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm3(x), shift_mlp, scale_mlp))


class FinalLayer(nnx.Module):
    """A modulated LayerNorm and a Linear that starts at zero, to a patch or to the decoder: (B, T, d) → (B, T, out)."""

    def __init__(self, dim: int, out: int, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.adaln = linear(config.dim, 2 * dim, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(dim, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.linear = linear(dim, out, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.adaln(jax.nn.gelu(c, approximate=True)), 2, axis=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class NormedProjection(nnx.Module):
    """A LayerNorm and a Linear, between the widths of the backbone and the mixer or decoder: (…, d) → (…, out)."""

    def __init__(self, dim: int, out: int, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = layer_norm(dim, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.linear = linear(dim, out, use_bias=config.use_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x))
