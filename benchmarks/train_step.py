"""Times the training step of micro_dit/train.py on random data.

    make bench                                     MicroDiT-Tiny/2 at 256 px on two CPU threads: a few minutes
    make bench-gpu                                 MicroDiT-XL/2 at 256 px in bfloat16, at several batch sizes
    python -m benchmarks.train_step --json=PATH    also writes the figures to a file

The step is the real one: forward, backward, gradient clipping, AdamW; no moving average. Masked (75%) and unmasked
steps take turns, so that both see the same machine, and the medians are kept. On a machine that others use too, the CPU
seconds mean more than the wall seconds.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.models.dit import REMAT, make_config
from micro_dit.models.flops import training_flops
from micro_dit.parallel.chips import chip_of
from micro_dit.parallel.compilation import compiler_options
from micro_dit.train import Recipe, make_train_step
from micro_dit.training.phases import Phase
from micro_dit.training.state import init_state

RESOLUTION, LATENT_SIDE, CAPTION_TOKENS = 256, 32, 77
MASK_RATIOS = (0.75, 0.0)


def measure(size: str, dtype: str, remat: str, batch_size: int, repeats: int, steps: int) -> list[dict[str, Any]]:
    """One row of figures for each mask ratio.

    Args:
        size: a row of the table of network sizes.
        dtype: of the matrix products.
        remat: what the backward pass computes again.
        batch_size: images per step.
        repeats: how many times each is timed.
        steps: that one timing comprises.
    """
    network = make_config(size, input_size=LATENT_SIDE)
    recipe = Recipe(sigma_data=0.9, caption_drop=0.1, dtype=dtype, remat=remat, adam={})
    phases = [
        Phase(f"mask {ratio:.0%}", RESOLUTION, 1000, batch_size, learning_rate=2.4e-4, mask_ratio=ratio)
        for ratio in MASK_RATIOS
    ]
    random = np.random.default_rng(0)
    shapes = {
        "latent_mean": (batch_size, LATENT_SIDE, LATENT_SIDE, network.in_channels),
        "caption": (batch_size, CAPTION_TOKENS, network.caption_channels),
    }
    batch = {name: jax.device_put(random.standard_normal(shape).astype(np.float16)) for name, shape in shapes.items()}
    key = jax.random.key(0)
    device = jax.devices()[0]
    state = init_state(network, recipe.optimizer(phases[0]), 0, None, with_ema=False)
    chip = chip_of(device.device_kind)

    rows, compiled = [], []
    for phase in phases:  # the masked one first: peak memory only ever grows
        started, cpu = time.monotonic(), time.process_time()
        function = make_train_step(network, phase, 0, recipe)
        jitted = jax.jit(function, donate_argnums=0, compiler_options=compiler_options())
        step = jitted.lower(state, batch, key).compile()
        row: dict[str, Any] = {
            "size": size, "dtype": dtype, "batch": batch_size, "mask": phase.mask_ratio,
            "compile_s": time.monotonic() - started, "compile_cpu_s": time.process_time() - cpu,
        }  # fmt: skip
        memory: Any = step.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        limit = (device.memory_stats() or {}).get("bytes_limit", needed)
        if needed > limit:
            gigabytes = f"{needed / 1e9:.0f} of {limit / 1e9:.0f} GB"
            print(f"{size}, batch {batch_size}, {phase.name}: left out, it needs {gigabytes}")
            continue
        state, metrics = step(state, batch, key)  # warm-up
        jax.block_until_ready((state, metrics))
        row["peak_gb"] = peak_bytes(device) / 1e9
        rows.append(row)
        compiled.append(step)

    times: list[list[tuple[float, float]]] = [[] for _ in rows]
    for _ in range(repeats):
        for taken, step in zip(times, compiled, strict=True):
            wall, cpu = time.monotonic(), time.process_time()
            for _ in range(steps):
                state, metrics = step(state, batch, key)
            jax.block_until_ready((state, metrics))
            taken.append(((time.monotonic() - wall) / steps, (time.process_time() - cpu) / steps))
    for row, taken in zip(rows, times, strict=True):
        row["wall_s"], row["cpu_s"] = map(statistics.median, zip(*taken, strict=True))
        row["all_wall_s"], row["all_cpu_s"] = map(list, zip(*taken, strict=True))
        row["images_per_s"] = batch_size / row["wall_s"]
        flops = training_flops(network, row["mask"], CAPTION_TOKENS) * batch_size
        row["gflops_per_cpu_s"] = flops / row["cpu_s"] / 1e9
        row["mfu"] = flops / row["wall_s"] / chip.peak_flops if chip else None
    return rows


def peak_bytes(device: Any) -> int:
    """Peak memory so far: of the device where it counts it, else of this process."""
    in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if in_use is not None:
        return in_use
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(rows: Sequence[dict[str, Any]], on_gpu: bool) -> str:
    """The figures as lines of text."""
    lines = ["batch  mask   s/step  images/s  compile s  peak GB  "]
    lines[0] += "   MFU" if on_gpu else "CPU-s/step  GFLOP/CPU-s  compile CPU-s"
    for row in rows:
        last = f"{row['cpu_s']:10.2f}  {row['gflops_per_cpu_s']:11.0f}  {row['compile_cpu_s']:13.1f}"
        if on_gpu:
            last = "     –" if row["mfu"] is None else f"{row['mfu']:6.1%}"
        lines.append(
            f"{row['batch']:5}  {row['mask']:4.0%}  {row['wall_s']:7.3f}  {row['images_per_s']:8.2f}  "
            f"{row['compile_s']:9.1f}  {row['peak_gb']:7.1f}  {last}"
        )
    for masked, unmasked in itertools.pairwise(rows):
        if masked["batch"] == unmasked["batch"]:
            seconds = "wall_s" if on_gpu else "cpu_s"
            lines.append(
                f"batch {masked['batch']}: a masked step takes 1/{unmasked[seconds] / masked[seconds]:.2f} "
                f"of an unmasked one's {'time' if on_gpu else 'CPU time'}"
            )
    return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    """Where and with what the figures came about."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the training step.")
    parser.add_argument("--gpu", action="store_true", help="XL/2 in bfloat16 on the first GPU")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes; default: 16, on a GPU 32 64 128")
    parser.add_argument("--remat", choices=REMAT, default="dots", help="what the backward pass computes again")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each; the median is kept")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, without --gpu")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    if arguments.gpu and jax.default_backend() != "gpu":
        print(f"skipped: JAX finds no GPU here, only {jax.devices()[0].device_kind}; see requirements.txt.")
        return 0
    if not arguments.gpu:
        jax.config.update("jax_platforms", "cpu")
        if hasattr(os, "sched_setaffinity"):  # before JAX makes its threads
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    jax.config.update("jax_enable_compilation_cache", False)  # compile seconds are one of the figures

    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    size, dtype, steps = ("MicroDiT_XL_2", "bfloat16", 10) if arguments.gpu else ("MicroDiT_Tiny_2", "float32", 1)
    print(f"{size}, {dtype}, {RESOLUTION} px, captions of {CAPTION_TOKENS} tokens; {versions}")
    cpu = f"{machine['cpu']}, {machine['threads']} threads, load before {machine['load_before']:.1f}"
    print(f"{machine['device']} ({cpu})")
    rows: list[dict[str, Any]] = []
    for batch_size in arguments.batch or ([32, 64, 128] if arguments.gpu else [16]):
        rows += measure(size, dtype, arguments.remat, batch_size, arguments.repeats, steps)
    print(table(rows, arguments.gpu))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
