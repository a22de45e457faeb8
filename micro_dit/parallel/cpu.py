"""What XLA and the C library are told before a training step is compiled and run."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import jax
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def compiler_options() -> dict[str, str]:
    """XLA's options for the backend in use.

    On a CPU, XLA drops all optimization barriers before it merges equal expressions and fuses. That undoes
    rematerialization (what was to be computed again is kept), and sums along the residual stream are then computed
    anew for every reader, which costs time with the square of the depth. So there the barriers stay.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else {}


def keep_memory() -> None:
    """Makes this process keep the memory it has freed, if JAX has no other backend than the CPU.

    There, XLA allocates all temporary memory of a step anew, and the C library gives it back to the system after each:
    a quarter of Tiny/2's masked step was spent in page faults. Only the main thread's heap can keep as much, so steps
    run in the thread that asks for them, not in one of JAX's; the host has nothing to do beside them that would not
    take their cores. To be called before JAX starts its backend. Only glibc can be told; elsewhere nothing happens.
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        only_cpu = platforms == "cpu"
    else:
        only_cpu = not (importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"))
    if only_cpu and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_MAX, 0)  # what is mapped is always given back
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _reduce_precision(context: Any, x: Any, *, exponent_bits: int, mantissa_bits: int) -> list[Any]:
    """`jax.checkpoint` rounds whatever it keeps to its own precision; on a CPU, XLA makes a copy of that."""
    if context.avals_in[0].dtype == "float32" and (exponent_bits, mantissa_bits) == (8, 23):
        return [x]
    return [stablehlo.reduce_precision(x, mlir.i32_attr(exponent_bits), mlir.i32_attr(mantissa_bits))]


mlir.register_lowering(jax.lax.reduce_precision_p, _reduce_precision, platform="cpu")
