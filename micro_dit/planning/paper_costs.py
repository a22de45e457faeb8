"""Compares the cost estimate with the table of costs in the MicroDiT paper."""

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
    """A phase in the paper's table of costs (arXiv 2407.15811), for 8 × H100 at $30 per hour."""

    flops: float
    node_days: float
    dollars: float
    images_per_second: float  # per H100
    mfu: float


PAPER = (
    PaperRow(1.47e20, 1.11, 800, 667, 0.194),
    PaperRow(4.53e19, 0.38, 271, 234, 0.174),
    PaperRow(1.18e20, 0.88, 630, 168, 0.196),
    PaperRow(3.48e19, 0.26, 189, 57, 0.196),
)


def paper_rows(networks: Sequence[DiTConfig], phases: Sequence[Phase], caption_tokens: int) -> list[dict[str, Any]]:
    """Returns the estimate and the paper's figures for each phase.

    Days and dollars are estimated for the paper's hardware and MFU, including its one-hot products. 'saved' is the
    share of the FLOPs that is avoided by gathering tokens instead.

    Raises:
        UserError: The config does not have four phases.
    """
    if len(phases) != len(PAPER):
        raise UserError(
            f"--paper compares four phases, but the config has {len(phases)}. Use --config=configs/mask75.py:xl."
        )
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
    """Returns the rows of `paper_rows` as a text table."""
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
        "Comparison with the paper (8 × H100 at $30 per hour, at the paper's MFU). The public release dispatches\n"
        "tokens to experts by products with one-hot matrices, which 'ours' includes. This implementation gathers."
    )
    return "\n".join([head, "", text_table(cells)])
