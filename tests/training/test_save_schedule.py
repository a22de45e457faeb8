import signal
import threading
from typing import Any

import numpy as np
import pytest

from micro_dit.training import save_schedule as module
from micro_dit.training.save_schedule import Interrupt, SaveSchedule


class Clock:
    """A fake clock, advanced by the test."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, every: int = 0, keep_every: int = 0, minutes: float = 0.0) -> tuple[SaveSchedule, Interrupt]:
    interrupt = Interrupt()
    return SaveSchedule(interrupt, every=every, keep_every=keep_every, minutes=minutes, clock=clock), interrupt


def test_saves_at_multiples_of_both_intervals() -> None:
    saving, _ = make(Clock(), every=4, keep_every=6)
    assert [step for step in range(1, 13) if saving.after(step)[0]] == [4, 6, 8, 12]
    saving, _ = make(Clock())
    assert not any(saving.after(step)[0] for step in range(1, 13))


def test_saves_when_the_time_limit_has_passed() -> None:
    clock = Clock()
    saving, _ = make(clock, every=5, minutes=0.5)
    saved = []
    for step in range(1, 14):
        clock.now += 10
        if saving.after(step)[0]:
            saving.saved()
            saved.append(step)
    assert saved == [3, 5, 8, 10, 13]  # every save restarts the time limit, also a save by step


def test_stops_after_an_interrupt() -> None:
    saving, interrupt = make(Clock())
    assert saving.after(1) == (False, False)
    assert not saving.stop_requested()
    interrupt.requested = True
    assert saving.after(2) == (False, True)
    assert saving.stop_requested()


class Others:
    """A fake of the other one of two processes. It records the numbers that this process gathers."""

    def __init__(self, interrupted: bool = False, late: bool = False, steps: int = 999) -> None:
        self.numbers, self.gathered = [interrupted, late, steps], list[Any]()

    def gather(self, numbers: list[int]) -> np.ndarray:
        self.gathered.append(list(map(int, numbers)))
        return np.asarray([numbers, self.numbers], np.int32)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_decides_by_time_and_any_process_can_stop(
    monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    others = Others(interrupted=True, late=True)
    monkeypatch.setattr(module, "gather", others.gather if first else lambda n: others.gather(n)[::-1])
    saving, _ = make(Clock(), minutes=5)
    assert saving.after(1) == (not first, True)


def test_processes_communicate_every_few_seconds_and_save_by_steps_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    others, clock = Others(), Clock()
    monkeypatch.setattr(module, "gather", others.gather)
    saving, _ = make(clock, every=7)
    exchanges, saves = [], []
    for step in range(1, 31):
        clock.now += 0.25
        before = len(others.gathered)
        saves += [step] if saving.after(step)[0] else []
        exchanges += [step] if len(others.gathered) > before else []
    assert exchanges == [1, 2, 10, 18, 26]  # eight steps take two seconds
    assert saves == [7, 14, 21, 28]


# ---- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_recorded_and_handlers_are_restored(number: int, capfd: pytest.CaptureFixture) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(number)
        assert interrupt.requested
    assert "Stopping after this step and saving a checkpoint" in capfd.readouterr().out
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_raises_keyboard_interrupt() -> None:
    with Interrupt(), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a scheduler may send SIGTERM repeatedly
        signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_no_handler_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with Interrupt() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
