"""Reports the parameters of a network and the compilation of its train step."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from micro_dit.planning.aot import heartbeat


def parameter_table(params: Mapping[str, Any]) -> str:
    """Returns a table of the number of parameters by part of the network, with one row per block."""
    parts: dict[str, int] = {}
    for name, leaf in params.items():
        words = name.split(".")
        part = ".".join(words[:2]) if words[0] in ("blocks", "mixer") else words[0]
        parts[part] = parts.get(part, 0) + int(np.prod(leaf.shape))
    order = sorted(parts, key=lambda part: [int(w) if w.isdigit() else -1 for w in part.split(".")] + [0])
    order.sort(key=lambda part: ("mixer" in part) + 2 * part.startswith("blocks") + 3 * part.startswith("final"))
    shapes = {part: jax.ShapeDtypeStruct((parts[part],), np.float32) for part in order}
    return parameter_overview.get_parameter_overview(shapes, include_stats=False)


def compile_step(
    phase: str, step: Any, arguments: Sequence[Any], say: Callable[[str], None], every: float = 15.0
) -> Any:
    """Compiles a jitted step and returns it. Prints a heartbeat every `every` seconds, then time, memory and FLOPs.

    Args:
        phase: Name of the phase, printed before each line.
        step: The jitted step.
        arguments: Arguments to lower the step with.
        say: Prints a line.
        every: Seconds between heartbeats.
    """
    started = time.monotonic()
    with heartbeat(lambda seconds: say(f"{phase}: compiling for {seconds:.0f} s"), every):
        compiled = step.lower(*arguments).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    parts = [f"{phase}: compiled in {time.monotonic() - started:.1f} s"]
    if memory is not None:
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        parts.append(f"{peak / 2**30:.2f} GiB per device ({memory.temp_size_in_bytes / 2**30:.2f} temporary)")
    if cost.get("flops", 0) > 0:
        parts.append(f"{cost['flops'] / 1e9:,.1f} GFLOP per device and step")
    say(", ".join(parts))
    return compiled
