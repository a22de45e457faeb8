"""A run is a list of phases: masked pre-training, unmasked fine-tuning, higher resolution, one after another."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from micro_dit.errors import UserError
from micro_dit.models.config import MASK_POSITIONS


@dataclasses.dataclass(frozen=True)
class Phase:
    """What is constant for a stretch of training. Defaults are the paper's.

    Attributes:
        name: for logs and pictures.
        resolution: side of the images in pixels.
        steps: optimizer steps of this phase.
        batch_size: images per step, over all devices.
        learning_rate: its peak.
        mask_ratio: part of the tokens that is dropped.
        mask_position: 'after_mixer' (deferred masking) or 'before_mixer' (naive masking).
        warmup_steps: steps of linear warm-up from 0.
        final_lr_ratio: the cosine after the warm-up ends at this part of the peak; 1 keeps it constant.
        clip: the global gradient norm is clipped to this.
        P_mean, P_std: of the logarithm of the training noise level.
        pos_interp_scale: positions are divided by this: 1 at the resolution trained first, 2 at twice that.
        ema_decay: decay of the moving average of the parameters; 0 keeps none.
        ema_start: until this step of the phase the average is a copy of the parameters; at 0 it goes on from the
            phase before.
        fresh_optimizer: start with the weights alone.
        shards: the folder it trains on; empty for the run's common one.
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
        """Learning rate by step within the phase."""
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
    changed = {} if ratio is None else {"mask_ratio": ratio}
    return tuple({**config, **(changed if config.get("mask_ratio") else {})} for config in configs)


def make_phases(configs: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Phases from the config's list.

    Raises:
        UserError: a field is unknown or missing, or has an impossible value.
    """
    known = {field.name: field for field in dataclasses.fields(Phase)}
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    phases = []
    for index, config in enumerate(configs):
        values = dict(config)
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"phases[{index}] has no field {', '.join(unknown)}; the fields are {', '.join(known)}.")
        if missing := sorted(required - set(values)):
            raise UserError(f"phases[{index}] lacks {', '.join(missing)}.")
        phase = Phase(**values)
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
    """The global step at which each phase starts, and at the end the total."""
    starts = [0]
    for phase in phases:
        starts.append(starts[-1] + phase.steps)
    return starts
