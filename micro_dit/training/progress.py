"""Displays the progress of a phase in the terminal: steps, speed, remaining time and cost."""

import contextlib
import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
UPDATES_IN_RATE = 200  # enough for a stable rate, few enough to reflect a change of the machine's load
LOSS_DECAY = 0.98


@dataclasses.dataclass
class Progress:
    """A progress bar for one phase. If `stream` is not a terminal, it prints one line every ten seconds instead.

    The rate covers the last UPDATES_IN_RATE updates. It excludes the time before the first update (compilation and the
    first step) and the time inside `paused`. The cost includes both, because all of this time is billed.

    Attributes:
        name: Name of the phase.
        total_steps: Steps of the phase.
        initial_step: Steps of the phase that were completed before this process started.
        batch_size: Images per step, over all devices.
        flops_per_image: Training FLOPs per image.
        peak_flops: Peak FLOP/s of all devices together. If None, achieved FLOP/s are displayed instead of the MFU.
        dollars_per_hour: Price of all devices together; 0 hides the cost.
        dollars_before: Dollars spent before this phase, or before this process started.
        enabled: Whether to print; only process 0 does. Other processes still measure the rate and the cost.
        stream: Output stream.
        clock: Returns monotonic seconds.
    """

    name: str
    total_steps: int
    initial_step: int = 0
    batch_size: int = 1
    flops_per_image: float = 0.0
    peak_flops: float | None = None
    dollars_per_hour: float = 0.0
    dollars_before: float = 0.0
    enabled: bool = True
    stream: TextIO = dataclasses.field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        """Starts the clock, and creates the progress bar if `stream` is a terminal."""
        self._step, self._start, self._paused = self.initial_step, self.clock(), 0.0
        self._first_update = 0.0  # seconds from the start to the first update
        self._updates: deque[tuple[int, float]] = deque(maxlen=UPDATES_IN_RATE + 1)  # (step, seconds without pauses)
        self._loss, self._loss_weight = 0.0, 0.0
        self._last_loss: float | None = None
        self._printed_at, self._printed_step = -math.inf, self.initial_step
        self._bar: tqdm | None = None
        self._lines = self.enabled and not self.stream.isatty()
        if self.enabled and not self._lines:
            self._bar = tqdm(
                desc=self.name, total=self.total_steps, initial=self.initial_step, file=self.stream, dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% {bar:12} {n_fmt}/{total_fmt}{postfix}",
            )  # fmt: skip

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Records that `step` steps of the phase are completed, and displays the smoothed "loss" of `metrics`."""
        seconds = self.clock() - self._start - self._paused
        if not self._updates:
            self._first_update = seconds
        self._step = step
        self._updates.append((step, seconds))
        if metrics and "loss" in metrics:
            self._last_loss = float(metrics["loss"])
            if math.isfinite(self._last_loss):  # a NaN would otherwise remain in the smoothed loss
                self._loss = LOSS_DECAY * self._loss + (1 - LOSS_DECAY) * self._last_loss
                self._loss_weight = LOSS_DECAY * self._loss_weight + (1 - LOSS_DECAY)
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._lines and self.clock() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._print_line()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside the context from the rate, for evaluations and checkpoints."""
        start = self.clock()
        try:
            yield
        finally:
            self._paused += self.clock() - start

    def close(self) -> None:
        """Prints the final state. Calling it again has no effect."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif self._lines and self._printed_step != self._step:
            self._print_line()
        self._lines = False

    @property
    def images_per_second(self) -> float | None:
        """Returns images per second over the recent updates; None until the second update."""
        seconds_per_step = self._seconds_per_step()
        return self.batch_size / seconds_per_step if seconds_per_step else None

    @property
    def flops_per_second(self) -> float | None:
        """Returns the achieved FLOP/s of all devices together; None until the second update."""
        rate = self.images_per_second
        return rate * self.flops_per_image if rate and self.flops_per_image else None

    @property
    def mfu(self) -> float | None:
        """Returns the model FLOPs utilization, achieved over peak FLOP/s; None if either is unknown."""
        achieved = self.flops_per_second
        return achieved / self.peak_flops if achieved and self.peak_flops else None

    @property
    def dollars(self) -> float:
        """Returns the cost so far in dollars."""
        return self.dollars_before + (self.clock() - self._start) / 3600 * self.dollars_per_hour

    @property
    def seconds_left(self) -> float | None:
        """Returns the remaining seconds at the recent rate, without pauses; None until the second update."""
        seconds_per_step = self._seconds_per_step()
        return max(0, self.total_steps - self._step) * seconds_per_step if seconds_per_step else None

    def scalars(self) -> dict[str, float]:
        """Returns images_per_second, flops_per_second, mfu and dollars by name, without unknown values."""
        values = {name: getattr(self, name) for name in ("images_per_second", "flops_per_second", "mfu")}
        values["dollars"] = self.dollars if self.dollars_per_hour else None
        return {name: value for name, value in values.items() if value is not None}

    def _seconds_per_step(self) -> float | None:
        if len(self._updates) < 2:
            return None
        (first_step, first_time), (last_step, last_time) = self._updates[0], self._updates[-1]
        steps, seconds = last_step - first_step, last_time - first_time
        return seconds / steps if steps > 0 and seconds > 0 else None

    def _status(self) -> str:
        parts = []
        if self._last_loss is not None:
            finite = math.isfinite(self._last_loss)
            parts.append(f"loss {self._loss / self._loss_weight if finite else self._last_loss:.4f}")
        if (rate := self.images_per_second) is None:
            parts.append(f"first step {self._first_update:.1f} s")
        else:
            parts.append(f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.1f} images/s")
        if (mfu := self.mfu) is not None:
            parts.append(f"{mfu:.1%} MFU")
        elif (achieved := self.flops_per_second) is not None:
            parts.append(f"{achieved / 1e12:.1f} TFLOP/s" if achieved >= 1e12 else f"{achieved / 1e9:.0f} GFLOP/s")
        left = self.seconds_left
        if self._step >= self.total_steps:
            parts.append(f"took {_duration(self.clock() - self._start)}")
        elif left is not None:
            parts.append(f"ETA {_duration(left)}")
        if self.dollars_per_hour:
            money = f"${self.dollars:,.2f}"
            if left:
                money += f" → ${self.dollars + left / 3600 * self.dollars_per_hour:,.2f}"
            parts.append(money)
        return " · ".join(parts)

    def _print_line(self) -> None:
        percent = 100 * self._step / max(1, self.total_steps)
        where = f"{self.name}  step {self._step:,}/{self.total_steps:,} ({percent:.1f}%)"
        print(f"{where}  {self._status()}", file=self.stream, flush=True)
        self._printed_at, self._printed_step = self.clock(), self._step


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:" if days or hours else ""
    return (f"{days} d " if days else "") + f"{text}{minutes:02d}:{seconds:02d}"
