"""Compares our cost estimate with the table of costs in the MicroDiT paper."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from micro_dit.errors import UserError
from micro_dit.files import text_table
from micro_dit.models.config import DiTConfig
from micro_dit.planning.chips import CHIPS
from micro_dit.planning.cost import estimate_cost
from micro_dit.training.phases import Phase


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A phase in the paper's table of costs (arXiv 2407.15811), for 8 × H100 at $30 an hour."""

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
    """Returns our figures beside the paper's, phase by phase.

    Our days and dollars hold for the paper's hardware and MFU, with its one-hot products. 'saved' is the share of these
    FLOPs that gathering tokens avoids.

    Raises:
        UserError: There are not four phases.
    """
    if len(phases) != len(PAPER):
        raise UserError(f"--paper compares four phases, but the config has {len(phases)}; use configs/mask75.py:xl.")
    rows = []
    for network, phase, paper in zip(networks, phases, PAPER, strict=True):
        h100s: dict[str, Any] = dict(chip=CHIPS["h100"], devices=8, mfu=paper.mfu, caption_tokens=caption_tokens)
        one_hot = estimate_cost([network], [phase], one_hot_dispatch=True, **h100s)
        gather = estimate_cost([network], [phase], **h100s)
        rows.append(
            {
                "phase": phase.name, "paper": dataclasses.asdict(paper), "flops_one_hot": one_hot.flops,
                "flops_gather": gather.flops, "difference": one_hot.flops / paper.flops - 1,
                "saved": 1 - gather.flops / one_hot.flops, "node_days": one_hot.hours / 24, "dollars": one_hot.dollars,
                "images_per_second": one_hot.phases[0].images_per_second / 8,
            }
        )  # fmt: skip
    return rows


def paper_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `paper_rows` as lines of text."""
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
    return "\n".join([head, "", text_table(cells)])
