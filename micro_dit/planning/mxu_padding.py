"""Estimates the share of padding in the work of a TPU's matrix units, from the matrix products of a traced program.

A matrix unit holds a square tile of one operand and streams the rows of the other operand through it, eight at a time.
Dimensions that are not multiples of the tile are padded with zeros, which cost as much time as other values. A product
with few rows also waits for the next tile to be loaded. The compiler's cycle estimates agree with this model, see
docs/speed.md.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

SUBLANES = 8  # rows that are streamed together


class MatrixUnit(NamedTuple):
    """A TPU's matrix unit.

    Attributes:
        side: Side length of a tile.
        loading: Number of rows that could be streamed in the time of loading the next tile.
    """

    side: int
    loading: int


# Sides are from jax-ml.github.io/scaling-book/tpus. Loading times are derived from the cycles that libtpu 0.0.42
# estimates for products of 4 to 128 rows; the v5p's is assumed to equal the v5e's.
MATRIX_UNITS = {"v5e": MatrixUnit(128, 64), "v5p": MatrixUnit(128, 64), "v6e": MatrixUnit(256, 256)}


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """The product (batch, rows, contracted) × (batch, contracted, columns), executed `times` times."""

    batch: int
    rows: int
    contracted: int
    columns: int
    times: int = 1

    @property
    def flops(self) -> int:
        """Returns the FLOPs without padding."""
        return 2 * self.times * self.batch * self.rows * self.contracted * self.columns

    def padded_flops(self, unit: MatrixUnit) -> int:
        """Returns the FLOPs with padding; the operand whose choice as the tile costs less is held as the tile."""

        def streaming(rows: int, columns: int) -> int:
            streamed = _up(rows, SUBLANES)
            streamed = max(streamed, min(unit.side, streamed + unit.loading))
            return streamed * _up(self.contracted, unit.side) * _up(columns, unit.side)

        return 2 * self.times * self.batch * min(streaming(self.rows, self.columns), streaming(self.columns, self.rows))


def padding(traced: Any, chip: str) -> float | None:
    """Returns the share of padding in the matrix units' work, in [0, 1); None for chips other than TPUs.

    Args:
        traced: Result of `jax.make_jaxpr`, traced with the batch size of one chip.
        chip: Name of the chip.
    """
    if chip not in MATRIX_UNITS:
        return None
    products = matrix_products(traced)
    real = sum(product.flops for product in products)
    return 1 - real / sum(product.padded_flops(MATRIX_UNITS[chip]) for product in products) if real else 0.0


def matrix_products(traced: Any) -> list[MatrixProduct]:
    """Returns the matrix products of a traced program, before optimization by the compiler, without convolutions."""
    found = []
    for operation, times in operations(traced):
        if operation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = operation.params["dimension_numbers"]
            left, right = (variable.aval.shape for variable in operation.invars)
            inner, outer = (math.prod(left[axis] for axis in axes) for axes in (contracted, batch))
            rows, columns = (math.prod(shape) // (inner * outer) if inner * outer else 0 for shape in (left, right))
            found.append(MatrixProduct(outer, rows, inner, columns, times))
    return found


def operations(traced: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yields all operations of a program and of nested programs, each with its number of executions.

    Of the branches of a `cond`, only the last is visited. For branches by platform, it is the one for accelerators.
    """
    for operation in getattr(traced, "jaxpr", traced).eqns:
        yield operation, times
        inner_times = times * operation.params["length"] if operation.primitive.name == "scan" else times
        chosen = operation.params["branches"][-1:] if operation.primitive.name == "cond" else operation.params
        for value in jax.tree.leaves(chosen):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from operations(value, inner_times)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
