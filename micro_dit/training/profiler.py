"""Traces a few steps of each phase with `jax.profiler`. See docs/running.md."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from micro_dit.errors import UserError


@dataclasses.dataclass(frozen=True)
class ProfileSettings:
    """Steps to trace in each phase: the fields of `config.profile`.

    Attributes:
        steps: Number of steps to trace; 0 turns tracing off.
        start: Number of steps before the trace, counted from where the phase starts or resumes.

    Raises:
        UserError: A number is negative.
    """

    steps: int = 0
    start: int = 5

    def __post_init__(self) -> None:
        for name in ("steps", "start"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"config.profile.{name} is {value}. Set --config.profile.{name} to 0 or more.")


class StepProfiler:
    """Runs the steps of one phase and traces some of them, on the main process only.

    It is a context manager; leaving it writes a trace that is still open.
    """

    def __init__(self, settings: ProfileSettings, folder: Path, say: Callable[[str], None]):
        """Traces nothing yet.

        Args:
            settings: Steps to trace.
            folder: Folder of the trace.
            say: Prints a line.
        """
        self._settings, self._folder, self._say = settings, folder, say
        self._enabled = settings.steps > 0 and jax.process_index() == 0
        self._calls = self._traced = 0
        self._tracing = False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tracing:
            self._stop()
        elif self._enabled and not self._traced:
            self._say(
                f"profile: no trace, because only {self._calls} steps ran and tracing starts after "
                f"{self._settings.start} steps. Lower --config.profile.start."
            )

    def run(self, step: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the train step for step number `step`, and starts or ends the trace where that is due."""
        if self._enabled and self._calls == self._settings.start:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        self._calls += 1
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*arguments)
        if self._tracing:
            self._traced += 1
            if self._traced == self._settings.steps:
                jax.block_until_ready(result)  # dispatch is asynchronous: the trace has to include the devices' work
                self._stop()
        return result

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        self._say(
            f"profile: {self._traced} steps traced in {self._folder}. See docs/running.md for how to open the trace."
        )
