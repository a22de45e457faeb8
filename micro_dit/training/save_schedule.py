"""Decides when a run saves and stops, by step, time or signal, and at the same step in all processes."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from micro_dit.parallel.distributed import any_process, gather

ASK_SECONDS = 2.0


class Interrupt:
    """A context manager that handles SIGINT and SIGTERM.

    The first signal sets `requested`. Another SIGINT raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:  # Python allows signal handlers only in the main thread, which may not be this one
            self._before = {}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # print() is not reentrant, and the signal may interrupt a call of it.
        os.write(1, b"\nStopping after this step and saving a checkpoint (Ctrl-C again stops without saving)\n")


class SaveSchedule:
    """Decides after each step whether to save and whether to stop.

    All processes must save and stop at the same step. They agree on the step number but not on clocks and signals,
    which they therefore exchange. The exchange waits until the devices have finished all dispatched steps, so it
    happens only every few seconds, by the clock of process 0.
    """

    def __init__(
        self, interrupt: Interrupt, *, every: int, keep_every: int, minutes: float,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        """Starts the clock.

        Args:
            interrupt: Reports whether this process received a signal to stop.
            every: Steps between saves; 0 disables saves by step.
            keep_every: Steps between saves that `Checkpoints` keeps; 0 disables them.
            minutes: Maximum time between saves; 0 disables saves by time.
            clock: Returns monotonic seconds.
        """
        self._interrupt, self._clock, self._minutes = interrupt, clock, minutes
        self._multiples = [steps for steps in (every, keep_every) if steps]
        self._saved_at = self._asked_at = clock()
        self._asked_step: int | None = None
        self._next_step = 0  # the step of the next exchange between processes

    def after(self, step: int) -> tuple[bool, bool]:
        """Returns (save, stop): whether to do each after `step`. Every process must call it after every step."""
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
        """Returns the number of steps that take about ASK_SECONDS at the recent speed."""
        if self._asked_step is None:
            return 1
        seconds_per_step = max((now - self._asked_at) / (step - self._asked_step), 1e-3)
        return max(1, round(ASK_SECONDS / seconds_per_step))

    def stop_requested(self) -> bool:
        """Returns whether any process has received a signal to stop. All processes must call it at the same point."""
        return any_process(self._interrupt.requested)

    def saved(self) -> None:
        """Records that a checkpoint was saved now, which restarts the time limit `minutes`."""
        self._saved_at = self._clock()
