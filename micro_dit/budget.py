"""What a training run costs: FLOPs of the network counted by hand, chips, and from both hours and dollars.

    python -m micro_dit.budget --config=configs/mask75.py:xl --chip=h100 --price_per_hour=3.75 --mfu=0.45 --paper

FLOPs are 2 × MACs of matrix products and convolutions only; norms, activations, sorts and gathers are left out, as is
usual for model FLOPs. Training an image costs 3 × its forward pass: once forward, twice backward.

N tokens · K kept tokens · T tokens a block sees · D backbone width · M mixer width · d block width · F hidden width ·
L caption tokens · Y caption channels · E experts.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from micro_dit.command import parse_or_exit, run_command
from micro_dit.data.mix import parse_mix, read_mix
from micro_dit.data.shards import MANIFEST, Manifest, record_fields, shards_folder
from micro_dit.encoders.known import known_image_encoder, known_text_encoder
from micro_dit.errors import UserError
from micro_dit.models.dit import BlockShape, DiTConfig
from micro_dit.models.layers import SwiGLU
from micro_dit.models.masking import kept_tokens
from micro_dit.models.moe import tokens_per_expert

TRAINING_FLOPS_PER_FORWARD = 3


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def forward_flops(
    config: DiTConfig,
    mask_ratio: float = 0.0,
    caption_tokens: int = 77,
    mask_position: str = "after_mixer",
    one_hot_dispatch: bool = False,
) -> dict[str, int]:
    """FLOPs of one image's forward pass, by part; the total is the sum of the values.

    Each stack of blocks has three entries: "mixer" (Linear layers), "mixer/attention" (the two products of scaled
    dot-product attention) and "mixer/dispatch" (one-hot products of the experts, 0 unless asked for).

    Args:
        config: the network; `input_size` sets the resolution.
        mask_ratio: share of the tokens that is dropped.
        caption_tokens: L, padding included.
        mask_position: "after_mixer" (deferred masking) or "before_mixer" (naive masking).
        one_hot_dispatch: count experts that take and return their tokens by products with one-hot matrices, as the
            public release does. This implementation gathers, which costs no products.

    Raises:
        UserError: if no such network can be built.
    """
    config.check(mask_ratio, mask_position)
    D, M, L = config.dim, config.patch_mixer_dim, caption_tokens
    N, K = config.tokens, kept_tokens(config.tokens, mask_ratio)
    in_mixer = K if mask_position == "before_mixer" else N
    patch = config.patch_size**2 * config.in_channels
    projected = config.use_patch_mixer and M != D
    caption_hidden = SwiGLU.hidden_width(D, 4.0, config.multiple_of)

    parts = {
        "patch_embedding": _linear(N, patch, D),
        "noise_embedding": _linear(1, 512, D) + _linear(1, D, D),
        "caption_projection": _linear(L, config.caption_channels, D) + _linear(L, D, D),
        "caption_block": _linear(L, D, 4 * D) + _linear(L, D, 3 * caption_hidden),
        "caption_block/attention": _attention(L, L, D),
        "pooled_caption": 2 * _linear(1, D, D),
        "mixer_in": projected * _linear(in_mixer, D, M),
        "mixer_caption_in": projected * _linear(L, D, M),
        "mixer_out": projected * _linear(K, M, D),
        "final_layer": _linear(1, D, 2 * D) + _linear(K, D, patch),
    }
    for name, blocks, T in (("mixer", config.mixer_blocks(), in_mixer), ("backbone", config.backbone_blocks(), K)):
        parts[name] = sum(_block(block, config, T, L) for block in blocks)
        parts[f"{name}/attention"] = sum(
            _attention(T, T, block.attention_width) + _attention(T, L, block.dim) for block in blocks
        )
        parts[f"{name}/dispatch"] = one_hot_dispatch * sum(_dispatch(b, config, T) for b in blocks if b.moe)
    return parts


def training_flops(
    config: DiTConfig,
    mask_ratio: float = 0.0,
    caption_tokens: int = 77,
    mask_position: str = "after_mixer",
    one_hot_dispatch: bool = False,
) -> int:
    """FLOPs of training on one image: 3 × the total of `forward_flops`, whose arguments these are."""
    forward = forward_flops(config, mask_ratio, caption_tokens, mask_position, one_hot_dispatch)
    return TRAINING_FLOPS_PER_FORWARD * sum(forward.values())


def _linear(rows: int, features: int, out: int) -> int:
    return 2 * rows * features * out


def _attention(queries: int, keys: int, width: int) -> int:
    """q·kᵀ and the weighted sum of v, all heads together."""
    return 2 * _linear(queries, keys, width)


def _block(block: BlockShape, config: DiTConfig, T: int, L: int) -> int:
    d, w, F = block.dim, block.attention_width, block.hidden_width
    modulation = _linear(1, config.dim, 6 * d)
    self_attention = _linear(T, d, 3 * w) + _linear(T, w, d)
    cross_attention = _linear(T, d, d) + _linear(L, d, 2 * d) + _linear(T, d, d)
    if block.moe:
        taken = config.num_experts * tokens_per_expert(T, config.num_experts, config.expert_capacity)
        feed_forward = _linear(T, d, config.num_experts) + 2 * _linear(taken, d, F)  # router, then w1 and w2
    else:
        feed_forward = 3 * _linear(T, d, F)
    return modulation + self_attention + cross_attention + feed_forward


def _dispatch(block: BlockShape, config: DiTConfig, T: int) -> int:
    """Tokens to experts and back as two products with an (E·tokens per expert, T) one-hot matrix."""
    taken = config.num_experts * tokens_per_expert(T, config.num_experts, config.expert_capacity)
    return 2 * _linear(taken, T, block.dim)


# ---- Chips -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator as its vendor describes it.

    Attributes:
        name: short name, a key of CHIPS.
        peak_flops: dense bfloat16 FLOP/s (float16 on the T4, which has no bfloat16 units).
        memory: bytes of device memory.
        bandwidth: bytes/s of device memory.
        interconnect: bytes/s that a chip can send to others of its slice or host, over all its links together; vendors
            print twice that, for both directions.
        price: list price in dollars per chip-hour where there is a settled one, else None. Prices move: give your own.
        device_kind: pattern that `jax.Device.device_kind` matches.
        source: where the figures come from.
    """

    name: str
    peak_flops: float
    memory: float
    bandwidth: float
    interconnect: float
    price: float | None
    device_kind: str
    source: str


# NVIDIA's data sheets print tensor-core figures "with sparsity"; these are the dense halves. The cut-down PCIe and NVL
# cards of the H100 and H200 have other peaks, and are therefore not matched. The H100's price is that of the MicroDiT
# paper (8 × H100 for $30 an hour); the others move too much to be written down.
# fmt: off
_CHIPS = (
    #    name         FLOP/s  memory     bytes/s   links   price  device_kind
    Chip("h100",      989e12, 80e9,      3.35e12,  450e9,  3.75,  r"NVIDIA H100 80GB HBM3$",      "NVIDIA H100 data sheet, SXM"),  # noqa: E501
    Chip("h200",      989e12, 141e9,     4.8e12,   450e9,  None,  r"NVIDIA H200$",                "NVIDIA H200 data sheet, SXM"),  # noqa: E501
    Chip("a100",      312e12, 40e9,      1.555e12, 300e9,  None,  r"NVIDIA A100.*40GB$",          "NVIDIA A100 data sheet, SXM"),  # noqa: E501
    Chip("a100-80gb", 312e12, 80e9,      2.039e12, 300e9,  None,  r"NVIDIA A100.*80GB( PCIe)?$",  "NVIDIA A100 data sheet, SXM"),  # noqa: E501
    Chip("l4",        121e12, 24e9,      300e9,    32e9,   None,  r"NVIDIA L4$",                  "NVIDIA L4 data sheet (links: PCIe)"),  # noqa: E501
    Chip("t4",        65e12,  16e9,      320e9,    16e9,   None,  r"(NVIDIA )?(Tesla )?T4$",      "NVIDIA T4 data sheet (links: PCIe)"),  # noqa: E501
    Chip("v4",        275e12, 32 * 2**30, 1.2e12,  300e9,  None,  r"TPU v4$",                     "cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433, 6 × 50 GB/s"),  # noqa: E501
    Chip("v5e",       197e12, 16e9,      819e9,    200e9,  None,  r"TPU v5( lite|e)$",            "cloud.google.com/tpu/docs/v5e"),  # noqa: E501
    Chip("v5p",       459e12, 95 * 2**30, 2.765e12, 600e9, None,  r"TPU v5p?$",                   "cloud.google.com/tpu/docs/v5p"),  # noqa: E501
    Chip("v6e",       918e12, 32e9,      1.638e12, 400e9,  None,  r"TPU v6( lite|e)$",            "cloud.google.com/tpu/docs/v6e"),  # noqa: E501
)
# fmt: on
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind `jax.devices()[0].device_kind`; None if it is not in the table (a CPU, say)."""
    return next((chip for chip in CHIPS.values() if re.match(chip.device_kind, device_kind)), None)


def measure_chip(seconds: float = 0.3) -> Chip:
    """The machine at hand as a Chip named "cpu", its peak measured by float32 matrix products for `seconds`."""
    import jax
    import jax.numpy as jnp

    side = 1024
    a = jnp.ones((side, side), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    best, until = float("inf"), time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.monotonic()
        multiply(a).block_until_ready()
        best = min(best, time.monotonic() - started)
    return Chip("cpu", 2 * side**3 / best, 0.0, 0.0, 0.0, 0.0, r"cpu$", "measured by a matrix product")


# ---- Plan ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training at one resolution and one mask ratio."""

    name: str
    latent_side: int
    mask_ratio: float
    steps: int
    batch_size: int
    mask_position: str = "after_mixer"


@dataclasses.dataclass(frozen=True)
class PhaseCost:
    """What a phase comes to. `flops` is training FLOPs of all images; `dollars` is None where no price is known."""

    phase: Phase
    flops: float
    hours: float
    dollars: float | None

    @property
    def images(self) -> int:
        return self.phase.steps * self.phase.batch_size

    @property
    def images_per_second(self) -> float:
        return self.images / (3600 * self.hours)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The costs of a run, phase by phase, on some number of chips."""

    costs: tuple[PhaseCost, ...]
    chip: Chip
    devices: int
    mfu: float
    price: float | None

    @property
    def flops(self) -> float:
        return sum(cost.flops for cost in self.costs)

    @property
    def hours(self) -> float:
        return sum(cost.hours for cost in self.costs)

    @property
    def dollars(self) -> float | None:
        return None if self.price is None else self.hours * self.devices * self.price

    def table(self) -> str:
        """The plan as lines of text, ready to print."""
        head = f"{self.devices} × {self.chip.name} at {self.mfu:.1%} of {self.chip.peak_flops / 1e12:g} TFLOP/s"
        if self.price is not None:
            head += f", ${self.price:g} a chip-hour"
        rows = [["phase", "latent", "mask", "steps", "batch", "FLOPs", "images/s", "hours", "chip-hours", "dollars"]]
        for cost in self.costs:
            phase = cost.phase
            row = [phase.name, f"{phase.latent_side}²", f"{phase.mask_ratio:.0%}", f"{phase.steps:,}"]
            row += [f"{phase.batch_size:,}", f"{cost.flops:.2e}", f"{cost.images_per_second:,.0f}"]
            row += [f"{cost.hours:,.1f}", f"{cost.hours * self.devices:,.1f}", _dollars(cost.dollars)]
            rows.append(row)
        hours = [f"{self.hours:,.1f}", f"{self.hours * self.devices:,.1f}"]
        rows.append(["all", "", "", "", "", f"{self.flops:.2e}", "", *hours, _dollars(self.dollars)])
        return "\n".join([head, "", lines_of(rows)])


def lines_of(rows: Sequence[Sequence[str]], total: bool = True) -> str:
    """Rows as lines of text in columns, ruled under the first and, with `total`, over the last."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "─" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]] if total else [lines[0], rule, *lines[1:]])


def plan(
    config: DiTConfig,
    phases: Sequence[Phase],
    chip: Chip,
    devices: int = 1,
    mfu: float = 0.3,
    price: float | None = None,
    caption_tokens: int = 77,
    one_hot_dispatch: bool = False,
) -> Plan:
    """Hours and dollars of a run.

    Args:
        config: the network; its `input_size` is replaced by each phase's.
        phases: what is trained, in order.
        chip: one of CHIPS.
        devices: number of chips.
        mfu: model FLOPs utilization, the share of the peak that is reached, in (0, 1].
        price: dollars per chip-hour; the chip's list price if None.
        caption_tokens, one_hot_dispatch: see `forward_flops`.

    Raises:
        UserError: if a phase cannot be trained with this network, or `mfu` or `devices` make no sense.
    """
    if not 0 < mfu <= 1 or devices < 1:
        raise UserError(f"mfu {mfu} on {devices} devices: give a share of the peak in (0, 1] and at least one device.")
    price = chip.price if price is None else price
    costs = []
    for phase in phases:
        network = dataclasses.replace(config, input_size=phase.latent_side)
        per_image = training_flops(network, phase.mask_ratio, caption_tokens, phase.mask_position, one_hot_dispatch)
        flops = float(per_image) * phase.steps * phase.batch_size
        hours = flops / (devices * mfu * chip.peak_flops) / 3600
        costs.append(PhaseCost(phase, flops, hours, None if price is None else hours * devices * price))
    return Plan(tuple(costs), chip, devices, mfu, price)


def _dollars(amount: float | None) -> str:
    if amount is None:
        return "–"
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:,.2f}"


# ---- Command ---------------------------------------------------------------------------------------------------------


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


def paper_rows(network: DiTConfig, phases: Sequence[Phase], caption_tokens: int) -> list[dict[str, Any]]:
    """Our figures beside the paper's, phase by phase; `saved` is the share of its FLOPs that gathering does not pay.

    Hours and dollars of ours are those of the paper's hardware at the MFU that it reached, with its one-hot products.

    Raises:
        UserError: there are not four phases.
    """
    if len(phases) != len(PAPER):
        raise UserError(f"--paper compares four phases, but the config has {len(phases)}; use configs/mask75.py:xl.")
    rows = []
    for phase, paper in zip(phases, PAPER, strict=True):
        h100s: dict[str, Any] = dict(chip=CHIPS["h100"], devices=8, mfu=paper.mfu, caption_tokens=caption_tokens)
        one_hot = plan(network, [phase], one_hot_dispatch=True, **h100s)
        gather = plan(network, [phase], **h100s)
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


def planned_phases(phases: Sequence[Any], networks: Sequence[DiTConfig]) -> list[Phase]:
    """What a plan needs to know of training's phases."""
    return [
        Phase(phase.name, network.input_size, phase.mask_ratio, phase.steps, phase.batch_size, phase.mask_position)
        for phase, network in zip(phases, networks, strict=True)
    ]


def main(argv: Sequence[str]) -> None:
    from micro_dit.train import network_of
    from micro_dit.training.phases import make_phases

    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; see --help.")
    config = FLAGS.config
    if config is None:
        raise UserError("no config given; try --config=configs/mask75.py:xl.")
    phases = make_phases(config.phases)
    manifests = [manifest_of(config, phase.shards or config.data.shards) for phase in phases]
    networks = [network_of(phase, config, manifest) for phase, manifest in zip(phases, manifests, strict=True)]
    planned, tokens = planned_phases(phases, networks), manifests[0].text_encoder.tokens
    mfu = config.cost.mfu if FLAGS.mfu is None else FLAGS.mfu
    price = config.cost.dollars_per_device_hour or None if FLAGS.price_per_hour is None else FLAGS.price_per_hour
    result = plan(networks[0], planned, CHIPS[FLAGS.chip], FLAGS.devices, mfu, price, tokens)
    paper = paper_rows(networks[0], planned, tokens) if FLAGS.paper else None
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
    define_flags()
    app.run(lambda argv: sys.exit(run_command(main, argv)), flags_parser=parse_or_exit)
