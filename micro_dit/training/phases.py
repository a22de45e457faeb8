"""Phases of a run: masked pre-training, unmasked fine-tuning, the same at higher resolution."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from micro_dit.errors import UserError
from micro_dit.models.config import MASK_POSITIONS


@dataclasses.dataclass(frozen=True)
class Phase:
    """Settings of a phase of training. Defaults are the paper's.

    Attributes:
        name: Name of the phase, for logs and plots.
        resolution: Side of the images in pixels.
        steps: Optimizer steps.
        batch_size: Images per step, over all devices.
        learning_rate: Peak learning rate.
        mask_ratio: Fraction of the tokens that is dropped.
        mask_position: 'after_mixer' (deferred masking) or 'before_mixer' (naive masking).
        warmup_steps: Steps of linear warm-up from 0.
        final_lr_ratio: Final over peak learning rate of the cosine decay; 1 keeps the rate constant.
        clip: Largest global gradient norm.
        P_mean, P_std: Mean and standard deviation of the logarithm of the training noise level.
        pos_interp_scale: Divisor of positions: 1 at the resolution trained first, 2 at twice that.
        ema_decay: Decay of the EMA weights; 0 keeps none.
        ema_start: Step of the phase until which the EMA weights are a copy of the parameters; 0 continues the EMA
            weights of the phase before.
        fresh_optimizer: Whether to reset the optimizer state at the start.
        shards: Folder of shards; empty for that of the run.
    """

    name: str
    resolution: int
    steps: int
    batch_size: int
    learning_rate: float
    mask_ratio: float
    mask_position: str = "after_mixer"
    warmup_steps: int = 0
    final_lr_ratio: float = 1.0
    clip: float = 0.25
    P_mean: float = -0.6
    P_std: float = 1.2
    pos_interp_scale: float = 1.0
    ema_decay: float = 0.0
    ema_start: int = 0
    fresh_optimizer: bool = False
    shards: str = ""

    def schedule(self) -> optax.Schedule:
        """Returns the learning rate as a function of the step within the phase."""
        if self.final_lr_ratio == 1:
            after: optax.Schedule = optax.constant_schedule(self.learning_rate)
        else:
            decay_steps = max(self.steps - self.warmup_steps, 1)
            after = optax.cosine_decay_schedule(self.learning_rate, decay_steps, self.final_lr_ratio)
        if not self.warmup_steps:
            return after
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([warmup, after], [self.warmup_steps])


def with_mask_ratio(configs: Sequence[Mapping[str, Any]], ratio: float | None) -> tuple[dict[str, Any], ...]:
    """Returns the fields of phases with `mask_ratio` replaced in all phases that mask; None replaces nothing."""
    replaced = ratio is not None
    return tuple({**c, "mask_ratio": ratio} if replaced and c.get("mask_ratio") else dict(c) for c in configs)


def make_phases(configs: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Builds the phases from the config's list.

    Raises:
        UserError: A field is unknown, missing or out of range.
    """
    known = {field.name: field for field in dataclasses.fields(Phase)}
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    phases = []
    for index, config in enumerate(configs):
        if unknown := sorted(set(config) - set(known)):
            raise UserError(f"phases[{index}] has no field {', '.join(unknown)}; the fields are {', '.join(known)}.")
        if missing := sorted(required - set(config)):
            raise UserError(f"phases[{index}] lacks {', '.join(missing)}.")
        phase = Phase(**config)
        if phase.steps < 1 or phase.batch_size < 1:
            raise UserError(f"phase {phase.name!r} needs at least 1 step and a batch of at least 1 image.")
        if not 0 <= phase.ema_decay < 1 or phase.clip <= 0 or phase.P_std <= 0 or phase.learning_rate <= 0:
            raise UserError(
                f"phase {phase.name!r}: ema_decay must be in [0, 1), and clip, P_std and learning_rate above 0."
            )
        if phase.mask_position not in MASK_POSITIONS:
            raise UserError(f"phase {phase.name!r}: mask_position must be one of {', '.join(MASK_POSITIONS)}.")
        phases.append(phase)
    if not phases:
        raise UserError("the config lists no phases; give at least one.")
    if repeated := {p.name for p in phases if [q.name for q in phases].count(p.name) > 1}:
        raise UserError(f"several phases are named {', '.join(sorted(repeated))}; give each its own name.")
    return tuple(phases)


def phase_starts(phases: Sequence[Phase]) -> list[int]:
    """Returns the global step at which each phase starts, and at the end the total."""
    return list(itertools.accumulate((phase.steps for phase in phases), initial=0))
