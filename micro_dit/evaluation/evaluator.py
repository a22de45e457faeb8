"""The protocol of evaluations during training. The training loop runs a list of evaluators."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from micro_dit.models.dit import Params


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps after which an evaluator runs: multiples of `every` (if it is not 0) and the last step of the phase."""

    every: int
    last_step: int

    def due(self, step: int) -> bool:
        """Returns whether to run after a step."""
        return step == self.last_step or (self.every > 0 and step % self.every == 0)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a run after a step.

    Attributes:
        trained: The trained parameters. With LoRA, those of the adapter.
        ema: EMA of the trained parameters, or None in a phase without EMA.
        merge: Maps trained parameters to network parameters, with the LoRA adapter merged if there is one.
    """

    trained: Params
    ema: Params | None
    merge: Callable[[Params], Params]

    @property
    def best(self) -> Params:
        """Network parameters for sampling: the EMA weights if there are any, otherwise the raw weights."""
        return self.merge(self.trained if self.ema is None else self.ema)


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image with pixels (H, W, 3) uint8 and the text fields of its PNG file."""

    pixels: np.ndarray
    metadata: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Results:
    """Scalars and images of one evaluation by name. Both are empty if the evaluation was interrupted."""

    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    images: Mapping[str, Picture] = dataclasses.field(default_factory=dict)


class Evaluator(Protocol):
    """An evaluation of the weights during training. Evaluators write no files; the loop writes their results."""

    def due(self, step: int) -> bool:
        """Returns whether to run after a step. All processes have to return the same value."""

    def run(self, weights: Weights, step: int) -> Results:
        """Evaluates the weights after a step. All processes have to call this."""
