"""Quality against training FLOPs: the table and the plot of a comparison, from the results of its runs.

A result has "name" (of the recipe), "budget", "seed", "parameters", "images" and "measures", numbers by name.
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
    "caption_retrieval_top5": "caption retrieval, top 5",
}
PANELS = ("heldout_loss", "latent_frechet", "caption_retrieval_top5")
LEVEL = "heldout_loss/sigma="
COLORS = ("#3b6ea8", "#d07a2d", "#3f8f5f", "#a8486e", "#7a6bb0", "#8a857a")


def grouped(results: Sequence[Result]) -> list[tuple[str, float, list[Result]]]:
    """(recipe, budget, the results of its seeds): by budget, and within a budget the lowest held-out loss first."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result["name"], result["budget"]), []).append(result)

    def rank(key: tuple[str, float]) -> tuple[float, float]:
        return key[1], statistics.fmean(values(groups[key], "heldout_loss") or [0.0])

    return [(*key, groups[key]) for key in sorted(groups, key=rank)]


def values(group: Sequence[Result], measure: str) -> list[float]:
    """Returns a measure of those runs that have it."""
    return [result["measures"][measure] for result in group if measure in result["measures"]]


def results_table(results: Sequence[Result]) -> str:
    """Markdown: a row for each recipe and budget, with mean ± standard deviation over its seeds."""
    measured = [name for name in COLUMNS if values(results, name)]
    head = ["FLOPs", "recipe", "parameters", "images", "seeds", *(COLUMNS[name] for name in measured)]
    rows = [head, ["---"] * len(head)]
    for name, budget, group in grouped(results):
        parameters, images = f"{group[0]['parameters'] / 1e6:.2f} M", f"{group[0]['images']:,}"
        spreads = [_spread(values(group, measure)) for measure in measured]
        rows.append([f"{budget:.3g}", name, parameters, images, str(len(group)), *spreads])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(numbers: Sequence[float]) -> str:
    mean = f"{statistics.fmean(numbers):.4g}" if numbers else "–"
    return f"{mean} ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else mean


def plot_isoflop(results: Sequence[Result], path: str | Path) -> None:
    """Plots IsoFLOP curves of at least one run to a .png file: a line through each recipe's means, a dot for each run.

    The last panel has the held-out loss by noise level at the largest budget, compared with that of the best recipe.
    """
    import matplotlib
    from matplotlib.figure import Figure

    path, groups = Path(path), grouped(results)
    budgets = sorted({budget for _, budget, _ in groups})
    largest = [group for group in groups if group[1] == budgets[-1]]
    names = list(dict.fromkeys(name for name, _, _ in largest + groups))
    colors = dict(zip(names, itertools.cycle(COLORS), strict=False))
    measured = [name for name in PANELS if values(results, name)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * (len(measured) + 1), 4), dpi=160, facecolor=PAPER, layout="constrained")
        *panels, by_level = figure.subplots(1, len(measured) + 1, squeeze=False)[0]
        for panel, measure in zip(panels, measured, strict=True):
            for i, name in enumerate(names):
                beside = 1.015 ** (i - (len(names) - 1) / 2)  # so that recipes don't hide each other
                runs = {budget * beside: values(group, measure) for n, budget, group in groups if n == name}
                means = {x: statistics.fmean(numbers) for x, numbers in runs.items() if numbers}
                panel.plot(*zip(*means.items(), strict=True), "o-", color=colors[name], linewidth=1.6, label=name)
                for x in means:
                    panel.plot([x] * len(runs[x]), runs[x], ".", color=colors[name], alpha=0.6, markersize=4)
            panel.set_xscale("log", subs=[])
            panel.set_xticks(budgets, [f"{budget:.3g}".replace("e+", "e") for budget in budgets])
            panel.set(xlim=(budgets[0] / 1.2, budgets[-1] * 1.2), xlabel="training FLOPs", ylabel=COLUMNS[measure])
        _plot_by_level(by_level, largest, colors)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(names))
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", facecolor=PAPER)


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
    panel.set(xlabel="noise level σ", ylabel="held-out loss above that of the best, %")
