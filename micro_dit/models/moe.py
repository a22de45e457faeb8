"""Expert-choice mixture of experts: each expert chooses its tokens, per image (Zhou et al. 2022, arXiv 2202.09368).

Dispatch is a gather and combine a scatter-add; no one-hot products, whose cost grows with the square of the tokens.

B images · N tokens present · E experts · T tokens per expert · d block width · F hidden width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from micro_dit.models.config import tokens_per_expert
from micro_dit.models.layers import Constrain, linear, normal_init, unconstrained
from micro_dit.models.ops import gelu, product


class ExpertChoiceFFN(nnx.Module):
    """A feed-forward layer of E experts that choose T tokens each from every image: (B, N, d) → (B, N, d).

    The output of an expert (w1, GELU, w2) is scaled by the router's probability for the token, softmax over experts,
    and summed into the token. A token that no expert chose gets zero.
    """

    def __init__(
        self, dim: int, hidden: int, experts: int, capacity: float, *, out_std: float,
        constrain: Constrain = unconstrained, dtype: jnp.dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.experts, self.capacity, self.constrain, self.dtype = experts, capacity, constrain, dtype
        self.w1 = nnx.Param(normal_init(0.02)(rngs.params(), (experts, dim, hidden), jnp.float32))
        self.w2 = nnx.Param(normal_init(out_std)(rngs.params(), (experts, hidden, dim), jnp.float32))
        # The router stays in float32: a rounded score would change which tokens are chosen. By default, TPUs and some
        # GPUs round float32 factors to bfloat16 or TF32.
        self.gate = linear(
            dim, experts, use_bias=False, kernel_init=normal_init(0.02), precision=jax.lax.Precision.HIGHEST,
            dtype=jnp.dtype(jnp.float32), rngs=rngs,
        )  # fmt: skip

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns positions, (B, E, T) int32, and probabilities, float32, of each expert's tokens in x (B, N, d)."""
        T = tokens_per_expert(x.shape[1], self.experts, self.capacity)
        probabilities = jax.nn.softmax(self.gate(x), axis=-1).transpose(0, 2, 1)  # (B, E, N)
        # A sort, not top_k: XLA's top_k over a sharded batch gathers it first.
        chosen = jnp.argsort(probabilities, axis=-1, descending=True)[..., :T]
        return chosen, jnp.take_along_axis(probabilities, chosen, axis=-1)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, N, d = x.shape
        chosen, probabilities = self.route(x)
        E, T = chosen.shape[1:]
        rows = chosen.reshape(B, E * T)
        taken = jnp.take_along_axis(x, rows[:, :, None], axis=1)  # (B, E·T, d)
        # One matrix for each expert, over all images: in this layout XLA needs no transposes around the products.
        taken = taken.reshape(B, E, T, d).transpose(1, 0, 2, 3).astype(self.dtype)
        taken = self.constrain(taken, "EBTd").reshape(E, B * T, d)  # sends tokens to their experts
        hidden = product(taken, self.w1[...].astype(self.dtype))  # (E, B·T, F)
        out = product(gelu(hidden), self.w2[...].astype(self.dtype))
        out = self.constrain(out.reshape(E, B, T, d), "EBTd").transpose(1, 0, 2, 3)
        out = self.constrain(out, "BETd")  # sends them back to their images
        out = out * probabilities[..., None].astype(self.dtype)
        add = jax.vmap(lambda rows, updates: jnp.zeros((N, d), updates.dtype).at[rows].add(updates))
        return add(rows, out.reshape(B, E * T, d))
