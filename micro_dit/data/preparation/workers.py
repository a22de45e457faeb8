"""Work that runs ahead of whoever needs its results: decoding in worker processes, and stages in threads."""

import os
import queue
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from micro_dit.data.captions import clean_caption
from micro_dit.data.images import UnusableImage, crop_image
from micro_dit.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

THREADS = 4  # that decode where there are no worker processes
EMPTY_CAPTION = "caption is empty, and trains the unconditional model"
LONGEST_CAPTION = 5_000  # characters; no encoder reads that far, and cleaning takes time with the square of the length


class Prepared(NamedTuple):
    """What becomes of an example before it is encoded.

    Attributes:
        captions: one or more.
        images: by resolution r, (r, r, 3) uint8.
        altered: what was changed, in words that can be counted.
        dropped: why it cannot be used; None if it can.
    """

    captions: tuple[str, ...] = ()
    images: dict[int, np.ndarray] = {}  # noqa: RUF012 (never written to)
    altered: tuple[str, ...] = ()
    dropped: str | None = None


def prepare_example(
    image: bytes, captions: Sequence[str], resolutions: Sequence[int], minimum_side: int, clean: bool
) -> Prepared:
    """Crops the image at every resolution and cleans the captions; an example that cannot be used says why."""
    try:
        images, side = crop_image(image, resolutions, minimum_side)
    except UnusableImage as error:
        return Prepared(dropped=str(error))
    altered = [f"image was enlarged to {resolution} px" for resolution in resolutions if side < resolution]
    if any(len(caption) > LONGEST_CAPTION for caption in captions):
        altered.append(f"caption was cut to {LONGEST_CAPTION:,} characters")
        captions = [caption[:LONGEST_CAPTION] for caption in captions]
    if clean:
        captions = [clean_caption(caption) for caption in captions]
    full = tuple(dict.fromkeys(caption for caption in captions if caption.strip()))
    if not full:
        altered.append(EMPTY_CAPTION)
    return Prepared(full or ("",), images, tuple(altered))


class Decoders:
    """Worker processes that map a function over items, in order, and survive one that dies of an item.

    Use as a context manager. The processes import what the function needs, and the main module once more, so that both
    had better be light; they end with this process, however it ends.
    """

    def __init__(self, workers: int):
        """Starts nothing yet.

        Args:
            workers: number of processes; 0 decodes in threads of this one, which suits a few hundred images.
        """
        self.workers = workers
        self._pool: Executor | None = None
        self._alone: Executor | None = None  # a single worker, for items that may have killed another

    def __enter__(self) -> Self:
        self._pool = self._start(self.workers)
        try:
            self._pool.submit(os.getpid).result()
        except BrokenProcessPool as error:
            raise UserError("No process to decode images can be started: run with --workers=0, without any.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pool in (self._pool, self._alone):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self, function: Callable[..., R], items: Iterable[tuple[T, tuple[Any, ...] | None]], ahead: int
    ) -> Iterator[tuple[T, R | None]]:
        """Calls a function for each item, and keeps the order.

        Args:
            function: must be importable by its name.
            items: a label and the arguments; None in their place calls nothing.
            ahead: how many items are held at once, at most.

        Yields:
            The label and the result; None without arguments, or if a worker process died of them, alone as in company.

        Raises:
            Exception: whatever `function` or `items` raises.
        """
        pending: deque[tuple[T, tuple[Any, ...] | None, Future[R] | None]] = deque()

        def result() -> tuple[T, R | None]:
            label, arguments, future = pending.popleft()
            if arguments is None or future is None:
                return label, None
            try:
                return label, future.result()
            except BrokenProcessPool:  # of one of those that were at work: which one shows when each is alone
                return label, self._try_alone(function, arguments)

        try:
            for label, arguments in items:
                pending.append((label, arguments, None if arguments is None else self._submit(function, arguments)))
                if len(pending) >= ahead:
                    yield result()
        except Exception:
            while pending:  # what came before the error is good
                yield result()
            raise
        while pending:
            yield result()

    def _submit(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> "Future[R]":
        assert self._pool is not None, "enter the context first"
        try:
            return self._pool.submit(function, *arguments)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = self._start(self.workers)
            return self._pool.submit(function, *arguments)

    def _try_alone(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> R | None:
        self._alone = self._alone or self._start(1)
        try:
            return self._alone.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._alone.shutdown(wait=False)
            self._alone = None
            return None

    def _start(self, workers: int) -> Executor:
        if not self.workers:
            silence_pillow()
            return ThreadPoolExecutor(THREADS, "decode")
        # Spawned, not forked: JAX has threads by now.
        return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)


def start_worker() -> None:
    """Prepares a worker process."""
    silence_pillow()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def silence_pillow() -> None:
    """Ignores Pillow's warnings: an image is used, or dropped and named."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _end_with_parent() -> None:
    """Ends this process with its parent: the workers of one that was killed would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class _Raised(NamedTuple):
    error: BaseException


_END = object()


def run_ahead(items: Iterable[T], count: int) -> Generator[T, None, None]:
    """Yields items that a thread of its own takes from `items`, up to `count` in advance; errors arrive in their place.

    Closing it ends the thread and closes `items`, so that a chain of stages stops from its end.
    """
    ready: queue.Queue[Any] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: object) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        last: object = _END
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as error:
            last = _Raised(error)
        finally:
            if isinstance(items, Generator):
                items.close()
        put(last)

    thread = threading.Thread(target=fill, name="run ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()
