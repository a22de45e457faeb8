"""Writes the plots and images of a finished run."""

import math
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from micro_dit.errors import UserError
from micro_dit.files import replacing
from micro_dit.images import FAINT, HELDOUT, HELDOUT_EMA, INK, PAPER, STYLE, TRAIN, save_gif
from micro_dit.training.checkpoint import Meta
from micro_dit.training.metrics import read_metrics


def finish(workdir: pathlib.Path, phases: Sequence[tuple[str, int, int]], meta: Meta, example: str | None) -> str:
    """Writes final.png, progress.gif and curves.png, and returns a summary of the run.

    Args:
        workdir: Work directory of the run.
        phases: Name, first step and last step of each phase.
        meta: Metadata of the last checkpoint.
        example: Prompt of the sampling command in the summary; None leaves the command out.
    """
    written = []
    if frames := sorted((workdir / "samples").glob("step_*.png")):
        shutil.copyfile(frames[-1], workdir / "final.png")
        save_gif([Image.open(frame) for frame in frames], workdir / "progress.gif", seconds_per_frame=0.4)
        written += ["final.png (samples)", "progress.gif (samples over the steps)"]
    if (metrics := workdir / "metrics.jsonl").exists():  # missing if logging is disabled
        plot_curves(read_metrics(metrics), workdir / "curves.png", phases)
        written += ["curves.png", "metrics.jsonl", "tensorboard/"]
    written.append("checkpoints/")
    spent = f", ${meta.dollars:.2f}" if meta.dollars else ""
    lines = [
        f"Finished: {meta.step:,} steps, {meta.images:,} images, {meta.seconds / 60:.1f} minutes{spent}",
        f"Files in {workdir}: {', '.join(written)}",
    ]
    if example:
        command = f'python -m micro_dit.sample --workdir={workdir} --prompt="{example}" --out=sample.png'
        lines.append(f"To sample an image: {command}")
    return "\n".join(lines)


def plot_curves(
    metrics: Sequence[Mapping[str, float]],
    path: str | os.PathLike,
    phases: Sequence[tuple[str, int, int]] = (),
    title: str | None = None,
) -> None:
    """Plots training loss, held-out loss and learning rate over steps, and held-out loss over noise levels.

    Args:
        metrics: Records as `read_metrics` returns them.
        path: A .png, .svg or .pdf file, written atomically.
        phases: Name, first and last step of each phase.
        title: Title of the figure.

    Raises:
        UserError: No record has a loss.
    """
    import matplotlib
    from matplotlib.figure import Figure  # used without pyplot, which needs a display and changes global state
    from matplotlib.ticker import MaxNLocator

    steps, _ = _series(metrics, "loss")
    if not len(steps):
        raise UserError(f"{path} can't be plotted because the metrics contain no 'loss'. Train for some steps first.")
    rates, by_sigma = _series(metrics, "learning_rate"), _loss_by_sigma(metrics)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5 if by_sigma else 8.5, 5), dpi=160, facecolor=PAPER, layout="constrained")
        rows, columns = 2 if len(rates[0]) else 1, 2 if by_sigma else 1
        panels: Any = [row[:columns] for row in (["loss", "sigma"], ["learning rate", "sigma"])[:rows]]
        axes = figure.subplot_mosaic(panels, height_ratios=[4, 1][:rows], width_ratios=[3, 1][:columns])
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        _draw_losses(axes["loss"], metrics)
        over_steps = [axes["loss"]]
        if panel := axes.get("learning rate"):
            panel.plot(*rates, color=FAINT, linewidth=1.4)
            panel.set(ylim=(0, None), ylabel="learning rate")
            panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            axes["loss"].tick_params(labelbottom=False)
            over_steps.append(panel)
        _draw_phases(over_steps, phases)
        first = min([steps[0], *(start for _, start, _ in phases)])
        last = max([steps[-1], *(end for _, _, end in phases)])
        for panel in over_steps:
            panel.set_xlim(first, max(last, first + 1))
            panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        over_steps[-1].set_xlabel("step")
        if by_sigma:
            _draw_loss_by_sigma(axes["sigma"], by_sigma)
        with replacing(path) as temporary:
            figure.savefig(temporary, format=pathlib.Path(path).suffix.lstrip(".") or "png", facecolor=PAPER)


def _draw_losses(panel: Any, metrics: Sequence[Mapping[str, float]]) -> None:
    steps, losses = _series(metrics, "loss")
    smooth = [_smooth(losses)]
    panel.plot(steps, losses, color=TRAIN, alpha=0.22, linewidth=0.8)
    panel.plot(steps, smooth[0], color=TRAIN, linewidth=1.8, label="training")
    for suffix, label, color in ("", "held-out", HELDOUT), ("_ema", "held-out, EMA weights", HELDOUT_EMA):
        x, y = _series(metrics, f"heldout_loss{suffix}")
        if len(x):
            marker = "o" if len(x) <= 40 else None
            panel.plot(x, y, color=color, linewidth=1.4, marker=marker, markersize=3.5, clip_on=False, label=label)
            smooth.append(y)
    # The limits follow the smoothed curves, so that noise does not set them. The axis is logarithmic if the curves span
    # more than a factor of four.
    low, high = np.concatenate(smooth).min(), np.concatenate(smooth).max()
    if low > 0 and high / low > 4:
        panel.set_yscale("log", subs=[])
        panel.set_ylim(low / 1.2, high * 1.3)
        panel.yaxis.get_major_locator().set_params(subs=(1, 2, 3, 5, 7) if high / low < 50 else (1,))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        panel.set_ylim(low - room, high + room)
    panel.set_ylabel("loss")
    panel.legend(loc="upper right")


def _draw_phases(panels: Sequence[Any], phases: Sequence[tuple[str, int, int]]) -> None:
    """Shades every other phase and writes the names above the first panel, in several rows if they would overlap."""
    first, last = min((start for _, start, _ in phases), default=0), max((end for _, _, end in phases), default=1)
    rows: list[list[tuple[float, float]]] = []  # occupied intervals of each row, in fractions of the panel's width
    for i, (name, start, end) in enumerate(phases):
        for panel in panels:
            panel.axvspan(start, end, color=INK, alpha=0.05 if i % 2 else 0.0, linewidth=0)
        left, width = (start - first) / (last - first), 0.012 * len(name)
        at, side = (start, "left") if left + width < 1 else (end, "right")
        left = left if side == "left" else (end - first) / (last - first) - width
        free = (r for r, taken in enumerate(rows) if all(left > b or left + width < a for a, b in taken))
        if (row := next(free, len(rows))) == len(rows):
            rows.append([])
        rows[row].append((left, left + width))
        panels[0].annotate(
            name, (at, 1), xycoords=("data", "axes fraction"), ha=side,
            xytext=(0, 3 + 11 * row), textcoords="offset points", color=FAINT, fontsize=8,
        )  # fmt: skip


def _draw_loss_by_sigma(panel: Any, curves: Mapping[int, list[tuple[float, float]]]) -> None:
    """Plots the losses of the first evaluation (faint) and of the last one over the noise level."""
    for step, alpha in {min(curves): 0.35, max(curves): 1.0}.items():
        x, y = zip(*curves[step], strict=True)
        panel.plot(x, y, color=HELDOUT, alpha=alpha, marker="o", markersize=3.5, label=f"step {step:,}")
    panel.set_xscale("log", subs=[])
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_ylim(0, 1.25 * panel.get_ylim()[1])  # room for the legend
    panel.set(xlabel="noise level σ", ylabel="held-out loss")
    panel.legend(loc="upper right")


def _series(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of one scalar, without values that are not finite."""
    pairs = [(record["step"], record[name]) for record in metrics if math.isfinite(record.get(name, math.nan))]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Averages over a window of a thirtieth of the curve; the window is shorter at the start, where it is steep."""
    n, i = len(values), np.arange(len(values))
    reach = np.minimum(i, n // 60)
    first, end = i - reach, np.minimum(i + reach + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[first]) / (end - first)


def _loss_by_sigma(metrics: Sequence[Mapping[str, float]]) -> dict[int, list[tuple[float, float]]]:
    """Returns the (sigma, loss) pairs in ascending sigma for each step that has scalars "heldout_loss/sigma=…"."""
    prefix, curves = "heldout_loss/sigma=", {}
    for record in metrics:
        losses = {name: loss for name, loss in record.items() if name.startswith(prefix) and math.isfinite(loss)}
        if losses:
            curves[int(record["step"])] = sorted((float(name.removeprefix(prefix)), y) for name, y in losses.items())
    return curves
