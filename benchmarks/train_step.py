"""Compares the training step of micro_dit with that of its PyTorch twin on the CPU.

    make bench                                     MicroDiT-Tiny/2 at 256 px on two CPU threads
    make bench ARGS=--without_compile              without torch.compile, whose C++ compiler takes minutes at first
    make bench ARGS=--json=PATH                    also writes the results to a file
    make bench ARGS=--update_baseline              stores the results as the baseline of later runs

A step is a full float32 training step without EMA: forward, backward, gradient clipping and AdamW. The contenders are
micro_dit and benchmarks/torch_twin.py, the latter both eager and with torch.compile. Each runs in a separate process.
They take turns, one step at a time, while the others sleep, and the results are medians. On a shared machine, CPU
seconds are more reliable than wall seconds.

Times of different machines are not comparable, but ratios to the eager twin in the same run are. The ratios are
compared with benchmarks/baseline.json. A ratio that is more than 10% worse is a regression and sets the exit status
to 1.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, Setting, describe_machine, twin_is_there
from micro_dit.models.config import REMAT, SIZES
from micro_dit.models.flops import training_flops

MASK_RATIOS = (0.75, 0.0)
OURS, EAGER, COMPILED = "micro_dit", "twin, eager", "twin, torch.compile"
BASELINE = Path(__file__).with_name("baseline.json")
REGRESSION = 1.1  # factor over the baseline from which a ratio counts as a regression


def measure(setting: Setting, names: Sequence[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """Times the training steps of all contenders, and returns a row of results for each.

    Args:
        setting: Workload of a step.
        names: Names of the contenders.
        repeats: Number of timed steps of each contender.
        threads: Number of CPU threads.
    """
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        contenders = []
        for name in names:
            job = "benchmarks.jax_jobs.Training" if name == OURS else "benchmarks.torch_jobs.Training"
            own = {**vars(setting), "compiled": name == COMPILED}
            contender = stack.enter_context(Contender(job, Setting(**own), threads))
            prepared = contender.ask("prepare")
            contender.ask("run", times=1)  # warm-up
            contenders.append(contender)
            rows.append({"contender": name, "mask": setting.mask_ratio, "batch": setting.batch_size} | prepared)
        turns = [[contender.ask("run", times=1) for contender in contenders] for _ in range(repeats)]
    flops = training_flops(setting.network(), setting.mask_ratio, setting.caption_tokens) * setting.batch_size
    for row, taken in zip(rows, zip(*turns, strict=True), strict=True):
        for seconds in ("wall_s", "cpu_s"):
            row[f"all_{seconds}"] = [turn[seconds] for turn in taken]
            row[seconds] = statistics.median(row[f"all_{seconds}"])
        row["peak_gb"] = taken[-1]["peak_gb"]
        row["images_per_s"] = setting.batch_size / row["wall_s"]
        row["gflops_per_cpu_s"] = flops / row["cpu_s"] / 1e9
    return rows


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the ratios of micro_dit to the twin in the same run, which are comparable between machines.

    Smaller is better for all of them. The ratio of a masked to an unmasked step is not included, because it gets worse
    when unmasked steps get faster.
    """
    found = {}
    for mask in dict.fromkeys(row["mask"] for row in rows):
        row = {row["contender"]: row for row in rows if row["mask"] == mask}
        if EAGER not in row:
            continue
        ours, eager = row[OURS], row[EAGER]
        if COMPILED in row:
            best = min(eager["cpu_s"], row[COMPILED]["cpu_s"])
            found[f"mask {mask:.0%}: CPU seconds, micro_dit / best of the twins"] = ours["cpu_s"] / best
        found |= {
            f"mask {mask:.0%}: CPU seconds, micro_dit / eager twin": ours["cpu_s"] / eager["cpu_s"],
            f"mask {mask:.0%}: peak memory, micro_dit / eager twin": ours["peak_gb"] / eager["peak_gb"],
            f"mask {mask:.0%}: compiling micro_dit / a step of the eager twin, CPU seconds":
                ours["compile_cpu_s"] / eager["cpu_s"],
        }  # fmt: skip
    return found


def compare(found: Mapping[str, float], of: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> tuple[str, int]:
    """Compares ratios with a baseline.

    Args:
        found: Ratios of this run.
        of: Settings of this run; it is not compared with a baseline of other settings.
        baseline: Baseline as written by `--update_baseline`, or None.

    Returns:
        A table of the ratios, and the number of regressions.
    """
    comparable = baseline is not None and baseline["of"] == of
    before = baseline["ratios"] if baseline is not None and comparable else {}
    lines, regressions = [f"{'ratio (lower is better)':72}  now  baseline"], []
    for name, ratio in found.items():
        lines.append(f"{name:72}{ratio:5.2f}" + (f"{before[name]:10.2f}" if name in before else "         –"))
        if name in before and ratio > REGRESSION * before[name]:
            regressions.append(f"regression: {name} is {ratio:.2f}, {ratio / before[name] - 1:.0%} over the baseline")
    if baseline is None:
        lines.append(f"There is no {BASELINE.name} to compare with. Run with --update_baseline to write it.")
    elif not comparable:
        lines.append(f"Not compared with {BASELINE.name}, which has other settings: {baseline['of']}.")
    return "\n".join(lines + regressions), len(regressions)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the results as a table."""
    lines = ["mask  contender              CPU-s/step  s/step  images/s  GFLOP/CPU-s  peak GB  compile CPU-s (s)"]
    for row in rows:
        lines.append(
            f"{row['mask']:4.0%}  {row['contender']:22} {row['cpu_s']:10.2f}  {row['wall_s']:6.2f}  "
            f"{row['images_per_s']:8.2f}  {row['gflops_per_cpu_s']:11.0f}  {row['peak_gb']:7.1f}  "
            f"{row['compile_cpu_s']:13.1f} ({row['compile_s']:.1f})"
        )
    by_name: dict[str, list[float]] = {}
    for row in rows:
        by_name.setdefault(row["contender"], []).append(row["cpu_s"])
    for name, seconds in by_name.items():
        if len(seconds) == len(MASK_RATIOS):
            masked, unmasked = seconds
            lines.append(f"{name}: an unmasked step takes {unmasked / masked:.2f}× the CPU time of a masked step")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="MicroDiT_Tiny_2")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--remat", choices=REMAT, default="dots", help="micro_dit's rematerialization policy")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per contender; the median is used")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--without_compile", action="store_true", help="skip the twin with torch.compile")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="file of the baseline")
    parser.add_argument(
        "--update_baseline", action="store_true", help="write the baseline instead of comparing with it"
    )
    options = parser.parse_args(argv)

    if hasattr(os, "sched_setaffinity"):  # inherited by the contenders
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    names = [OURS]
    if twin_is_there():
        names += [EAGER] if options.without_compile else [EAGER, COMPILED]
    of = {"size": options.size, "pixels": 256, "dtype": "float32", "batch": options.batch, "threads": options.threads}
    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{options.size}, float32, 256 px, batch {options.batch}, captions of 77 tokens; {versions}")
    print(f"{machine['cpu']}, {machine['threads']} threads, load before {machine['load_before']:.1f}", flush=True)

    rows: list[dict[str, Any]] = []
    for mask_ratio in MASK_RATIOS:
        setting = Setting(options.size, {"input_size": 32}, mask_ratio, options.batch, remat=options.remat)
        rows += measure(setting, names, options.repeats, options.threads)
        print(table(rows) + "\n", flush=True)
    found = ratios(rows)
    baseline = json.loads(options.baseline.read_text()) if options.baseline.exists() else None
    regressions = 0
    if not found:
        print("Not compared with the baseline, because its ratios require the PyTorch twin.")
    elif options.update_baseline:
        report = {"of": of, "ratios": {name: round(ratio, 4) for name, ratio in found.items()}, "machine": machine}
        options.baseline.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {options.baseline}")
    else:
        text, regressions = compare(found, of, baseline)
        print(text)
    if options.json:
        figures = {"of": of, "machine": machine, "rows": rows, "ratios": found}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
