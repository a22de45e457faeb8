"""The matrix products of a traced program, and how much of them a TPU's matrix units spend on padding.

A matrix unit holds a square tile of one operand and lets the rows of the other stream through it, eight at a time. What
is smaller than a tile, or not a multiple of it, is filled up with zeros, which take as long as numbers; and a few rows
do not hide the loading of the next tile. The compiler's own estimates of cycles bear this out: docs/speed.md.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

SUBLANES = 8  # rows that move together


class MatrixUnit(NamedTuple):
    """Side of a tile, and the rows that could stream in the time that loading the next tile takes."""

    side: int
    loading: int


# Sides: jax-ml.github.io/scaling-book/tpus. Loading: from the cycles that libtpu 0.0.42 estimates for products of 4 to
# 128 rows; the v5p's is taken to be the v5e's.
MATRIX_UNITS = {"v5e": MatrixUnit(128, 64), "v5p": MatrixUnit(128, 64), "v6e": MatrixUnit(256, 256)}


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """(batch, rows, contracted) × (batch, contracted, columns), `times` over."""

    batch: int
    rows: int
    contracted: int
    columns: int
    times: int = 1

    @property
    def flops(self) -> int:
        """FLOPs without padding."""
        return 2 * self.times * self.batch * self.rows * self.contracted * self.columns

    def padded_flops(self, unit: MatrixUnit) -> int:
        """As a matrix unit does it, with that operand in place that makes less work."""

        def streaming(rows: int, columns: int) -> int:
            streamed = _up(rows, SUBLANES)
            streamed = max(streamed, min(unit.side, streamed + unit.loading))
            return streamed * _up(self.contracted, unit.side) * _up(columns, unit.side)

        return 2 * self.times * self.batch * min(streaming(self.rows, self.columns), streaming(self.columns, self.rows))


def padding(traced: Any, chip: str) -> float | None:
    """Share of the matrix units' work in a traced program (of `jax.make_jaxpr`) that is padding.

    None for chips other than TPUs. Shapes are those of the program: trace it with the images of one chip.
    """
    if chip not in MATRIX_UNITS:
        return None
    products = matrix_products(traced)
    real = sum(product.flops for product in products)
    return 1 - real / sum(product.padded_flops(MATRIX_UNITS[chip]) for product in products) if real else 0.0


def matrix_products(traced: Any) -> list[MatrixProduct]:
    """Of a program as it was traced, before any compiler; convolutions are left out."""
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
    """All operations of a program and of the programs in them, and how often each runs.

    Of a choice between programs the last is taken: for platforms, that of all accelerators.
    """
    for operation in getattr(traced, "jaxpr", traced).eqns:
        yield operation, times
        turns = times * operation.params["length"] if operation.primitive.name == "scan" else times
        chosen = operation.params["branches"][-1:] if operation.primitive.name == "cond" else operation.params
        for value in jax.tree.leaves(chosen):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from operations(value, turns)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
