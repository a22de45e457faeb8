import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from micro_dit.data.captions import clean_caption
from micro_dit.data.preparation import workers
from micro_dit.data.preparation.workers import EMPTY_CAPTION, Decoders, prepare_example, run_ahead
from micro_dit.errors import UserError

REPOSITORY = Path(__file__).parents[3]


def square(number: int) -> int:
    return number**2


def square_or_die(number: int) -> int:
    if number in (3, 4, 11):
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def fail(number: int) -> int:
    raise UserError(f"no {number}")


def imported_modules() -> set[str]:
    return set(sys.modules)


def numbered(count: int) -> list[tuple[int, tuple[int] | None]]:
    """Returns numbered items. Every fifth has no arguments."""
    return [(number, None if number % 5 == 0 else (number,)) for number in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_in_order(workers: int) -> None:
    with Decoders(workers) as decoders:
        expected = [(n, None if n % 5 == 0 else n**2) for n in range(50)]
        assert list(decoders.map(square, numbered(50), ahead=7)) == expected
        assert list(decoders.map(square, [], ahead=7)) == []
        with pytest.raises(UserError, match="no 1"):
            list(decoders.map(fail, numbered(3), ahead=7))


def test_error_of_the_items_is_raised_after_earlier_results() -> None:
    def items() -> Iterator[tuple[int, tuple[int]]]:
        yield 1, (1,)
        yield 2, (2,)
        raise UserError("broken")

    with Decoders(0) as decoders:
        results = decoders.map(square, items(), ahead=7)
        assert [next(results), next(results)] == [(1, 1), (2, 4)]
        with pytest.raises(UserError, match="broken"):
            next(results)


def test_number_of_items_in_progress_is_bounded() -> None:
    taken = 0

    def items() -> Iterator[tuple[int, tuple[int]]]:
        nonlocal taken
        for taken in range(1, 101):
            yield taken, (taken,)

    with Decoders(0) as decoders:
        for number, _ in decoders.map(square, items(), ahead=6):
            assert taken - number < 6


def test_crashing_worker_loses_only_its_item() -> None:
    with Decoders(2) as decoders:
        results = dict(decoders.map(square_or_die, [(n, (n,)) for n in range(30)], ahead=8))
    assert results == {n: None if n in (3, 4, 11) else n**2 for n in range(30)}
    assert multiprocessing.active_children() == []


def test_starting_workers_are_ended() -> None:
    with Decoders(3) as decoders:
        assert list(decoders.map(square_or_die, [(3, (3,))], ahead=1)) == [(3, None)]
    assert multiprocessing.active_children() == []


def test_workers_do_not_import_jax_or_torch() -> None:
    with Decoders(1) as decoders:
        ((_, modules),) = decoders.map(imported_modules, [("", ())], ahead=1)
    assert modules is not None
    assert "numpy" in modules
    assert not modules & {"jax", "torch", "flax", "transformers"}
    # Each worker imports the main module.
    code = "import sys, micro_dit.precompute; print({'jax', 'torch', 'flax'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_workers_that_do_not_start_raise_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "start_worker", os.abort)
    with pytest.raises(UserError, match="--workers=0"), Decoders(1):
        pass
    assert multiprocessing.active_children() == []


def test_example_is_prepared_or_dropped() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    image = file.getvalue()
    prepared = prepare_example(image, ("a", " ", "b", "a"), [16, 32], 16, clean=False)
    assert prepared.captions == ("a", "b")
    assert {side: crop.shape for side, crop in prepared.images.items()} == {16: (16, 16, 3), 32: (32, 32, 3)}
    assert (prepared.altered, prepared.dropped) == (("image was enlarged to 32 px",), None)
    assert prepare_example(image, (" ", ""), [16], 16, clean=False)[::2] == (("",), (EMPTY_CAPTION,))
    assert prepare_example(image, ("x",), [16], 31, clean=False).dropped == "image is smaller than 31 px"


def test_captions_are_cleaned_if_requested() -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    captions = ("A cat (SOLD OUT)", "@user", "a cat sold out")
    cleaned = prepare_example(file.getvalue(), captions, [16], 16, clean=True).captions
    assert cleaned == (clean_caption(captions[0]),) == ("a cat sold out",)


def test_very_long_caption_is_truncated_before_cleaning() -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    prepared = prepare_example(file.getvalue(), ["a " * 10_000], [16], 16, clean=True)
    assert prepared.captions == (("a " * 2_500).strip(),)
    assert prepared.altered == ("caption was cut to 5,000 characters",)


def test_run_ahead_is_bounded_ordered_and_raises_errors() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 20:
            taken += 1
            yield taken
        raise UserError("broken")

    ahead = run_ahead(items(), 3)
    for expected in range(1, 21):
        assert next(ahead) == expected
        time.sleep(0.002)
        assert taken - expected <= 3 + 1
    with pytest.raises(UserError, match="broken"):
        next(ahead)


def test_closing_a_chain_closes_every_stage() -> None:
    closed = []

    def endless() -> Iterator[int]:
        try:
            yield from iter(int, 1)
        finally:
            closed.append(threading.current_thread())

    before = threading.active_count()
    chain = run_ahead((item for item in run_ahead(endless(), 2)), 2)
    assert next(chain) == 0
    chain.close()
    assert len(closed) == 1
    assert threading.active_count() == before
