"""Draws the curves of a run, and everything else that a finished run leaves to look at."""

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
    """Writes final.png, progress.gif and curves.png.

    Args:
        workdir: The work directory.
        phases: Name, first and last step of each phase.
        meta: Counters at the end of the run.
        example: A prompt for the last line.

    Returns:
        A summary, with the files in the work directory.
    """
    made = []
    if frames := sorted((workdir / "samples").glob("step_*.png")):
        shutil.copyfile(frames[-1], workdir / "final.png")
        save_gif([Image.open(frame) for frame in frames], workdir / "progress.gif", seconds_per_frame=0.4)
        made += ["final.png (samples)", "progress.gif (how they came about)"]
    if (metrics := workdir / "metrics.jsonl").exists():  # not if nothing was to be logged
        plot_curves(read_metrics(metrics), workdir / "curves.png", phases)
        made += ["curves.png", "metrics.jsonl", "tensorboard/"]
    made.append("checkpoints/")
    spent = f", ${meta.dollars:.2f}" if meta.dollars else ""
    lines = [
        f"done: {meta.step:,} steps, {meta.images:,} images, {meta.seconds / 60:.1f} minutes{spent}",
        f"in {workdir}: {', '.join(made)}",
    ]
    if example:
        command = f'python -m micro_dit.sample --workdir={workdir} --prompt="{example}" --out=picture.png'
        lines.append(f"draw your own: {command}")
    return "\n".join(lines)


def plot_curves(
    metrics: Sequence[Mapping[str, float]],
    path: str | os.PathLike,
    phases: Sequence[tuple[str, int, int]] = (),
    title: str | None = None,
) -> None:
    """Draws training loss, held-out loss and learning rate over steps; whole file or none.

    Shown are the scalars "loss" (raw, faint, and smoothed), "heldout_loss", "heldout_loss_ema" and "learning_rate", and
    in a panel of its own the loss by noise level, if there are scalars "heldout_loss/sigma=…".

    Args:
        metrics: records as `read_metrics` gives them; each has "step".
        path: a .png, .svg or .pdf file.
        phases: (name, first step, last step) of each phase, shaded by turns and named.
        title: above everything.

    Raises:
        UserError: if no record has a loss.
    """
    import matplotlib
    from matplotlib.figure import Figure  # drawn without pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator

    steps, _ = _series(metrics, "loss")
    if not len(steps):
        raise UserError(f"There is no 'loss' in the metrics to draw {path} from: train for some steps first.")
    rates, by_sigma = _series(metrics, "learning_rate"), _loss_by_sigma(metrics)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5 if by_sigma else 8.5, 5), dpi=160, facecolor=PAPER, layout="constrained")
        panels: Any = [["loss", "sigma"], ["learning rate", "sigma"]]
        axes = figure.subplot_mosaic(
            [row[: 2 if by_sigma else 1] for row in panels[: 2 if len(rates[0]) else 1]],
            height_ratios=[4, 1][: 2 if len(rates[0]) else 1],
            width_ratios=[3, 1][: 2 if by_sigma else 1],
        )
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        _draw_losses(axes["loss"], metrics)
        over_steps = [axes["loss"]]
        if "learning rate" in axes:
            axes["learning rate"].plot(*rates, color=FAINT, linewidth=1.4)
            axes["learning rate"].set_ylim(bottom=0)
            axes["learning rate"].set_ylabel("learning rate")
            axes["learning rate"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            axes["loss"].tick_params(labelbottom=False)
            over_steps.append(axes["learning rate"])
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
    for name, label, color in (
        ("heldout_loss", "held out", HELDOUT),
        ("heldout_loss_ema", "held out, averaged weights", HELDOUT_EMA),
    ):
        x, y = _series(metrics, name)
        if len(x):
            marker = "o" if len(x) <= 40 else None
            panel.plot(x, y, color=color, linewidth=1.4, marker=marker, markersize=3.5, clip_on=False, label=label)
            smooth.append(y)
    # The axis is fitted to the smooth curves, not to the noise; logarithmic where they span more than a factor of four.
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
    """Shades every other phase, and names all above the first panel, in as many rows as the names need."""
    first, last = min((start for _, start, _ in phases), default=0), max((end for _, _, end in phases), default=1)
    rows: list[list[tuple[float, float]]] = []  # places taken, in fractions of the panel's width
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
    """The first evaluation, faint, and the last."""
    for step, alpha in {min(curves): 0.35, max(curves): 1.0}.items():
        x, y = zip(*curves[step], strict=True)
        panel.plot(x, y, color=HELDOUT, alpha=alpha, marker="o", markersize=3.5, label=f"step {step:,}")
    panel.set_xscale("log", subs=[])
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_ylim(0, 1.25 * panel.get_ylim()[1])  # room for the legend
    panel.set_xlabel("noise level σ")
    panel.set_ylabel("held-out loss")
    panel.legend(loc="upper right")


def _series(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one scalar."""
    pairs = [(record["step"], record[name]) for record in metrics if math.isfinite(record.get(name, math.nan))]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a thirtieth of the curve around each value; narrower at the start, where the curve is steep."""
    n, i = len(values), np.arange(len(values))
    reach = np.minimum(i, n // 60)
    first, end = i - reach, np.minimum(i + reach + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[first]) / (end - first)


def _loss_by_sigma(metrics: Sequence[Mapping[str, float]]) -> dict[int, list[tuple[float, float]]]:
    """For each step with scalars "heldout_loss/sigma=…": (sigma, loss), by growing sigma."""
    prefix, curves = "heldout_loss/sigma=", {}
    for record in metrics:
        points = [
            (float(name.removeprefix(prefix)), value)
            for name, value in record.items()
            if name.startswith(prefix) and math.isfinite(value)
        ]
        if points:
            curves[int(record["step"])] = sorted(points)
    return curves
