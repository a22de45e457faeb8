"""Rates, cost and output of the progress bar, with a fake clock."""

import contextlib
import io
import math
import re
from typing import Any

import pytest

from micro_dit.training.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, **options: Any) -> Progress:
    defaults = dict(total_steps=100, batch_size=8, flops_per_image=2e9, stream=io.StringIO(), clock=clock)
    return Progress("faces", **(defaults | options))


def test_rate_excludes_compilation_and_pauses(clock: Clock) -> None:
    progress = make(clock, peak_flops=100e9)
    clock.now += 50  # compilation
    progress.update(1)
    assert progress.images_per_second is None
    assert progress.mfu is None
    for step in range(2, 12):
        clock.now += 0.5
        progress.update(step)
        if step % 5 == 0:
            with progress.paused():
                clock.now += 30  # evaluation
    assert progress.images_per_second == pytest.approx(16)
    assert progress.flops_per_second == pytest.approx(32e9)
    assert progress.mfu == pytest.approx(0.32)
    assert progress.seconds_left == pytest.approx(89 * 0.5)


def test_a_pause_that_raises_is_still_excluded(clock: Clock) -> None:
    progress = make(clock)
    progress.update(1)
    with contextlib.suppress(RuntimeError), progress.paused():
        clock.now += 30
        raise RuntimeError
    clock.now += 1
    progress.update(2)
    assert progress.images_per_second == pytest.approx(8)


def test_rate_of_a_resumed_phase_counts_only_new_steps(clock: Clock) -> None:
    progress = make(clock, initial_step=40)
    progress.update(50)
    clock.now += 5
    progress.update(60)  # updates may be several steps apart
    assert progress.images_per_second == pytest.approx(16)
    assert progress.seconds_left == pytest.approx(20)


def test_rate_follows_a_change_of_speed(clock: Clock) -> None:
    progress = make(clock, total_steps=10_000)
    for step in range(1, 2001):
        clock.now += 0.1 if step < 1000 else 1.0
        progress.update(step)
    assert progress.images_per_second == pytest.approx(8)


def test_dollars_include_compilation_and_pauses(clock: Clock) -> None:
    progress = make(clock, dollars_per_hour=36.0, dollars_before=5.0)
    clock.now += 50
    progress.update(1)
    with progress.paused():
        clock.now += 30
    clock.now += 20
    progress.update(2)
    assert progress.dollars == pytest.approx(5 + 100 * 0.01)
    progress.close()
    line = progress.stream.getvalue().splitlines()[-1]
    assert "$6.00 → $25.60" in line  # 98 steps of 20 s remain


def test_scalars_exclude_unknown_values(clock: Clock) -> None:
    progress = make(clock, flops_per_image=0.0)
    assert progress.scalars() == {}
    progress.update(1)
    clock.now += 1
    progress.update(2)
    assert progress.scalars() == {"images_per_second": 8.0}


def test_without_a_terminal_a_line_is_printed_every_ten_seconds(clock: Clock) -> None:
    progress = make(clock, total_steps=5000)
    for step in range(1, 3501):
        clock.now += 0.01
        progress.update(step, {"loss": 0.5})
    progress.close()
    progress.close()
    lines = progress.stream.getvalue().splitlines()
    assert len(lines) == 5  # after the first step, at 10, 20 and 30 seconds, and at the end
    assert "first step" in lines[0]
    assert re.fullmatch(
        r"faces  step 3,500/5,000 \(70\.0%\)  loss 0\.5000 · 800 images/s · 1\.6 TFLOP/s · ETA 00:15", lines[-1]
    )
    assert "\r" not in progress.stream.getvalue()


def test_on_a_terminal_one_bar_is_displayed(clock: Clock) -> None:
    terminal = Terminal()
    progress = make(clock, stream=terminal, peak_flops=1e12)
    for step in range(1, 101):
        clock.now += 0.5
        progress.update(step, {"loss": 1.0 / step})
    progress.close()
    output = terminal.getvalue()
    assert "\r" in output
    last = [frame for frame in re.split(r"[\r\n]", output) if "faces" in frame][-1]
    assert "100/100" in last
    assert "16.0 images/s" in last
    assert "3.2% MFU" in last
    assert "took 00:50" in last
    assert "$" not in output


def test_a_nan_loss_is_displayed_and_does_not_affect_later_values(clock: Clock) -> None:
    progress = make(clock)
    progress.update(1, {"loss": 0.5})
    assert "loss 0.5000" in progress._status()
    progress.update(2, {"loss": math.nan})
    assert "loss nan" in progress._status()
    progress.update(3, {"loss": 0.5})
    assert "loss 0.5000" in progress._status()


def test_a_disabled_bar_measures_the_rate_without_printing(clock: Clock) -> None:
    for stream in (io.StringIO(), Terminal()):
        progress = make(clock, enabled=False, stream=stream)
        for step in (1, 2):
            clock.now += 20
            progress.update(step, {"loss": 1.0})
        progress.close()
        assert stream.getvalue() == ""
        assert progress.images_per_second == pytest.approx(0.4)


@pytest.mark.parametrize(("seconds", "text"), [(59, "00:59"), (3600, "1:00:00"), (2 * 86400 + 61, "2 d 0:01:01")])
def test_eta_is_formatted_with_days_hours_and_minutes(clock: Clock, seconds: float, text: str) -> None:
    progress = make(clock, total_steps=3)
    progress.update(1)
    clock.now += seconds
    progress.update(2)
    assert f"ETA {text}" in progress._status()
