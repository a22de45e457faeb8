"""Expert-choice mixture of experts: each expert chooses its tokens, per image (Zhou et al. 2022, arXiv 2202.09368).

Dispatch is a gather and combine a scatter-add; no one-hot products, whose cost grows with the square of the tokens.

B images · N tokens present · E experts · T tokens per expert · d block width · F hidden width.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from micro_dit.models.layers import PRODUCT, linear, normal_init, product, round_up

Constrain = Callable[[jax.Array, str], jax.Array]  # an activation and its dimensions' letters → the same activation


def anywhere(x: jax.Array, dimensions: str) -> jax.Array:
    """Says nothing about where an activation lives."""
    return x


def gelu(x: jax.Array) -> jax.Array:
    """x·Φ(x), exactly, by erf: `jax.nn.gelu` takes erfc, of which XLA makes five passes over memory on a CPU."""
    wide = x.astype(jnp.float32)  # 1 + erf cancels
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def tokens_per_expert(tokens: int, experts: int, capacity: float) -> int:
    """T = int(capacity·N/E). Zero means that the layer outputs zeros; `DiTConfig.check` refuses such a network."""
    return int(capacity * tokens / experts)


class ExpertChoiceFFN(nnx.Module):
    """Each of E experts takes its T favorite tokens of an image: (B, N, d) → (B, N, d).

    The output of an expert (w1, GELU, w2) is scaled by the router's probability for the token, softmax over experts,
    and summed into the token. A token that no expert chose gets zero.
    """

    def __init__(
        self, dim: int, hidden: int, experts: int, capacity: float, *, out_std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.experts, self.capacity, self.dtype = experts, capacity, dtype
        self.constrain: Constrain = anywhere
        self.w1 = nnx.Param(normal_init(0.02)(rngs.params(), (experts, dim, hidden), jnp.float32))
        self.w2 = nnx.Param(normal_init(out_std)(rngs.params(), (experts, hidden, dim), jnp.float32))
        # The router stays in float32: a rounded score would change which tokens are chosen. By default, TPUs and some
        # GPUs round float32 factors to bfloat16 or TF32.
        self.gate = linear(
            dim, experts, use_bias=False, kernel_init=normal_init(0.02), precision=jax.lax.Precision.HIGHEST,
            dtype=jnp.dtype(jnp.float32), rngs=rngs,
        )  # fmt: skip

    @staticmethod
    def hidden_width(dim: int, ratio: float, multiple_of: int) -> int:
        """int(d·ratio), rounded up to `multiple_of`."""
        return round_up(int(dim * ratio), multiple_of)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, N, d) → the chosen tokens' positions (B, E, T) int32 and probabilities (B, E, T) float32."""
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
        # One matrix an expert, over all images: the layout in which XLA needs no transposes around the products.
        taken = taken.reshape(B, E, T, d).transpose(1, 0, 2, 3).astype(self.dtype)
        taken = self.constrain(taken, "EBTd").reshape(E, B * T, d)  # the tokens travel to their experts
        hidden = self._product(taken, self.w1)
        out = self._product(gelu(hidden), self.w2)
        out = self.constrain(out.reshape(E, B, T, d), "EBTd").transpose(1, 0, 2, 3)
        out = self.constrain(out, "BETd")  # and back to their images
        out = out * probabilities[..., None].astype(self.dtype)
        add = jax.vmap(lambda rows, updates: jnp.zeros((N, d), updates.dtype).at[rows].add(updates))
        return add(rows, out.reshape(B, E * T, d))

    def _product(self, x: jax.Array, weight: nnx.Param) -> jax.Array:
        """Each expert's product with its weight, under a name that rematerialization can refer to."""
        return checkpoint_name(product(x, weight[...].astype(self.dtype)), PRODUCT)
