"""The protocol of everything that is evaluated while a model trains; the training loop walks a list of evaluators."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from micro_dit.models.dit import Params


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps at which an evaluator runs: the multiples of `every` (0 has none) and the last step of the phase."""

    every: int
    last_step: int

    def due(self, step: int) -> bool:
        """Returns whether to run after a step."""
        return step == self.last_step or (self.every > 0 and step % self.every == 0)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a run after a step.

    Attributes:
        trained: The trained parameters.
        ema: Their EMA, or None in a phase without it.
        merge: Returns the parameters of the network, with a LoRA adapter merged into them.
    """

    trained: Params
    ema: Params | None
    merge: Callable[[Params], Params]

    @property
    def best(self) -> Params:
        """The network's parameters to sample with: the EMA weights if there are any."""
        return self.merge(self.trained if self.ema is None else self.ema)


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image to show: uint8 pixels (H, W, 3), and the text fields of its PNG file."""

    pixels: np.ndarray
    metadata: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Results:
    """Scalars and images of one evaluation, by name. Both are empty if it was interrupted."""

    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    images: Mapping[str, Picture] = dataclasses.field(default_factory=dict)


class Evaluator(Protocol):
    """Evaluates the weights of a run at some of its steps. It writes nothing: the loop writes what it returns."""

    def due(self, step: int) -> bool:
        """Returns whether to run after a step; the same in every process."""

    def run(self, weights: Weights, step: int) -> Results:
        """Evaluates the weights after a step; every process takes part."""
