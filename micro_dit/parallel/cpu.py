"""Settings of XLA and the C library for training steps on a CPU; each is a function, so that importing sets nothing."""

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
    """Returns XLA's options for a training step on the backend in use.

    On a CPU, XLA drops all optimization barriers before it merges equal expressions and fuses. That undoes
    rematerialization, and sums along the residual stream are then computed again for every reader, which costs time
    with the square of the depth. These options keep the barriers.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else {}


def keep_memory() -> None:
    """Makes this process keep the memory that it frees, if the CPU is JAX's only backend.

    On a CPU, XLA allocates a step's temporary memory again, and the C library returns it to the system afterwards: a
    quarter of Tiny/2's masked step was spent in page faults. Only the main thread's heap can keep as much, so steps run
    in the thread that dispatches them, not in one of JAX's; the host has nothing else to do that would not take their
    cores. Call it before JAX starts its backend. Without glibc it does nothing.
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


def register_lowerings() -> None:
    """Makes rounding float32 to its own precision free on a CPU; call it before a training step is lowered.

    `jax.checkpoint` rounds the values it keeps in that way, and XLA would make a copy of each.
    """
    mlir.register_lowering(jax.lax.reduce_precision_p, _reduce_precision, platform="cpu")


def _reduce_precision(context: Any, x: Any, *, exponent_bits: int, mantissa_bits: int) -> list[Any]:
    if context.avals_in[0].dtype == "float32" and (exponent_bits, mantissa_bits) == (8, 23):
        return [x]
    return [stablehlo.reduce_precision(x, mlir.i32_attr(exponent_bits), mlir.i32_attr(mantissa_bits))]
