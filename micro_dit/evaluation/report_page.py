"""Writes report.html: the results of an evaluation in one self-contained file that needs no network access."""

import base64
import html
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from micro_dit.evaluation.image_sets import SETTINGS_FILE
from micro_dit.evaluation.measures import Measure, Measures
from micro_dit.files import write_atomically
from micro_dit.images import FAINT, HELDOUT, HELDOUT_EMA, INK, PAPER, TRAIN

REPORT_FILE = "report.html"
SHOWN, COMPARED = 24, 8  # images per set, and images per row in the comparison of guidance scales
LARGEST = 256  # largest side of an image in pixels
SIGMA = "heldout_loss/sigma="
ARROWS = {"higher": "↑", "lower": "↓"}
WEIGHTS = {"ema": "EMA weights", "raw": "raw weights"}
FIRST = ("fid", "cmmd", "clip_score", "geneval")  # the first rows of the table
TITLES = {
    "fid": "FID", "cmmd": "CMMD", "clip_score": "CLIP score", "latent_frechet": "latent Fréchet distance",
    "caption_retrieval_top1": "caption retrieval, top 1", "caption_retrieval_top5": "caption retrieval, top 5",
    "heldout_loss": "held-out loss", "geneval": "GenEval, overall",
}  # fmt: skip


def write_report(folder: str | Path, measures: Measures, guidance: float) -> Path:
    """Writes report.html next to metrics.json atomically.

    Args:
        folder: Output folder of the evaluation, with the image sets.
        measures: The metric values.
        guidance: The model's default guidance scale. The samples shown are from the set with the closest scale.

    Returns:
        The path of report.html.
    """
    folder = Path(folder)
    names = dict.fromkeys(str(m.images["folder"]) for m in measures.all if "folder" in m.images)
    files = {name: file for name in names if (file := folder / name / SETTINGS_FILE).exists()}
    sets = [json.loads(file.read_text(encoding="utf-8")) | {"folder": name} for name, file in files.items()]
    parts = [
        _header(measures.about, measures.all), _samples(folder, sets, guidance), _scales(folder, sets),
        _charts(measures.all), _table(measures.all), _footer(measures.about),
    ]  # fmt: skip
    page = PAGE.replace("{style}", STYLE).replace("{title}", html.escape(_title(measures.about)))
    path = folder / REPORT_FILE
    write_atomically(path, page.replace("{body}", "\n".join(filter(None, parts))))
    return path


def _title(about: Mapping[str, Any]) -> str:
    return str(about["model"]) + (f", step {about['step']:,}" if about.get("step") is not None else "")


def _header(about: Mapping[str, Any], measures: Sequence[Measure]) -> str:
    size = f"{about['parameters'] / 1e6:,.1f} million parameters" if about.get("parameters") else ""
    counts = {m.images["folder"]: m.images["count"] for m in measures if "folder" in m.images}
    images = f"{sum(counts.values()):,} images" if counts else ""
    values = f"{len(measures)} metric values" if measures else "no metrics yet"
    summary = " · ".join(filter(None, [size, images, values]))
    return f"<header><h1>{html.escape(_title(about))}</h1><p>{summary}</p></header>"


def _samples(folder: Path, sets: Sequence[Mapping[str, Any]], guidance: float) -> str:
    """Returns samples for each kind of prompts and weights, from the set whose guidance scale is closest."""
    sections, shown = [], set()
    for one in sorted(sets, key=lambda s: abs(s["guidance"] - guidance)):
        if (kind := (one["prompts"], one["params"])) in shown:
            continue
        shown.add(kind)
        figures = "".join(
            f"<figure>{_image(file)}<figcaption>{html.escape(_prompt(file))}</figcaption></figure>"
            for file in _files(folder, one, SHOWN)
        )
        about = f"{one['steps']} Heun steps, guidance scale {one['guidance']:g}, {WEIGHTS[one['params']]}"
        sections.append(
            f"<section><h2>Samples: {html.escape(one['prompts'])}</h2><p>{about}, first seed {one['seed']}</p>"
            f"<div class=grid>{figures}</div></section>"
        )
    return "\n".join(sections)


def _scales(folder: Path, sets: Sequence[Mapping[str, Any]]) -> str:
    """Returns samples of the same prompts and seeds at all guidance scales."""
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for one in sets:
        kinds.setdefault(tuple(one[n] for n in ("prompts", "params", "steps", "seed", "model")), []).append(one)
    sections = []
    for same in kinds.values():
        if len(same) < 2:
            continue
        same.sort(key=lambda one: one["guidance"])
        columns = [_files(folder, one, COMPARED) for one in same]
        head = "".join(f"<th>{html.escape(_prompt(file))}</th>" for file in columns[0])
        rows = [
            f"<tr><th>{one['guidance']:g}</th>{''.join(f'<td>{_image(file)}</td>' for file in files)}</tr>"
            for one, files in zip(same, columns, strict=True)
        ]
        sections.append(
            f"<section><h2>Guidance scales: {html.escape(same[0]['prompts'])}</h2><p>Each row has one guidance scale; "
            "each column has the same prompt and seed.</p><div class=wide><table class=scales>"
            f"<tbody>{''.join(rows)}</tbody><tfoot><tr><td></td>{head}</tr></tfoot></table></div></section>"
        )
    return "\n".join(sections)


def _charts(measures: Sequence[Measure]) -> str:
    figures = "".join(
        f"<figure><h3>{html.escape(title)}</h3><p>{better} is better</p>{chart}</figure>"
        for title, better, chart in (*_sweeps(measures), *_losses(measures))
    )
    return figures and f"<section><h2>Curves</h2><div class=charts>{figures}</div></section>"


def _sweeps(measures: Sequence[Measure]) -> list[tuple[str, str, str]]:
    """Returns (title, 'lower' or 'higher', chart) for each metric that was measured at several guidance scales."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    better = {}
    for m in measures:
        if "guidance" in m.images:
            line = f"{m.images['prompts']}{', raw weights' * (m.images['params'] == 'raw')}"
            curves.setdefault(m.name, {}).setdefault(line, []).append((m.images["guidance"], m.value))
            better[m.name] = m.better
    return [
        (TITLES.get(name, name), better[name], _chart(lines, "guidance scale"))
        for name, lines in curves.items()
        if any(len(points) > 1 for points in lines.values())
    ]


def _losses(measures: Sequence[Measure]) -> list[tuple[str, str, str]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for m in measures:
        if m.name.startswith(SIGMA):
            point = float(m.name.removeprefix(SIGMA)), m.value
            lines.setdefault(WEIGHTS.get(m.images.get("params", ""), ""), []).append(point)
    return [("held-out loss by noise level", "lower", _chart(lines, "noise level σ", log=True))] if lines else []


def _table(measures: Sequence[Measure]) -> str:
    rows = [
        f"<tr><td>{html.escape(TITLES.get(m.name, m.name))}&nbsp;{ARROWS[m.better]}</td>"
        f"<td class=number>{f'{m.value:.4f}' if abs(m.value) < 10 else f'{m.value:,.2f}'}</td>"
        f"<td>{html.escape(_measured_on(m.images))}</td>"
        f"<td><details><summary>{html.escape(_short(m.pipeline))}</summary>{_definition(m.pipeline)}</details></td></tr>"
        for m in sorted(measures, key=_order)
        if not m.name.startswith(SIGMA)
    ]
    if not rows:
        return ""
    head = "<th>metric</th><th class=number>value</th><th>measured on</th><th>pipeline</th>"
    table = f"<table class=numbers><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    about = "Click on a pipeline to see how a value was measured. ↑ higher is better, ↓ lower is better."
    return f"<section><h2>Metrics</h2><p>{about}</p><div class=wide>{table}</div></section>"


def _footer(about: Mapping[str, Any]) -> str:
    source = f" {html.escape(str(about['attribution']))}." if about.get("attribution") else ""
    return f"<footer>Written by <code>python -m micro_dit.evaluate</code>.{source}</footer>"


def _files(folder: Path, one: Mapping[str, Any], most: int) -> list[Path]:
    """Returns evenly spaced images of a set, or the first ones if prompts repeat among them."""
    files = sorted((folder / one["folder"]).glob("*.png"))
    few = len({_prompt(file) for file in files[:most]}) < most
    return files[:most] if few else [files[i * len(files) // most] for i in range(most)]


def _prompt(file: Path) -> str:
    with Image.open(file) as image:
        return str(image.info.get("prompt", ""))


def _image(file: Path) -> str:
    with Image.open(file) as image:
        small, prompt = image.convert("RGB"), str(image.info.get("prompt", ""))
    small.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=90, subsampling=0)
    return _embedded(prompt, "image/jpeg", data)


def _embedded(alt: str, kind: str, data: io.BytesIO) -> str:
    content = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{content}">'


def _order(measure: Measure) -> tuple[Any, ...]:
    place = FIRST.index(measure.name) if measure.name in FIRST else len(FIRST)
    images = measure.images
    return place, measure.name, str(images.get("prompts")), images.get("guidance", 0), str(images)


def _measured_on(images: Mapping[str, Any]) -> str:
    weights = WEIGHTS.get(images.get("params", ""), "")
    if "count" not in images:
        return weights
    return f"{images['count']:,} images, {images['prompts']}, guidance scale {images['guidance']:g}, {weights}"


def _short(pipeline: Mapping[str, Any]) -> str:
    """Returns the most informative entry."""
    name = next((n for n in ("network", "features", "loss", "scorer") if n in pipeline), next(iter(pipeline), ""))
    text = str(pipeline.get(name, ""))
    return text if len(text) <= 60 else text[:59].rstrip() + "…"


def _definition(pipeline: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return "; ".join(f"{k}: {text(v)}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)

    rows = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text(value))}</dd>" for name, value in pipeline.items())
    return f"<dl>{''.join(rows)}</dl>"


def _chart(lines: Mapping[str, Iterable[tuple[float, float]]], x_label: str, log: bool = False) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT,
        "ytick.color": FAINT, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": PAPER,
        "axes.grid": True, "grid.color": FAINT, "grid.alpha": 0.18, "grid.linewidth": 0.6, "legend.frameon": False,
        "svg.hashsalt": "report",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.9, 2.5), facecolor=PAPER, layout="constrained")
        panel = figure.add_subplot()
        colors = itertools.cycle((HELDOUT_EMA, HELDOUT, TRAIN, FAINT))
        for (label, points), color in zip(lines.items(), colors, strict=False):
            panel.plot(*zip(*sorted(points), strict=True), "o-", color=color, markersize=4, linewidth=1.8, label=label)
        if log:
            panel.set_xscale("log", subs=[])
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]) if log else None)
        panel.set_xlabel(x_label)
        if len(lines) > 1 or log:
            panel.legend(fontsize=8)
        data = io.BytesIO()
        figure.savefig(data, format="svg", facecolor=PAPER, metadata={"Date": None})
    return _embedded(f"{', '.join(lines)} over {x_label}", "image/svg+xml", data)


STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: {PAPER}; color: {INK}; font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }}
header, section, footer {{ max-width: 1120px; margin: 0 auto; padding: 0 28px; }}
header {{ padding-top: 40px; }}
h1 {{ font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }}
h2 {{ font-size: 19px; margin: 44px 0 2px; }}
h3 {{ font-size: 15px; font-weight: 600; margin: 0; }}
p {{ margin: 0 0 14px; color: {FAINT}; }}
img {{ display: block; width: 100%; height: auto; }}
figure {{ margin: 0; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 18px 14px; }}
.grid img, .scales img {{ border-radius: 4px; background: #fff; }}
figcaption {{ font-size: 12.5px; line-height: 1.3; margin-top: 5px; text-align: center; overflow-wrap: anywhere; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 26px; margin-top: 14px; }}
.charts figure {{ max-width: 540px; }}
.charts p {{ margin: 0 0 6px; font-size: 13px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
.scales td {{ padding: 4px; width: 124px; }}
.scales tbody th {{ font-weight: 600; padding-right: 10px; text-align: right; }}
.scales tfoot th {{ font-weight: 400; font-size: 12.5px; line-height: 1.3; vertical-align: top; padding: 2px 4px; }}
.numbers {{ width: 100%; }}
.numbers th {{ text-align: left; font-weight: 600; border-bottom: 1.5px solid {INK}; padding: 5px 14px 5px 0; }}
.numbers td {{ vertical-align: top; border-bottom: 1px solid #e7e3d9; padding: 6px 14px 6px 0; }}
.numbers td:first-child {{ min-width: 190px; }}
.numbers th.number, .number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.numbers td.number {{ font-weight: 600; }}
summary {{ cursor: pointer; }}
dl {{ margin: 6px 0 2px; font-size: 13px; display: grid; grid-template-columns: max-content 1fr; gap: 1px 12px; }}
dt {{ color: {FAINT}; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
footer {{ color: {FAINT}; font-size: 13px; margin: 48px auto 40px; }}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
