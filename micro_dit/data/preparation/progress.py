"""Reports the progress of a preparation: throughput, idle time of the device, time left and cost."""

import time
from collections.abc import Callable

SECONDS_BETWEEN_REPORTS = 5.0


class PreparationProgress:
    """The progress of a preparation, reported every few seconds and at the end."""

    def __init__(self, parts: int, dollars_per_hour: float, report: Callable[[str], None]):
        """Starts the clock.

        Args:
            parts: Number of parts to process.
            dollars_per_hour: Price of this host; 0 omits the cost.
            report: Called with each line.
        """
        self.parts, self.dollars_per_hour, self.report = parts, dollars_per_hour, report
        self.lengths: list[int] = []  # numbers of items of the opened parts
        self.finished = 0  # number of finished parts
        self.images = self.shown = 0
        self.started = self.reported = time.monotonic()
        self.encoded_since: float | None = None
        self.encoded_until = 0.0
        self.waited = 0.0  # seconds for which the device was idle

    def begin_part(self, length: int) -> None:
        """Counts a part that is about to be read, with its approximate number of items."""
        self.lengths.append(length)

    def finish_part(self) -> None:
        """Counts a part that has been written."""
        self.finished += 1

    def encoded(self, since: float, until: float) -> None:
        """Records the dispatch time of a batch and the arrival time of its results, in seconds."""
        if self.encoded_since is None:
            self.encoded_since = self.encoded_until = since
        self.waited += max(0.0, since - self.encoded_until)
        self.encoded_until = until

    def advance(self, images: int) -> None:
        """Counts examples that have been written or dropped."""
        self.images += images
        if time.monotonic() - self.reported > SECONDS_BETWEEN_REPORTS:
            self.show()

    def close(self) -> None:
        """Reports the final progress, unless it has been reported already."""
        if self.images > self.shown:
            self.show()

    def show(self) -> None:
        """Reports the progress now, assuming that unopened parts have the average length of the opened ones."""
        self.reported, self.shown = time.monotonic(), self.images
        seconds = self.reported - self.started
        total = max(self.images, round(sum(self.lengths) * self.parts / len(self.lengths)))
        part = min(self.finished + 1, self.parts)
        left = seconds / self.images * (total - self.images)
        on_device = self.encoded_until - (self.encoded_since or self.encoded_until)
        line = (
            f"part {part} of {self.parts}: {self.images:,} of {total:,} images, {self.images / seconds:.1f} images/s, "
            f"device idle {self.waited / max(on_device, 1e-9):.0%} of the time, {duration(left)} left"
        )
        if self.dollars_per_hour:
            spent, whole = (self.dollars_per_hour * needed / 3600 for needed in (seconds, seconds + left))
            line += f", ${spent:,.2f} of ${whole:,.2f}"
        self.report(line)


def duration(seconds: float) -> str:
    """Formats a duration in hours, minutes or seconds."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
