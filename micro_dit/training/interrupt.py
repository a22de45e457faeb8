"""Ctrl-C and SIGTERM ask the loop to save and stop, instead of tearing it down."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second SIGINT interrupts as usual."""

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
