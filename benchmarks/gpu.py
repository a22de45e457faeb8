"""Compares micro_dit with its PyTorch twin on a GPU: the recipe's four phases, sampling, single layers, the loader.

    make bench-gpu                                  XL/2 in bfloat16, at most 8 minutes; writes runs/bench_gpu.json
    make bench-gpu ARGS=--resume                    keeps the results in that file and measures the missing ones
    make bench-gpu ARGS="--parts 'phase 4' loader"  only some parts
    make bench-gpu ARGS=--dry_run                   tests the program with a tiny network on the CPU

The results of each part are printed and written as soon as it is measured. Parts that exceed the time budget are
reported as skipped; --resume measures them later. In each part, micro_dit and the twin (benchmarks/torch_twin.py, with
bfloat16 autocast and torch.compile) run in separate processes. These compile at the same time, and then run one after
the other, so that each has the GPU to itself. A training step has 256 images, the batch per GPU in the paper, split
into the largest microbatches that fit.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, Failed, OutOfTime, Setting, describe_machine, twin_is_there
from micro_dit.models.flops import training_flops
from micro_dit.planning.chips import chip_of

OURS, TWIN = "micro_dit", "twin"
MODULES = {OURS: "benchmarks.jax_jobs", TWIN: "benchmarks.torch_jobs"}
# name: (pixels, mask ratio, images per microbatch to try first)
PHASES = {
    "phase 1": (256, 0.75, 256), "phase 2": (256, 0.0, 128), "phase 3": (512, 0.75, 128), "phase 4": (512, 0.0, 64),
}  # fmt: skip
ORDER = ("phase 1", "layers", "phase 3", "sampler", "phase 2", "phase 4", "loader")
STEP_IMAGES, SAMPLED_IMAGES, LAYER_IMAGES = 256, 16, 16
TINY = dict(
    dim=32, depth=1, head_dim=16, patch_mixer_depth=2, patch_mixer_dim=48, multiple_of=16, num_experts=2,
    experts_every_n=1, caption_channels=12,
)  # fmt: skip
RESERVE = 25.0  # seconds reserved for running the compiled programs
ENOUGH = 40.0  # minimum remaining seconds to start another part


class Bench:
    """The settings shared by all parts.

    Args:
        deadline: Value of time.monotonic() at which the time budget ends.
        contenders: The available ones of OURS and TWIN.
        dry_run: Whether to run a tiny network on the CPU.
        compiled: Whether the twin uses torch.compile.
    """

    def __init__(self, deadline: float, contenders: list[str], dry_run: bool, compiled: bool = True) -> None:
        self.deadline, self.contenders, self.dry_run, self.compiled = deadline, contenders, dry_run, compiled
        self.absent: dict[str, str] = {}  # contenders that cannot run, and the reasons

    def setting(self, pixels: int, mask_ratio: float, images: int, microbatch: int = 0) -> Setting:
        if self.dry_run:
            fields: dict[str, Any] = TINY | {"input_size": pixels // 64}
            images, microbatch = 4, 2 if microbatch < images else 4
            tiny: dict[str, Any] = dict(caption_tokens=4, compiled=self.compiled, steps=3)
            return Setting("Nano", fields, mask_ratio, images, microbatch, **tiny)
        fields = {"input_size": pixels // 8, "pos_interp_scale": pixels / 256}
        return Setting(
            "MicroDiT_XL_2", fields, mask_ratio, images, microbatch, dtype="bfloat16", compiled=self.compiled, gpu=True
        )  # fmt: skip

    def compete(self, job: str, setting: Setting) -> dict[str, dict[str, Any]]:
        """Returns the results of each contender, or {"failed": reason}.

        Both contenders compile at the same time; then the twin runs, and then micro_dit.
        """
        figures: dict[str, dict[str, Any]] = {name: {"failed": why} for name, why in self.absent.items()}
        with contextlib.ExitStack() as stack:
            cache = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            running = {}
            for name in (name for name in self.contenders if name not in self.absent):
                running[name] = stack.enter_context(Contender(f"{MODULES[name]}.{job}", setting, 2, cache))
                running[name].start("prepare")
            for name in (OURS, TWIN):
                if name in running:
                    with reason(figures, name):
                        figures[name] = running[name].answer(self.deadline - RESERVE)
            for name in (TWIN, OURS):
                if name in running and "failed" not in figures[name]:
                    with reason(figures, name):
                        figures[name] |= self.timed(running[name])
                if name in running:
                    running.pop(name).close(kill=True)  # frees its memory
        return figures

    def timed(self, contender: Contender) -> dict[str, Any]:
        """Returns the medians of five timings of about a second each, or of three if a run takes 3 seconds or more."""
        contender.ask("run", self.deadline, times=1)
        first = contender.ask("run", self.deadline, times=1)
        seconds = first.get("wall_s", 0.05)
        times, turns = max(1, round((0.1 if self.dry_run else 1.0) / seconds)), 5 if seconds < 3 else 3
        taken = [contender.ask("run", self.deadline, times=times) for _ in range(turns)]
        return {name: statistics.median(turn[name] for turn in taken) for name in first}


@contextlib.contextmanager
def reason(figures: dict[str, dict[str, Any]], name: str) -> Any:
    """Records the reason if a contender fails or runs out of time, so that the others can continue."""
    try:
        yield
    except (Failed, OutOfTime) as error:
        figures[name] = {"failed": str(error)}


def measure_phase(bench: Bench, name: str) -> dict[str, Any]:
    """Measures images/s, MFU, memory and compile seconds of a phase's training step."""
    pixels, mask_ratio, microbatch = PHASES[name]
    setting = bench.setting(pixels, mask_ratio, STEP_IMAGES, microbatch)
    figures = bench.compete("Training", setting)
    flops = training_flops(setting.network(), mask_ratio, setting.caption_tokens)
    chip = chip_of(next((row["device"] for row in figures.values() if "device" in row), ""))
    for row in figures.values():
        if "wall_s" in row:
            row["images_per_s"] = setting.batch_size / row["wall_s"]
            row["mfu"] = row["images_per_s"] * flops / chip.peak_flops if chip else None
    return {"pixels": pixels, "mask": mask_ratio, "batch": setting.batch_size} | figures


def measure_sampler(bench: Bench) -> dict[str, Any]:
    """Measures images/s of Heun's sampler with guidance at 512 px, without decoding."""
    setting = bench.setting(512, 0.0, SAMPLED_IMAGES)
    figures = bench.compete("Sampling", setting)
    for row in figures.values():
        if "wall_s" in row:
            row["images_per_s"] = setting.batch_size / row["wall_s"]
    return {"pixels": 512, "steps": setting.steps, "batch": setting.batch_size} | figures


def measure_layers(bench: Bench) -> dict[str, Any]:
    """Measures milliseconds of expert layers and token dropping, forward and backward.

    micro_dit dispatches with gathers, the twin with one-hot products.
    """
    setting = bench.setting(512, 0.75, LAYER_IMAGES)
    return {"pixels": 512, "batch": setting.batch_size} | bench.compete("Layers", setting)


def measure_loader(bench: Bench) -> dict[str, Any]:
    """Runs benchmarks/loader.py and returns its medians."""
    if importlib.util.find_spec("streaming") is None:
        raise Failed("mosaicml-streaming is not installed; see benchmarks/loader.py.")
    small = ["--records=64", "--batch_size=8", "--images=64", "--turns=1", "--workers", "1"]
    size = small if bench.dry_run else ["--turns=2", "--cores=8", "--workers", "4", "8"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loader.json"
        command = [sys.executable, "-m", "benchmarks.loader", *size, f"--json={path}"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=Path(__file__).parents[1],
                timeout=max(bench.deadline - time.monotonic(), 1),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise OutOfTime("The loader benchmark did not finish in time.") from None
        if done.returncode:
            raise Failed(done.stderr.strip().splitlines()[-1])
        return json.loads(path.read_text())["medians"]


def measure_part(bench: Bench, part: str) -> dict[str, Any]:
    others: Mapping[str, Callable[[Bench], dict[str, Any]]] = {
        "sampler": measure_sampler, "layers": measure_layers, "loader": measure_loader
    }  # fmt: skip
    return measure_phase(bench, part) if part in PHASES else others[part](bench)


def table(results: Mapping[str, Any]) -> str:
    """Formats the results as a table."""
    parts = results["parts"]
    lines = ["part     px  mask  contender  images/s    MFU  peak GB  microbatch  compile s  warm s  ours/twin"]
    for name in (*PHASES, "sampler"):
        if name not in parts:
            continue
        row = parts[name]
        ratio = ratio_of(row)
        for who in (OURS, TWIN):
            figures = row.get(who, {})
            if "images_per_s" not in figures:
                continue
            mfu, warm = figures.get("mfu"), figures.get("warm_compile_s")
            lines.append(
                f"{name:8}{row['pixels']:4}  {row.get('mask', 0):4.0%}  {who:10}{figures['images_per_s']:9.2f}  "
                f"{'–' if mfu is None else f'{mfu:.1%}':>5}  {figures['peak_gb']:7.1f}  "
                f"{figures.get('microbatch', '–'):>10}  {figures['compile_s']:9.1f}  "
                f"{'–' if warm is None else f'{warm:.1f}':>6}" + (f"{ratio:11.2f}" if ratio and who == OURS else "")
            )
    for figure in ("expert_layer_ms", "expert_dispatch_ms", "token_drop_ms"):
        row = parts.get("layers", {})
        found = [f"{who} {row[who][figure]:.2f} ms" for who in (OURS, TWIN) if figure in row.get(who, {})]
        if found:
            lines.append(f"{figure.removesuffix('_ms').replace('_', ' ')}, forward and backward: {', '.join(found)}")
    for who, row in parts.get("loader", {}).items():
        lines.append(f"loader, {who}: {row['images/s']:,.0f} images/s")
    lines += [f"skipped: {part}: {why}" for part, why in results["left_out"].items()]
    return "\n".join(lines)


def ratio_of(row: Mapping[str, Any]) -> float | None:
    """Returns the ratio of micro_dit's images/s to the twin's, or None if either is missing."""
    speeds = [row.get(who, {}).get("images_per_s") for who in (OURS, TWIN)]
    return speeds[0] / speeds[1] if all(speeds) else None


def hello(bench: Bench) -> str:
    """Returns the GPU's name, and records contenders that cannot run in `bench.absent`."""
    devices: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        setting = bench.setting(256, 0.0, 1)
        jobs = {name: f"{MODULES[name]}.Device" for name in bench.contenders}
        running = {name: stack.enter_context(Contender(job, setting, 2, cache)) for name, job in jobs.items()}
        for contender in running.values():
            contender.start("hello")
        for name, contender in running.items():
            with reason(devices, name):
                devices[name] = contender.answer(bench.deadline)
    bench.absent = {name: answer["failed"] for name, answer in devices.items() if "failed" in answer}
    return devices[OURS].get("device", "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=ORDER, default=ORDER, help="parts to measure, in this order")
    parser.add_argument("--budget", type=float, default=460.0, help="time budget in seconds")
    parser.add_argument("--json", type=Path, help="file for the results; by default runs/bench_gpu.json")
    parser.add_argument("--resume", action="store_true", help="keep the results in that file and measure the rest")
    parser.add_argument("--dry_run", action="store_true", help="test the program with a tiny network on the CPU")
    parser.add_argument("--eager", action="store_true", help="run the twin without torch.compile")
    options = parser.parse_args(argv)
    options.json = options.json or Path("runs", "bench_gpu.json")

    if options.dry_run:  # otherwise code optimization would take most of the time
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    contenders = [OURS, TWIN] if twin_is_there() else [OURS]
    compiled = not (options.eager or options.dry_run)  # compiling C++ for a CPU takes minutes
    bench = Bench(time.monotonic() + options.budget, contenders, options.dry_run, compiled)
    machine, device = describe_machine(), hello(bench)
    if OURS in bench.absent:
        print(f"skipped: {bench.absent[OURS]}")
        return 0
    if TWIN in bench.absent:
        print(f"Skipping the PyTorch twin: {bench.absent[TWIN]}")
        bench.contenders.remove(TWIN)
    results: dict[str, Any] = {"parts": {}}
    if options.resume and options.json.exists():
        results["parts"] = json.loads(options.json.read_text())["parts"]
    results |= {"machine": machine, "device": device, "dry_run": options.dry_run}
    results["left_out"] = {}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    print(f"{device}; {', '.join(f'{name} {version}' for name, version in machine['versions'].items())}", flush=True)

    for part in (part for part in options.parts if not whole(results["parts"].get(part, {}), bench)):
        started = time.monotonic()
        try:
            if bench.deadline - started < ENOUGH:
                raise OutOfTime("The time budget is used up.")
            figures = measure_part(bench, part)
            results["parts"][part] = figures
            rows = {who: figures.get(who, {}) for who in bench.contenders}
            if failed := [f"{who}: {row['failed']}" for who, row in rows.items() if "failed" in row]:
                results["left_out"][part] = "; ".join(failed)
        except (OutOfTime, Failed) as error:
            results["left_out"][part] = str(error)
        print(f"{part} ({time.monotonic() - started:.0f} s): {summary(results, part)}", flush=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    print("\n" + table(results))
    if results["left_out"]:
        print(
            f"To measure the skipped parts, run the same command with --resume. It keeps the results in {options.json}."
        )
    return 0


def whole(figures: Mapping[str, Any], bench: Bench) -> bool:
    """Returns whether a part has results of all contenders."""
    rows = [figures.get(name) for name in bench.contenders] if OURS in figures else list(figures.values())
    return bool(rows) and all(row and "failed" not in row for row in rows)


def summary(results: Mapping[str, Any], part: str) -> str:
    """Formats the results of a part as one line."""
    rows = {who: results["parts"].get(part, {}).get(who, {}) for who in (OURS, TWIN)}
    found = [f"{who} {row['images_per_s']:.2f} images/s" for who, row in rows.items() if "images_per_s" in row]
    if part in results["left_out"]:
        found.append(f"skipped: {results['left_out'][part]}")
    return ", ".join(found) or "done"


if __name__ == "__main__":
    sys.exit(main())
