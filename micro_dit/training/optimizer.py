"""AdamW and Muon. The learning rate is applied by the train step, because each phase has its own schedule."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from micro_dit.models.dit import Params

OPTIMIZERS = ("adamw", "muon")

# With "muon", the first rule whose pattern matches a parameter's name selects the optimizer.
MUON_RULES: tuple[tuple[str, str], ...] = (
    (r"^caption_block\.|\.bias$", "adam"),
    (r"\.(attn|cross_attn)\.(qkv|q|kv|proj)\.kernel", "muon"),  # and the factors of their LoRA adapters
    (r"\.mlp\.w[123]", "muon"),  # a dense feed-forward's, or one matrix for each expert
    (r"", "adam"),  # embeddings, norms, adaLN, routers, projections between widths, final layer
)
# Matrices that a fused kernel holds side by side.
FUSED: tuple[tuple[str, int], ...] = ((r"\.qkv\.kernel(\.lora_b)?$", 3), (r"\.kv\.kernel(\.lora_b)?$", 2))

MOMENTUM = 0.95
UPDATE_RMS = 0.4  # times the learning rate; an AdamW update has about 0.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of https://kellerjordan.github.io/posts/muon/
ITERATIONS = 5


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Clips by the global norm with a single factor.

    Unlike in optax's version, XLA can fuse the factor into the update instead of storing the clipped gradients.
    """

    def clip(gradients: Any, _: Any) -> Any:
        factor = limit / jnp.maximum(optax.tree.norm(gradients), limit)
        return jax.tree.map(lambda gradient: gradient * factor, gradients)

    return optax.stateless(clip)


def make_optimizer(
    clip: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.1, *,
    name: str = "adamw", dtype: Any = jnp.float32, mesh: Mesh | None = None,
) -> optax.GradientTransformation:  # fmt: skip
    """Clips by the global norm, scales by Adam or Muon, and decays all parameters, as the public release does.

    Args:
        clip: Largest global gradient norm.
        b1: Decay of Adam's first moment.
        b2: Decay of Adam's second moment.
        eps: Adam's denominator offset.
        weight_decay: Decoupled weight decay, to be multiplied by the learning rate.
        name: One of OPTIMIZERS. "muon" scales by Muon the parameters that MUON_RULES select, and by Adam the others.
        dtype: Dtype of Muon's matrix products.
        mesh: Devices over which Muon distributes its matrices; None for one device.

    Returns:
        The optimizer, without the learning rate. The structure of its state depends on `name` only, so that a phase can
        take over the state of the phase before.
    """
    scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if name == "muon":
        scale = optax.partition({"muon": scale_by_muon(dtype, mesh), "adam": scale}, _muon_groups)
    return optax.chain(clip_by_global_norm(clip), scale, optax.add_decayed_weights(weight_decay))


def _muon_groups(params: Mapping[str, Any]) -> dict[str, str]:
    """Returns the optimizer of each parameter, by MUON_RULES."""
    return {name: next(group for pattern, group in MUON_RULES if re.search(pattern, name)) for name in params}


def scale_by_muon(dtype: Any = jnp.float32, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Applies Nesterov momentum, then `orthogonalize` (Muon: Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982)."""
    return optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, _: orthogonalize(updates, dtype, mesh)),
    )


def orthogonalize(updates: Mapping[str, Any], dtype: Any = jnp.float32, mesh: Mesh | None = None) -> dict[str, Any]:
    """Replaces the singular values of each matrix by values near UPDATE_RMS·√max(rows, columns).

    That is an update of root mean square UPDATE_RMS for a matrix of full rank (arXiv 2502.16982, section 2.2). Matrices
    of equal shape, up to transposition, are stacked and orthogonalized together, each device its share of the stack.

    Args:
        updates: By parameter name, arrays (…, rows, columns) float32, or `optax.MaskedNode`, which stays. Leading axes
            and the parts of fused kernels are separate matrices.
        dtype: Dtype of the matrix products.
        mesh: Devices to distribute the matrices over; None for one device.
    """
    wide = {name: _split(name, update) for name, update in updates.items() if not isinstance(update, optax.MaskedNode)}
    stacks: dict[tuple[int, ...], list[str]] = {}
    for name, matrices in wide.items():
        stacks.setdefault(matrices.shape[1:], []).append(name)
    out = dict(updates)
    for (_, columns), names in stacks.items():
        stack = _spread(jnp.concatenate([wide[name].astype(dtype) for name in names]), mesh)  # (n, rows, columns)
        stack = newton_schulz(stack).astype(jnp.float32) * (UPDATE_RMS * math.sqrt(columns))
        start = 0
        for name in names:
            count = len(wide[name])
            out[name] = _join(name, stack[start : start + count], updates[name].shape)
            start += count
    return out


def newton_schulz(X: jax.Array) -> jax.Array:
    """Maps X = U·S·Vᵀ, (n, rows, columns), to about U·Vᵀ, of X's dtype, by a quintic Newton–Schulz iteration.

    Singular values end between 0.7 and 1.2; those of X below about a hundredth of its norm remain smaller.
    """
    a, b, c = NEWTON_SCHULZ
    X = X / (jnp.linalg.norm(X, axis=(1, 2), keepdims=True) + 1e-7).astype(X.dtype)
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def newton_schulz_flops(params: Mapping[str, Any]) -> int:
    """Counts the FLOPs of one call of `orthogonalize` for parameters, or ShapeDtypeStructs, by name."""
    flops = 0
    for name, group in _muon_groups(params).items():
        if group == "muon":
            n, rows, columns = jax.eval_shape(lambda p, name=name: _split(name, p), params[name]).shape
            flops += n * ITERATIONS * (4 * rows**2 * columns + 2 * rows**3)
    return flops


def _parts(name: str) -> int:
    return next((parts for pattern, parts in FUSED if re.search(pattern, name)), 1)


def _split(name: str, kernel: jax.Array) -> jax.Array:
    """Splits a kernel (…, d, parts·w) into matrices (n, rows, columns) with rows ≤ columns, transposed if need be."""
    *_, d, width = kernel.shape
    parts = _parts(name)
    matrices = kernel.reshape(-1, d, parts, width // parts).swapaxes(1, 2).reshape(-1, d, width // parts)
    return matrices.mT if d > width // parts else matrices


def _join(name: str, matrices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Joins matrices into a kernel: the inverse of `_split`."""
    *_, d, width = shape
    parts = _parts(name)
    matrices = matrices.mT if d > width // parts else matrices
    return matrices.reshape(-1, parts, d, width // parts).swapaxes(1, 2).reshape(shape)


def _spread(stack: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Splits a stack of matrices over all devices, filled up with zeros to a multiple of their number."""
    if mesh is None or mesh.size == 1:
        return stack
    stack = jnp.pad(stack, ((0, -len(stack) % mesh.size), (0, 0), (0, 0)))
    return jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def update_ema(ema: Params, params: Params, decay: float, active: jax.Array | bool = True) -> Params:
    """Returns decay·ema + (1 - decay)·params, or a copy of the parameters if not `active`.

    The EMA starts as a copy, so it needs no bias correction. It is computed as ema + (1 - decay)·(params - ema): if
    decay is close to 1, float32 represents the small second term accurately.
    """
    return jax.tree.map(lambda e, p: jnp.where(active, e + jnp.float32(1 - decay) * (p - e), p), ema, params)
