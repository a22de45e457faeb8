"""Sharding rules: one table for parameters and one for the dimensions of activations.

Optimizer moments and EMA weights are split like their parameters. Parameters other than experts are split over 'fsdp'
and 'expert' together, along the width of a block or of an embedding, which is a multiple of a large power of two. The
widths of attention and of hidden layers vary with layer-wise scaling. They are split over 'tensor' only, or not at all
if they are not divisible.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from micro_dit.errors import UserError
from micro_dit.files import text_table
from micro_dit.parallel.mesh import BATCH_AXES, replicated

FSDP = ("fsdp", "expert")

# The first rule whose pattern is found in the name of a parameter applies. In the shapes, d is the width of a block.
RULES: tuple[tuple[str, P], ...] = (
    (r"\.(scale|bias|mask_token)$|\.gate\.kernel$", P()),  # so small that an all-gather would cost more than a copy
    (r"\.mlp\.w1$", P("expert", "fsdp", "tensor")),  # (E, d, F)
    (r"\.mlp\.w2$", P("expert", "tensor", "fsdp")),  # (E, F, d)
    (r"\.(qkv|q|kv|w1|w2)\.kernel$", P(FSDP, "tensor")),  # (d, heads or hidden)
    (r"attn\.proj\.kernel$|\.w3\.kernel$", P("tensor", FSDP)),  # (heads or hidden, d)
    (r"\.(adaln|fc2|linear)\.kernel$|^noise_embedding\.fc1\.", P(FSDP)),  # (D, …): conditioning and output
    # Embeddings of patches and captions. Their input width is that of the data, which may not be divisible. If the
    # output width were split, XLA would gather the activations, because they are smaller than the kernel.
    (r"\.(proj|fc1)\.kernel$", P()),
)

ADAPTER = re.compile(r"\.lora_[ab]$")  # parameters of micro_dit/training/lora.py

# Dimension letters of activations and the axes that they are split over; letters not named are not split.
DIMENSIONS = {"B": BATCH_AXES, "E": ("expert",)}

State = TypeVar("State")


def param_shardings(mesh: Mesh, shapes: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Returns the sharding of each parameter by name. LoRA adapters are small and replicated.

    Args:
        mesh: Mesh of the devices.
        shapes: Parameters or ShapeDtypeStructs by name.

    Raises:
        UserError: No rule matches a parameter, a rule matches no parameter, or a dimension can't be split evenly.
    """
    if all(ADAPTER.search(name) for name in shapes):
        return dict.fromkeys(shapes, replicated(mesh))
    names = {name: _rule(name) for name in shapes}
    for index, (pattern, spec) in enumerate(RULES):
        # A network may have no experts, but then no devices may be reserved for them.
        if index not in names.values() and ("expert" not in spec or mesh.shape["expert"] > 1):
            raise UserError(
                f"No parameter matches {pattern!r}, which micro_dit/parallel/sharding.py splits over {_axes(spec)}. "
                "Set --config.mesh.expert=1 if the network has no experts; otherwise correct the rule."
            )
    specs = {name: _fitted(mesh, name, shapes[name].shape, RULES[index][1]) for name, index in names.items()}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def state_shardings(mesh: Mesh, state: State) -> State:
    """Returns the shardings of a TrainState, in the same structure.

    Arrays under the name of a parameter, such as moments and EMA weights, have the sharding of this parameter. All
    other arrays are replicated.
    """
    placed, everywhere = param_shardings(mesh, state.params), replicated(mesh)  # type: ignore[attr-defined]

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        return placed.get(getattr(path[-1], "key", ""), everywhere)

    return jax.tree_util.tree_map_with_path(place, state)


def placed_as(abstract: State, shardings: State) -> State:
    """Returns the ShapeDtypeStructs of `abstract` with the given shardings."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings)


def shardings_of(tree: State) -> State:
    """Returns the shardings of a tree of arrays, or of ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


@functools.lru_cache(maxsize=16)
def constrain_to(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """Returns a function (x, dimensions) → x that constrains the sharding of an activation by its dimension letters.

    If two letters share an axis, the first one uses it: "EBTd" splits experts over 'expert' and images over the
    remaining axes, while "BTd" splits images over all three. The function is cached, so that networks bound with it can
    be cached too.
    """

    def constrain(x: jax.Array, dimensions: str) -> jax.Array:
        spec, used = [], set()
        for letter in dimensions:
            axes = tuple(axis for axis in DIMENSIONS.get(letter, ()) if axis not in used)
            used |= set(axes)
            spec.append(axes or None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    return constrain


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Returns the bytes that each device holds of a tree of arrays or ShapeDtypeStructs."""
    sizes = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def sharding_table(mesh: Mesh, shapes: Mapping[str, Any]) -> str:
    """Returns a table of the rules with the number and the size of their parameters, in total and per device."""
    placed = param_shardings(mesh, shapes)
    rows = [("parameters", "split over", "arrays", "MB", "MB per device")]
    by_rule = {rule: [name for name in shapes if _rule(name) == i] for i, rule in enumerate(RULES)}
    for (pattern, spec), names in [*by_rule.items(), (("all", None), list(shapes))]:
        if names:
            arrays = {name: shapes[name] for name in names}
            whole = bytes_per_device(arrays, dict.fromkeys(names, replicated(mesh)))
            split = bytes_per_device(arrays, {name: placed[name] for name in names})
            over = "" if spec is None else _axes(spec)
            rows.append((pattern, over, str(len(names)), f"{whole / 1e6:,.2f}", f"{split / 1e6:,.2f}"))
    grid = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"Mesh of {mesh.size} devices: {grid}\n{text_table(rows, left=2, rule=False)}"


def _rule(name: str) -> int:
    """Returns the index of the rule for a parameter."""
    for index, (pattern, _) in enumerate(RULES):
        if re.search(pattern, name):
            return index
    raise UserError(f"No rule in micro_dit/parallel/sharding.py matches parameter {name}. Add one to RULES.")


def _fitted(mesh: Mesh, name: str, shape: tuple[int, ...], spec: P) -> P:
    """Returns the spec of a rule, without 'tensor' in dimensions that can't be split evenly over it."""
    fitted = []
    for size, axes in zip(shape, spec, strict=False):
        parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        if size % parts and axes != "tensor":
            raise UserError(
                f"Parameter {name} has shape {'×'.join(map(str, shape))}, and {size} can't be split evenly over the "
                f"{parts} devices of {_axes(P(axes))}. Reduce these sizes in --config.mesh."
            )
        fitted.append(axes if size % parts == 0 else None)
    return P(*fitted)


def _axes(spec: P) -> str:
    """Returns a spec as text, such as 'fsdp·expert, tensor'."""
    return ", ".join("·".join((axes,) if isinstance(axes, str) else axes or ("-",)) for axes in spec) or "-"
