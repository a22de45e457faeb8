"""What a run says in words and pictures before it starts and after it ends."""

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from micro_dit.models.config import DiTConfig
from micro_dit.planning.chips import Chip
from micro_dit.planning.cost import estimate_cost
from micro_dit.training.phases import Phase


def parameter_table(params: Mapping[str, Any]) -> str:
    """The parameters by part of the network, as clu draws them: blocks are added up, or the table would fill pages."""
    import jax
    import numpy as np
    from clu import parameter_overview

    parts: dict[str, int] = {}
    for name, leaf in params.items():
        words = name.split(".")
        part = ".".join(words[:2]) if words[0] in ("blocks", "mixer") else words[0]
        parts[part] = parts.get(part, 0) + int(np.prod(leaf.shape))
    order = sorted(parts, key=lambda part: [int(w) if w.isdigit() else -1 for w in part.split(".")] + [0])
    order.sort(key=lambda part: ("mixer" in part) + 2 * part.startswith("blocks") + 3 * part.startswith("final"))
    shapes = {part: jax.ShapeDtypeStruct((parts[part],), np.float32) for part in order}
    return parameter_overview.get_parameter_overview(shapes, include_stats=False)


def plan_table(
    networks: Sequence[DiTConfig], phases: Sequence[Phase], chip: Chip, devices: int, mfu: float,
    dollars_per_device_hour: float, caption_tokens: int,
) -> str:  # fmt: skip
    """Phases, steps, FLOPs, predicted time and dollars."""
    return estimate_cost(
        networks, phases, chip, devices, mfu=mfu, price=dollars_per_device_hour, caption_tokens=caption_tokens
    ).table()


def compile_step(
    phase: str, step: Any, arguments: Sequence[Any], say: Callable[[str], None], every: float = 15.0
) -> Any:
    """Compiles a jitted step for its arguments; says every so many seconds that it is at it, and at the end what came.

    The last line tells seconds, memory and FLOPs.
    """
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(every):
            say(f"{phase}: compiling, {time.monotonic() - started:.0f} s")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        compiled = step.lower(*arguments).compile()
    finally:
        done.set()
        teller.join()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    parts = [f"{phase}: compiled in {time.monotonic() - started:.1f} s"]
    if memory is not None:
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        parts.append(f"{peak / 2**30:.2f} GiB per device ({memory.temp_size_in_bytes / 2**30:.2f} temporary)")
    if cost.get("flops", 0) > 0:
        parts.append(f"{cost['flops'] / 1e9:,.1f} GFLOP per step and device")
    say(", ".join(parts))
    return compiled


def finish(workdir: Path, phases: Sequence[tuple[str, int, int]], meta: Mapping[str, Any], example: str | None) -> str:
    """Makes final.png, progress.gif and curves.png, and says where everything is.

    Args:
        workdir: of the run.
        phases: name, first and last step of each.
        meta: counters at the end.
        example: a prompt for the closing line.
    """
    from PIL import Image

    from micro_dit.images import save_gif
    from micro_dit.training.curves import plot_curves
    from micro_dit.training.metrics import read_metrics

    made = []
    if frames := sorted((workdir / "samples").glob("step_*.png")):
        shutil.copyfile(frames[-1], workdir / "final.png")
        save_gif([Image.open(frame) for frame in frames], workdir / "progress.gif", seconds_per_frame=0.4)
        made += ["final.png (samples)", "progress.gif (how they came about)"]
    if (metrics := workdir / "metrics.jsonl").exists():  # not if nothing was to be logged
        plot_curves(read_metrics(metrics), workdir / "curves.png", phases)
        made += ["curves.png", "metrics.jsonl", "tensorboard/"]
    made.append("checkpoints/")
    spent = f", ${meta['dollars']:.2f}" if meta["dollars"] else ""
    lines = [
        f"done: {meta['step']:,} steps, {meta['images']:,} images, {meta['seconds'] / 60:.1f} minutes{spent}",
        f"in {workdir}: {', '.join(made)}",
    ]
    if example:
        command = f'python -m micro_dit.sample --workdir={workdir} --prompt="{example}" --out=picture.png'
        lines.append(f"draw your own: {command}")
    return "\n".join(lines)
