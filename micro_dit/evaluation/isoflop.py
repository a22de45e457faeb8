"""The table and the plot of a comparison at equal training FLOPs.

The result of a run is a mapping with "name" (of the recipe), "budget", "seed", "flops", "parameters", "images" and
"measures" (metric values by name). It may also have "training_seconds" and "curve", pairs of training FLOPs and
held-out loss in ascending order.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from micro_dit.files import replacing
from micro_dit.images import PAPER, STYLE

Result = Mapping[str, Any]

COLUMNS = {
    "heldout_loss": "held-out loss",
    "heldout_loss (raw)": "held-out loss, raw weights",
    "latent_frechet": "latent Fréchet distance",
    "caption_retrieval_top1": "caption retrieval, top 1",
    "caption_retrieval_top5": "caption retrieval, top 5",
}
PANELS = ("latent_frechet", "caption_retrieval_top5")
LEVEL = "heldout_loss/sigma="
COLORS = ("#3b6ea8", "#d07a2d", "#3f8f5f", "#a8486e", "#7a6bb0", "#8a857a")


def grouped(results: Sequence[Result]) -> list[tuple[str, float, list[Result]]]:
    """Groups results by recipe and budget.

    Returns:
        (recipe, budget, results of all seeds), sorted by budget and then by mean held-out loss.
    """
    groups: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result["name"], result["budget"]), []).append(result)

    def rank(key: tuple[str, float]) -> tuple[float, float]:
        return key[1], statistics.fmean(values(groups[key], "heldout_loss") or [0.0])

    return [(*key, groups[key]) for key in sorted(groups, key=rank)]


def values(group: Sequence[Result], measure: str) -> list[float]:
    """Returns the values of a metric for the runs that have it."""
    return [result["measures"][measure] for result in group if measure in result["measures"]]


def mean_curve(group: Sequence[Result]) -> list[tuple[float, float]]:
    """Returns the mean held-out loss during training as (training FLOPs, loss) in ascending order.

    Runs without a curve are ignored. The result has the FLOPs at which all other runs were evaluated.
    """
    curves = [dict(result["curve"]) for result in group if result.get("curve")]
    shared = set.intersection(*map(set, curves)) if curves else set()
    return [(flops, statistics.fmean(curve[flops] for curve in curves)) for flops in sorted(shared)]


def flops_to_reach(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Returns the training FLOPs at which a curve first reaches a loss, or None if it never does.

    Args:
        curve: (training FLOPs, loss) in ascending order. Between two points, the loss is interpolated linearly in the
            logarithm of the FLOPs. If the first point is at or below the loss, its FLOPs are returned.
        loss: The loss to reach.
    """
    for index, (flops, reached) in enumerate(curve):
        if reached > loss:
            continue
        if index == 0:
            return flops
        before, above = curve[index - 1]
        return before * (flops / before) ** ((above - loss) / (above - reached))
    return None


def results_table(results: Sequence[Result], baseline: str | None = None) -> str:
    """Returns a Markdown table with a row for each recipe and budget: mean ± standard deviation over its seeds.

    Args:
        results: Results of runs.
        baseline: Name of the baseline recipe. If it has a curve, the last column is the fraction of the budget at which
            each recipe reaches the final held-out loss of the baseline with the same budget.
    """
    measured, groups = [name for name in COLUMNS if values(results, name)], grouped(results)
    curves = {(name, budget): mean_curve(group) for name, budget, group in groups}
    targets = {budget: curve[-1][1] for (name, budget), curve in curves.items() if name == baseline and curve}
    timed = any("training_seconds" in result for result in results)
    head = ["FLOPs", "recipe", "parameters", "images", "seeds", *(COLUMNS[name] for name in measured)]
    head += ["seconds"] * timed + [f"fraction of FLOPs to reach {baseline}"] * bool(targets)
    rows = [head, ["---"] * len(head)]
    for name, budget, group in groups:
        parameters, images = f"{group[0]['parameters'] / 1e6:.2f} M", f"{group[0]['images']:,}"
        row = [f"{budget:.3g}", name, parameters, images, str(len(group))]
        row += [_spread(values(group, measure)) for measure in measured]
        if timed:
            seconds = [result["training_seconds"] for result in group if "training_seconds" in result]
            row.append(f"{statistics.fmean(seconds):,.0f}" if seconds else "–")
        if targets:
            row.append(_fraction_to_reach(targets.get(budget), curves[name, budget], budget))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _fraction_to_reach(loss: float | None, curve: Sequence[tuple[float, float]], budget: float) -> str:
    if loss is None or not curve:
        return "–"
    flops = flops_to_reach(curve, loss)
    return "not reached" if flops is None else f"{flops / budget:.2f}"


def _spread(numbers: Sequence[float]) -> str:
    mean = f"{statistics.fmean(numbers):.4g}" if numbers else "–"
    return f"{mean} ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else mean


def plot_isoflop(results: Sequence[Result], path: str | Path) -> None:
    """Plots a comparison of at least one run to a .png file.

    The first panel shows the held-out loss during training. The middle panels show metrics at the end of training
    against the budget, with a line through the means of each recipe and a dot for each run. The last panel shows the
    held-out loss by noise level at the largest budget, relative to the best recipe.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    path, groups = Path(path), grouped(results)
    budgets = sorted({budget for _, budget, _ in groups})
    largest = [group for group in groups if group[1] == budgets[-1]]
    names = list(dict.fromkeys(name for name, _, _ in largest + groups))
    colors = dict(zip(names, itertools.cycle(COLORS), strict=False))
    measured = [name for name in PANELS if values(results, name)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * (len(measured) + 2), 4), dpi=160, facecolor=PAPER, layout="constrained")
        over_training, *panels, by_level = figure.subplots(1, len(measured) + 2, squeeze=False)[0]
        _plot_curves(over_training, groups, colors)
        for panel, measure in zip(panels, measured, strict=True):
            for i, name in enumerate(names):
                beside = 1.015 ** (i - (len(names) - 1) / 2)  # a small offset, so that recipes do not overlap
                runs = {budget * beside: values(group, measure) for n, budget, group in groups if n == name}
                means = {x: statistics.fmean(numbers) for x, numbers in runs.items() if numbers}
                panel.plot(list(means), list(means.values()), "o-", color=colors[name], linewidth=1.6)
                for x in means:
                    panel.plot([x] * len(runs[x]), runs[x], ".", color=colors[name], alpha=0.6, markersize=4)
            panel.set_xscale("log", subs=[])
            panel.set_xticks(budgets, [_flops_label(budget) for budget in budgets])
            panel.set(xlim=(budgets[0] / 1.2, budgets[-1] * 1.2), xlabel="training FLOPs", ylabel=COLUMNS[measure])
        _plot_by_level(by_level, largest, colors)
        handles = [Line2D([], [], color=colors[name], marker="o", linewidth=1.6, label=name) for name in names]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(names))
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", facecolor=PAPER)


def _plot_curves(panel: Any, groups: Sequence[tuple[str, float, list[Result]]], colors: Mapping[str, str]) -> None:
    """Plots the mean held-out loss during training, with lighter and thinner lines for smaller budgets.

    A large dot marks the end of the mean curve, a small dot the end of each run. Runs without a curve have only dots.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    budgets = sorted({budget for _, budget, _ in groups})
    for name, budget, group in groups:
        weight = (budgets.index(budget) + 1) / len(budgets)
        style = dict(color=colors[name], alpha=0.3 + 0.7 * weight)
        ends = [(r["flops"], r["measures"]["heldout_loss"]) for r in group if "heldout_loss" in r["measures"]]
        points = mean_curve(group)
        if ends and not points:
            points = [(statistics.fmean(flops for flops, _ in ends), statistics.fmean(loss for _, loss in ends))]
        if points:
            panel.plot(*zip(*points, strict=True), "o-", markevery=[-1], linewidth=0.6 + weight, **style)
        for flops, loss in ends:
            panel.plot(flops, loss, ".", markersize=4, **style)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(lambda value, _: _flops_label(value))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set(xlabel="training FLOPs", ylabel=COLUMNS["heldout_loss"])


def _flops_label(flops: float) -> str:
    return f"{flops:.3g}".replace("e+0", "e").replace("e+", "e")


def _plot_by_level(panel: Any, groups: Sequence[tuple[str, float, list[Result]]], colors: Mapping[str, str]) -> None:
    best = None
    for name, _, group in groups:
        keys = [key for key in group[0]["measures"] if key.startswith(LEVEL) and "raw" not in key]
        losses = np.array([statistics.fmean(values(group, key)) for key in keys])
        best = losses if best is None else best
        if len(losses) == len(best):
            sigmas = [float(key.removeprefix(LEVEL)) for key in keys]
            panel.plot(sigmas, 100 * (losses / best - 1), "o-", color=colors[name], linewidth=1.6, markersize=3.5)
    panel.set_xscale("log", subs=[])
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set(xlabel="noise level σ", ylabel="held-out loss above the best recipe, %")
