"""What a training run should cost: the FLOPs of its recipe, and from a chip and the share of its peak, time and money.

    python -m micro_dit.budget --config=configs/mask75.py:xl --chip=h100 --price_per_hour=3.75 --mfu=0.45 --paper
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from micro_dit.cli import run_command
from micro_dit.data.mixture import parse_mix, read_mix
from micro_dit.data.shards import MANIFEST, Manifest, record_fields, shards_folder
from micro_dit.encoders.info import known_image_encoder, known_text_encoder
from micro_dit.errors import UserError
from micro_dit.models.config import DiTConfig
from micro_dit.planning.chips import CHIPS
from micro_dit.planning.cost import lines_of, plan
from micro_dit.training.phases import Phase, make_phases
from micro_dit.training.recipe import with_mask_ratio
from micro_dit.training.step import network_of


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A phase in the paper's table of costs (arXiv 2407.15811): 8 × H100 at $30 an hour."""

    flops: float
    node_days: float
    dollars: float
    images_per_second: float  # of one H100
    mfu: float


PAPER = (
    PaperRow(1.47e20, 1.11, 800, 667, 0.194),
    PaperRow(4.53e19, 0.38, 271, 234, 0.174),
    PaperRow(1.18e20, 0.88, 630, 168, 0.196),
    PaperRow(3.48e19, 0.26, 189, 57, 0.196),
)


def paper_rows(networks: Sequence[DiTConfig], phases: Sequence[Phase], caption_tokens: int) -> list[dict[str, Any]]:
    """Our figures beside the paper's, phase by phase; `saved` is the share of its FLOPs that gathering does not pay.

    Hours and dollars of ours are those of the paper's hardware at the MFU that it reached, with its one-hot products.

    Raises:
        UserError: there are not four phases.
    """
    if len(phases) != len(PAPER):
        raise UserError(f"--paper compares four phases, but the config has {len(phases)}; use configs/mask75.py:xl.")
    rows = []
    for network, phase, paper in zip(networks, phases, PAPER, strict=True):
        h100s: dict[str, Any] = dict(chip=CHIPS["h100"], devices=8, mfu=paper.mfu, caption_tokens=caption_tokens)
        one_hot = plan([network], [phase], one_hot_dispatch=True, **h100s)
        gather = plan([network], [phase], **h100s)
        rows.append(
            {
                "phase": phase.name, "paper": dataclasses.asdict(paper), "flops_one_hot": one_hot.flops,
                "flops_gather": gather.flops, "difference": one_hot.flops / paper.flops - 1,
                "saved": 1 - gather.flops / one_hot.flops, "node_days": one_hot.hours / 24, "dollars": one_hot.dollars,
                "images_per_second": one_hot.costs[0].images_per_second / 8,
            }
        )  # fmt: skip
    return rows


def paper_table(rows: Sequence[dict[str, Any]]) -> str:
    """`paper_rows` as lines of text."""
    cells = [["phase", "FLOPs: paper", "ours", "differ", "gather", "saved", "days: paper", "ours", "$: paper", "ours"]]
    for row in rows:
        paper = row["paper"]
        cells.append(
            [
                row["phase"], f"{paper['flops']:.3g}", f"{row['flops_one_hot']:.3g}", f"{row['difference']:+.1%}",
                f"{row['flops_gather']:.3g}", f"{row['saved']:.1%}", f"{paper['node_days']:.2f}",
                f"{row['node_days']:.2f}", f"{paper['dollars']:,.0f}", f"{row['dollars']:,.0f}",
            ]
        )  # fmt: skip
    head = (
        "Beside the paper (8 × H100 at $30 an hour, at the MFU it reached). The release sends tokens to experts by\n"
        "products with one-hot matrices, and 'ours' counts those too; this implementation gathers, which saves them."
    )
    return "\n".join([head, "", lines_of(cells, total=False)])


def manifest_of(config: Any, shards: str) -> Manifest:
    """The manifest of a recipe's shards; while they are not there, as much of it as the names of the encoders tell."""
    if shards and all((shards_folder(folder) / MANIFEST).exists() for folder, _ in parse_mix(shards)):
        return read_mix(shards).manifest()
    data = config.data
    vae, text = known_image_encoder(data.vae), known_text_encoder(data.text_encoder, data.caption_tokens)
    resolutions = tuple(sorted({*data.resolutions, *(phase["resolution"] for phase in config.phases)}))
    return Manifest(
        source="", attribution="", resolutions=resolutions, posterior="mean_std", vae=vae, text_encoder=text,
        fields=record_fields(resolutions, "mean_std", vae, text), dropped={}, altered={}, statistics={},
        caption_cleaning="none",
    )  # fmt: skip


def main() -> None:
    config = FLAGS.config
    if config is None:
        raise UserError("no config given; try --config=configs/mask75.py:xl.")
    config = with_mask_ratio(config)
    phases = make_phases(config.phases)
    manifests = [manifest_of(config, phase.shards or config.data.shards) for phase in phases]
    networks = [network_of(p, config.model, m.vae, m.text_encoder) for p, m in zip(phases, manifests, strict=True)]
    tokens = manifests[0].text_encoder.tokens
    mfu = config.cost.mfu if FLAGS.mfu is None else FLAGS.mfu
    price = config.cost.dollars_per_device_hour or None if FLAGS.price_per_hour is None else FLAGS.price_per_hour
    result = plan(networks, phases, CHIPS[FLAGS.chip], FLAGS.devices, mfu, price, tokens)
    paper = paper_rows(networks, phases, tokens) if FLAGS.paper else None
    if FLAGS.json:
        about = {"chip": FLAGS.chip, "devices": result.devices, "mfu": mfu, "dollars_per_chip_hour": result.price}
        rows = [
            {
                "phase": cost.phase.name, "flops": cost.flops, "hours": cost.hours,
                "chip_hours": cost.hours * result.devices, "dollars": cost.dollars,
            }
            for cost in result.costs
        ]  # fmt: skip
        print(json.dumps(about | {"phases": rows} | ({"paper": paper} if paper else {}), indent=2))
        return
    print(result.table())
    if paper:
        print("\n" + paper_table(paper))


FLAGS = flags.FLAGS


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/mask75.py:xl.")
    flags.DEFINE_enum("chip", "h100", list(CHIPS), "What to train on.")
    flags.DEFINE_integer("devices", 8, "How many of them.", lower_bound=1)
    flags.DEFINE_float("price_per_hour", None, "Dollars per chip-hour; by default the config's, or the chip's.")
    flags.DEFINE_float("mfu", None, "Share of the peak that is reached; by default the config's cost.mfu.")
    flags.DEFINE_bool("paper", False, "Show the paper's table of costs beside ours.")
    flags.DEFINE_bool("json", False, "Print JSON.")


if __name__ == "__main__":
    run_command(main, define_flags, takes_config=True)
