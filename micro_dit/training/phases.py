"""The phases of a run, such as masked pre-training, unmasked fine-tuning, and both again at a higher resolution."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from micro_dit.errors import UserError
from micro_dit.models.config import MASK_POSITIONS


@dataclasses.dataclass(frozen=True)
class Phase:
    """The settings of a training phase. The defaults of clip, P_mean and P_std are the paper's at 256 px.

    Attributes:
        name: Name of the phase in logs and plots.
        resolution: Side length of the images in pixels.
        steps: Number of optimizer steps.
        batch_size: Images per step, over all devices.
        learning_rate: Peak learning rate.
        mask_ratio: Fraction of the tokens that are dropped, in [0, 1).
        mask_position: 'after_mixer' (deferred masking) or 'before_mixer' (naive masking).
        warmup_steps: Steps of linear warm-up from 0.
        final_lr_ratio: Ratio of the final to the peak learning rate of a cosine decay; 1 keeps the rate constant.
        clip: Maximum global gradient norm.
        P_mean, P_std: Mean and standard deviation of ln sigma for the training noise levels.
        pos_interp_scale: Divisor of the token positions: 1 at the resolution trained first, 2 at twice that resolution.
        ema_decay: Decay of the EMA weights per step; 0 disables EMA.
        ema_start: Step within the phase up to which the EMA weights are a copy of the parameters; 0 continues the EMA
            weights of the previous phase.
        fresh_optimizer: Whether to reset the optimizer state at the start of the phase.
        shards: Folder of shards, or a mix of folders; empty uses data.shards of the run.
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
    """Returns the fields of the phases with `mask_ratio` set to `ratio` in all masked phases; None changes nothing."""
    replaced = ratio is not None
    return tuple({**c, "mask_ratio": ratio} if replaced and c.get("mask_ratio") else dict(c) for c in configs)


def make_phases(configs: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Builds and validates the phases listed in a config.

    Raises:
        UserError: A field is unknown, missing or out of range.
    """
    known = {field.name: field for field in dataclasses.fields(Phase)}
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    phases = []
    for index, config in enumerate(configs):
        if unknown := sorted(set(config) - set(known)):
            raise UserError(f"phases[{index}] has no field {', '.join(unknown)}. Its fields are {', '.join(known)}.")
        if missing := sorted(required - set(config)):
            raise UserError(f"phases[{index}] is missing {', '.join(missing)}. Add it to the config file.")
        phase = Phase(**config)
        if phase.steps < 1 or phase.batch_size < 1:
            raise UserError(
                f"phases[{index}] ({phase.name!r}) has steps {phase.steps} and batch_size {phase.batch_size}, but both "
                "must be at least 1."
            )
        if not 0 <= phase.ema_decay < 1 or phase.clip <= 0 or phase.P_std <= 0 or phase.learning_rate <= 0:
            raise UserError(
                f"phases[{index}] ({phase.name!r}) has ema_decay {phase.ema_decay}, clip {phase.clip}, P_std "
                f"{phase.P_std} and learning_rate {phase.learning_rate}. ema_decay must be in [0, 1), and the others "
                "must be positive."
            )
        if phase.mask_position not in MASK_POSITIONS:
            raise UserError(
                f"phases[{index}] ({phase.name!r}) has mask_position {phase.mask_position!r}, but it must be one of "
                f"{', '.join(MASK_POSITIONS)}."
            )
        phases.append(phase)
    if not phases:
        raise UserError("Config has no phases. Add at least one phase to config.phases.")
    if repeated := {p.name for p in phases if [q.name for q in phases].count(p.name) > 1}:
        raise UserError(f"Several phases are named {', '.join(sorted(repeated))}. Phase names must be unique.")
    return tuple(phases)


def phase_starts(phases: Sequence[Phase]) -> list[int]:
    """Returns the global step at which each phase starts, followed by the total number of steps."""
    return list(itertools.accumulate((phase.steps for phase in phases), initial=0))
