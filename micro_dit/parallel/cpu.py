"""Settings of XLA and the C library for training on a CPU. Importing this module changes no settings."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import jax
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def compiler_options() -> dict[str, str]:
    """Returns XLA's compiler options for a training step on the current backend.

    On a CPU, XLA removes all optimization barriers before common subexpression elimination and fusion. That undoes
    rematerialization. It also recomputes the sums along the residual stream for every consumer, so that the time grows
    with the square of the depth. These options keep the barriers.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else {}


def keep_memory() -> None:
    """Keeps freed memory in the process instead of returning it to the system, if the CPU is JAX's only backend.

    On a CPU, XLA allocates temporary memory in every step and frees it afterwards. If the C library returns it to the
    system, page faults take a quarter of Tiny/2's masked step. Only the heap of the main thread can hold that much
    memory, so asynchronous dispatch is disabled and steps run in the thread that dispatches them.

    Must be called before JAX initializes its backend. Has no effect without glibc.
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        only_cpu = platforms == "cpu"
    else:
        only_cpu = not (importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"))
    if only_cpu and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrinks the heap
        mallopt(M_MMAP_MAX, 0)  # allocates everything on the heap, because mapped memory is always returned when freed
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def register_lowerings() -> None:
    """Removes the rounding of float32 to float32 precision on a CPU. Must be called before a train step is lowered.

    `jax.checkpoint` inserts such a rounding for every value that it saves, and XLA would copy each value for it.
    """
    mlir.register_lowering(jax.lax.reduce_precision_p, _reduce_precision, platform="cpu")


def _reduce_precision(context: Any, x: Any, *, exponent_bits: int, mantissa_bits: int) -> list[Any]:
    if context.avals_in[0].dtype == "float32" and (exponent_bits, mantissa_bits) == (8, 23):
        return [x]
    return [stablehlo.reduce_precision(x, mlir.i32_attr(exponent_bits), mlir.i32_attr(mantissa_bits))]
