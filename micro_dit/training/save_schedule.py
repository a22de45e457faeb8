"""Decides when a run saves and stops: by step, by clock or by signal, at the same step in all processes."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from micro_dit.parallel.distributed import any_process, gather

ASK_SECONDS = 2.0


class Interrupt:
    """Handles signals while entered: the first SIGINT or SIGTERM sets `requested`; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread (a notebook's server, a test): signals are somebody else's
            self._before = {}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # Not print(): the signal may come in the middle of one, which cannot be entered twice.
        os.write(1, b"\nstopping after this step, saving first (Ctrl-C again stops at once, unsaved)\n")


class SaveSchedule:
    """Decides after each step whether to save and whether to stop.

    Several processes must do both at the same step. The step number is the same in all of them; clocks and signals are
    not, so the processes exchange them. The exchange waits for the steps that the devices have not finished, so it
    happens only every few seconds, by the clock of process 0.
    """

    def __init__(
        self, interrupt: Interrupt, *, every: int, keep_every: int, minutes: float,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        """Starts the clock.

        Args:
            interrupt: Holds whether this process received a signal to stop.
            every: Steps between saves; 0 for none.
            keep_every: Steps between saves that `Checkpoints` never removes; 0 for none.
            minutes: Longest time without a save; 0 for no limit.
            clock: Returns seconds.
        """
        self._interrupt, self._clock, self._minutes = interrupt, clock, minutes
        self._multiples = [steps for steps in (every, keep_every) if steps]
        self._saved_at = self._asked_at = clock()
        self._asked_step: int | None = None
        self._next_step = 0  # none asks before this

    def after(self, step: int) -> tuple[bool, bool]:
        """Returns whether to save and whether to stop after a step. Every process must call it after every step."""
        saves = any(step % steps == 0 for steps in self._multiples)
        if step < self._next_step:
            return saves, False
        now = self._clock()
        late = self._minutes > 0 and now - self._saved_at >= 60 * self._minutes
        gathered = gather([self._interrupt.requested, late, self._steps_until_next(step, now)])
        self._asked_step, self._asked_at = step, now
        if len(gathered) > 1:
            self._next_step = step + int(gathered[0, 2])
        return saves or bool(gathered[0, 1]), bool(gathered[:, 0].any())

    def _steps_until_next(self, step: int, now: float) -> int:
        """Returns the number of steps that took ASK_SECONDS lately."""
        if self._asked_step is None:
            return 1
        seconds_per_step = max((now - self._asked_at) / (step - self._asked_step), 1e-3)
        return max(1, round(ASK_SECONDS / seconds_per_step))

    def stop_requested(self) -> bool:
        """Returns whether any process has received a signal to stop. All processes must call it at the same point."""
        return any_process(self._interrupt.requested)

    def saved(self) -> None:
        """Restarts the clock of `minutes`."""
        self._saved_at = self._clock()
