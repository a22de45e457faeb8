"""What a person watching the run wants to know: how far, how fast, how long still, and what it costs."""

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
UPDATES_IN_RATE = 200  # long enough to be steady, short enough to follow a machine that gets busy
LOSS_DECAY = 0.98


class Progress:
    """One bar for one phase of training; where no terminal listens, one plain line every ten seconds.

    The rate leaves out everything up to the first update (compilation and the first step) and all time spent inside
    `paused`; it covers the last UPDATES_IN_RATE updates. Dollars run with the wall clock from construction on, through
    pauses and compilation too, because that is what is billed.

    Args:
        name: the phase.
        total_steps: the step at which the phase ends.
        initial_step: steps already done.
        batch_size: images per step, over all devices.
        flops_per_image: training FLOPs of one image.
        peak_flops: FLOP/s of all devices together; None if unknown, then achieved FLOP/s are shown instead of MFU.
        dollars_per_hour: price of all devices together; 0 shows no money.
        dollars_before: spent before this phase, or before a resume.
        enabled: False counts without showing anything (on every process but the first).
        stream: where to write; standard error if None.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        total_steps: int,
        initial_step: int = 0,
        batch_size: int = 1,
        flops_per_image: float = 0.0,
        peak_flops: float | None = None,
        dollars_per_hour: float = 0.0,
        dollars_before: float = 0.0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name, self._total, self._step, self._batch_size = name, total_steps, initial_step, batch_size
        self._flops_per_image, self._peak_flops = flops_per_image, peak_flops
        self._dollars_per_hour, self._dollars_before = dollars_per_hour, dollars_before
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = clock()
        self._paused = 0.0
        self._first_update = 0.0  # seconds until it came
        self._updates: deque[tuple[int, float]] = deque(maxlen=UPDATES_IN_RATE + 1)  # (step, seconds without pauses)
        self._loss, self._loss_weight = 0.0, 0.0
        self._last_loss: float | None = None
        self._printed_at, self._printed_step = -math.inf, initial_step
        self._lines = enabled
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._lines = False
            self._bar = tqdm(
                desc=name,
                total=total_steps,
                initial=initial_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% {bar:12} {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Tells that `step` steps are done.

        Args:
            step: steps done since the beginning of training; may advance by more than one.
            metrics: numbers already on the host; "loss" is shown, smoothed.
        """
        if not self._updates:
            self._first_update = self._clock() - self._start - self._paused
        self._step = step
        self._updates.append((step, self._clock() - self._start - self._paused))
        if metrics and "loss" in metrics:
            self._last_loss = float(metrics["loss"])
            if math.isfinite(self._last_loss):  # one bad step must not spoil the average for good
                self._loss = LOSS_DECAY * self._loss + (1 - LOSS_DECAY) * self._last_loss
                self._loss_weight = LOSS_DECAY * self._loss_weight + (1 - LOSS_DECAY)
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._lines and self._clock() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._print_line()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (evaluation, samples, checkpoints) does not count in the rate."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def write(self, text: str) -> None:
        """Prints a line of text without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._lines:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last state on the screen; closing twice does no harm."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif self._lines and self._printed_step != self._step:
            self._print_line()
        self._lines = False

    @property
    def images_per_second(self) -> float | None:
        """Recent rate; None until the second update."""
        seconds_per_step = self._seconds_per_step()
        return self._batch_size / seconds_per_step if seconds_per_step else None

    @property
    def flops_per_second(self) -> float | None:
        """Achieved FLOP/s of all devices together; None until the second update."""
        rate = self.images_per_second
        return rate * self._flops_per_image if rate and self._flops_per_image else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization, achieved FLOP/s over the peak; None if either is unknown."""
        achieved = self.flops_per_second
        return achieved / self._peak_flops if achieved and self._peak_flops else None

    @property
    def dollars(self) -> float:
        """Spent so far."""
        return self._dollars_before + (self._clock() - self._start) / 3600 * self._dollars_per_hour

    @property
    def seconds_left(self) -> float | None:
        """At the recent rate, without the pauses to come; None until the second update."""
        seconds_per_step = self._seconds_per_step()
        return max(0, self._total - self._step) * seconds_per_step if seconds_per_step else None

    def scalars(self) -> dict[str, float]:
        """What is known of images_per_second, flops_per_second, mfu and dollars, by name, for the metrics."""
        values = {
            "images_per_second": self.images_per_second,
            "flops_per_second": self.flops_per_second,
            "mfu": self.mfu,
            "dollars": self.dollars if self._dollars_per_hour else None,
        }
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
        if self._step >= self._total:
            parts.append(f"took {_duration(self._clock() - self._start)}")
        elif left is not None:
            parts.append(f"ETA {_duration(left)}")
        if self._dollars_per_hour:
            money = f"${self.dollars:,.2f}"
            if left:
                money += f" → ${self.dollars + left / 3600 * self._dollars_per_hour:,.2f}"
            parts.append(money)
        return " · ".join(parts)

    def _print_line(self) -> None:
        percent = 100 * self._step / max(1, self._total)
        where = f"{self._name}  step {self._step:,}/{self._total:,} ({percent:.1f}%)"
        print(f"{where}  {self._status()}", file=self._stream, flush=True)
        self._printed_at, self._printed_step = self._clock(), self._step


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{minutes:02d}:{seconds:02d}"
    if days or hours:
        text = f"{hours}:{text}"
    return f"{days} d {text}" if days else text
