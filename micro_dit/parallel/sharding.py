"""Which array is split over which axes of the mesh: one table for parameters, one for dimensions of activations.

The moments of the optimizer and the moving average are split as their parameters are. What is not an expert's is split
over 'fsdp' and 'expert' together, always along the width of a block (or of an embedding), a multiple of a large power
of two, while layer-wise scaling makes the widths of attention and of hidden layers odd. Those are split over 'tensor'
alone, and where one can't be split evenly it is left whole.
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

# The first rule whose pattern is found in a parameter's name decides. Of the letters below, d is the width of a block.
RULES: tuple[tuple[str, P], ...] = (
    (r"\.(scale|bias|mask_token)$|\.gate\.kernel$", P()),  # small: gathering them would cost more than keeping them
    (r"\.mlp\.w1$", P("expert", "fsdp", "tensor")),  # (E, d, F)
    (r"\.mlp\.w2$", P("expert", "tensor", "fsdp")),  # (E, F, d)
    (r"\.(qkv|q|kv|w1|w2)\.kernel$", P(FSDP, "tensor")),  # (d, heads or hidden)
    (r"attn\.proj\.kernel$|\.w3\.kernel$", P("tensor", FSDP)),  # (heads or hidden, d)
    (r"\.(adaln|fc2|linear)\.kernel$|^noise_embedding\.fc1\.", P(FSDP)),  # (D, …): conditioning, between the two widths
    # Of patches and captions. Their inner width is that of the data, which may be odd; and split along the outer one,
    # XLA gathers the activations, as the smaller of the two.
    (r"\.(proj|fc1)\.kernel$", P()),
)

ADAPTER = re.compile(r"\.lora_[ab]$")  # of micro_dit/training/lora.py

# Dimension letters of activations and the axes that they are split over; letters not named are not split.
DIMENSIONS = {"B": BATCH_AXES, "E": ("expert",)}

State = TypeVar("State")


def param_shardings(mesh: Mesh, shapes: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Returns where each parameter (or ShapeDtypeStruct, by name) lives; a LoRA adapter, being small, on every device.

    Raises:
        UserError: No rule is for a parameter, a rule is for none, or a dimension can't be split evenly.
    """
    if all(ADAPTER.search(name) for name in shapes):
        return dict.fromkeys(shapes, replicated(mesh))
    names = {name: _rule(name) for name in shapes}
    for index, (pattern, spec) in enumerate(RULES):
        # A network without experts is no mistake, but devices that wait for some are.
        if index not in names.values() and ("expert" not in spec or mesh.shape["expert"] > 1):
            raise UserError(
                f"no parameter of the network is called like {pattern!r}, which micro_dit/parallel/sharding.py splits "
                f"over {_axes(spec)}; make mesh.expert 1 if the network has no experts, else correct the rule."
            )
    specs = {name: _fitted(mesh, name, shapes[name].shape, RULES[index][1]) for name, index in names.items()}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def state_shardings(mesh: Mesh, state: State) -> State:
    """Returns where everything in a TrainState lives, in the same structure.

    Every array below a parameter's name is placed as that parameter is: moments, EMA weights. All else is on every
    device.
    """
    placed, everywhere = param_shardings(mesh, state.params), replicated(mesh)  # type: ignore[attr-defined]

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        return placed.get(getattr(path[-1], "key", ""), everywhere)

    return jax.tree_util.tree_map_with_path(place, state)


def placed_as(abstract: State, shardings: State) -> State:
    """Shapes and dtypes with their shardings."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings)


def shardings_of(tree: State) -> State:
    """The shardings of a tree of arrays, or of ShapeDtypeStructs that have one."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


@functools.lru_cache(maxsize=16)
def constrain_to(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """Returns the function (x, dimensions) → x that constrains an activation's sharding by its dimensions' letters.

    Of two letters that share an axis, the left one gets it: "EBTd" has experts over 'expert' and images over the
    remaining axes, "BTd" has images over all three. The result is cached so that networks bound with it are, too.
    """

    def constrain(x: jax.Array, dimensions: str) -> jax.Array:
        spec, taken = [], set()
        for letter in dimensions:
            axes = tuple(axis for axis in DIMENSIONS.get(letter, ()) if axis not in taken)
            taken |= set(axes)
            spec.append(axes or None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    return constrain


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """What each device holds of a tree of arrays or ShapeDtypeStructs."""
    sizes = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def sharding_table(mesh: Mesh, shapes: Mapping[str, Any]) -> str:
    """Returns a table of the rules, with the bytes of the parameters that each places, in all and per device."""
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
    return f"mesh of {mesh.size} devices: {grid}\n{text_table(rows, left=2, rule=False)}"


def _rule(name: str) -> int:
    """The number of the rule for a parameter."""
    for index, (pattern, _) in enumerate(RULES):
        if re.search(pattern, name):
            return index
    raise UserError(f"no rule in micro_dit/parallel/sharding.py says how to split parameter {name}; add one.")


def _fitted(mesh: Mesh, name: str, shape: tuple[int, ...], spec: P) -> P:
    """The rule's spec, without 'tensor' where a width can't be split over it."""
    fitted = []
    for size, axes in zip(shape, spec, strict=False):
        parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        if size % parts and axes != "tensor":
            raise UserError(
                f"parameter {name} is {'×'.join(map(str, shape))}, and its {size} can't be split evenly over the "
                f"{parts} devices of {_axes(P(axes))}; make those sizes of the mesh smaller."
            )
        fitted.append(axes if size % parts == 0 else None)
    return P(*fitted)


def _axes(spec: P) -> str:
    """A spec in words: 'fsdp·expert, tensor'."""
    return ", ".join("·".join((axes,) if isinstance(axes, str) else axes or ("-",)) for axes in spec) or "-"
