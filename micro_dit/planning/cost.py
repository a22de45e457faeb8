"""Estimates the cost of a training run on given chips: FLOPs, hours and dollars, phase by phase."""

import dataclasses
from collections.abc import Sequence

from micro_dit.errors import UserError
from micro_dit.files import text_table
from micro_dit.models.config import DiTConfig
from micro_dit.models.flops import training_flops
from micro_dit.planning.chips import Chip
from micro_dit.training.phases import Phase


@dataclasses.dataclass(frozen=True)
class PhaseCost:
    """The cost of a phase.

    Attributes:
        phase: The phase.
        network: Network of the phase.
        flops: Training FLOPs of all images.
        hours: Hours on all chips together.
        dollars: Cost in dollars; None if the price is unknown.
    """

    phase: Phase
    network: DiTConfig
    flops: float
    hours: float
    dollars: float | None

    @property
    def images_per_second(self) -> float:
        """Returns images per second on all chips together."""
        return self.phase.steps * self.phase.batch_size / (3600 * self.hours)


@dataclasses.dataclass(frozen=True)
class RunCost:
    """The cost of a run.

    Attributes:
        phases: Cost of each phase.
        chip: Type of the chips.
        devices: Number of chips.
        mfu: Model FLOPs utilization, in (0, 1].
        price: Dollars per chip-hour; None if unknown.
    """

    phases: tuple[PhaseCost, ...]
    chip: Chip
    devices: int
    mfu: float
    price: float | None

    @property
    def flops(self) -> float:
        """Returns the training FLOPs of all phases."""
        return sum(cost.flops for cost in self.phases)

    @property
    def hours(self) -> float:
        """Returns the hours of all phases."""
        return sum(cost.hours for cost in self.phases)

    @property
    def dollars(self) -> float | None:
        """Returns the dollars of all phases; None if the price is unknown."""
        return None if self.price is None else self.hours * self.devices * self.price

    def table(self) -> str:
        """Returns the cost as a text table."""
        head = f"{self.devices} × {self.chip.name} at {self.mfu:.1%} of {self.chip.peak_flops / 1e12:g} TFLOP/s"
        if self.price is not None:
            head += f", ${self.price:g} per chip-hour"
        rows = [["phase", "latent", "mask", "steps", "batch", "FLOPs", "images/s", "hours", "chip-hours", "dollars"]]
        for cost in self.phases:
            phase = cost.phase
            row = [phase.name, f"{cost.network.input_size}²", f"{phase.mask_ratio:.0%}", f"{phase.steps:,}"]
            row += [f"{phase.batch_size:,}", f"{cost.flops:.2e}", f"{cost.images_per_second:,.0f}"]
            row += [f"{cost.hours:,.1f}", f"{cost.hours * self.devices:,.1f}", _dollars(cost.dollars)]
            rows.append(row)
        hours = [f"{self.hours:,.1f}", f"{self.hours * self.devices:,.1f}"]
        rows.append(["all", "", "", "", "", f"{self.flops:.2e}", "", *hours, _dollars(self.dollars)])
        return "\n".join([head, "", text_table(rows, total=True)])


def estimate_cost(
    networks: Sequence[DiTConfig], phases: Sequence[Phase], chip: Chip, devices: int = 1, mfu: float = 0.3,
    price: float | None = None, caption_tokens: int = 77, one_hot_dispatch: bool = False,
) -> RunCost:  # fmt: skip
    """Estimates the hours and dollars of a run.

    Args:
        networks: Network of each phase.
        phases: The phases.
        chip: Type of the chips.
        devices: Number of chips.
        mfu: Model FLOPs utilization, the fraction of the peak FLOP/s that is achieved, in (0, 1].
        price: Dollars per chip-hour; None uses the list price of the chip.
        caption_tokens: Tokens per caption.
        one_hot_dispatch: Whether to count expert dispatch by one-hot products, see `forward_flops`.

    Raises:
        UserError: A network does not support the masking of its phase, or `mfu` or `devices` is out of range.
    """
    if not 0 < mfu <= 1 or devices < 1:
        raise UserError(f"mfu is {mfu} and devices is {devices}, but --mfu must be in (0, 1] and --devices at least 1.")
    price = chip.price if price is None else price
    costs = []
    for network, phase in zip(networks, phases, strict=True):
        per_image = training_flops(network, phase.mask_ratio, caption_tokens, phase.mask_position, one_hot_dispatch)
        flops = float(per_image) * phase.steps * phase.batch_size
        hours = flops / (devices * mfu * chip.peak_flops) / 3600
        costs.append(PhaseCost(phase, network, flops, hours, None if price is None else hours * devices * price))
    return RunCost(tuple(costs), chip, devices, mfu, price)


def _dollars(amount: float | None) -> str:
    if amount is None:
        return "–"
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:,.2f}"
