"""Work that runs ahead of whoever needs its results: decoding in worker processes, and stages in threads."""

import contextlib
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import connection, get_context, parent_process
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
    """Maps a function over items in worker processes, in order, and survives a worker that dies of an item.

    Use as a context manager, which ends and reaps every worker process that it has started. The processes import what
    the function needs and the main module again, so both should be light; they end with this process, also if it is
    killed.
    """

    def __init__(self, workers: int):
        """Takes the number of processes; 0 decodes in threads of this one, which suits a few hundred images."""
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers or THREADS, "decode")  # one for each worker process
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        if not self.workers:
            silence_pillow()
            return self
        for _ in range(self.workers):
            self._workers.append(_Worker())
            self._idle.put(self._workers[-1])
        if self._call(os.getpid) is None:
            self.close()
            raise UserError("No process to decode images can be started: run with --workers=0, without any.")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops the items that wait, lets those at work finish, and ends all threads and processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def map(
        self, function: Callable[..., R], items: Iterable[tuple[T, tuple[Any, ...] | None]], ahead: int
    ) -> Iterator[tuple[T, R | None]]:
        """Calls an importable function for each item, and keeps the order; at most `ahead` items are held at once.

        An item is a label and the arguments, or None in their place. Yields the label and the result, which is None
        without arguments, or if two worker processes died of them.
        """
        pending: deque[tuple[T, Future[R | None] | None]] = deque()
        call: Callable[..., R | None] = partial(self._call, function) if self.workers else function

        def result() -> tuple[T, R | None]:
            label, future = pending.popleft()
            return label, None if future is None else future.result()

        try:
            for label, arguments in items:
                future = None if arguments is None else self._threads.submit(call, *arguments)
                pending.append((label, future))
                if len(pending) >= ahead:
                    yield result()
        except Exception:
            while pending:  # what came before the error is good
                yield result()
            raise
        while pending:
            yield result()

    def _call(self, function: Callable[..., R], *arguments: Any) -> R | None:
        """Calls a function in an idle worker; once more if that dies, since the item may not be to blame."""
        worker = self._idle.get()
        try:
            for _ in range(2):
                with contextlib.suppress(WorkerDied):
                    return worker.call(function, arguments)
            return None
        finally:
            self._idle.put(worker)


class WorkerDied(Exception):
    """A worker process ended before it answered."""


class _Worker:
    """A worker process with a pipe of its own, replaced by a new process when it dies.

    `concurrent.futures.ProcessPoolExecutor` does not serve here. A worker that dies takes the whole pool and all items
    at work with it, and on Python 3.11 a pool that breaks while `submit` starts a process leaves that process behind.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        spawn = get_context("spawn")  # not forked: JAX has threads by now
        self._connection, theirs = spawn.Pipe()
        # Started with its own end of the pipe only: either side reads the end of the file when the other dies.
        self._process = spawn.Process(target=_serve, args=(theirs, start_worker), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
        """Calls a function in the process; raises WorkerDied if it has ended: a new one is there for the next call."""
        request = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)  # may raise, with the worker unharmed
        try:
            self._connection.send_bytes(request)
            returned, result = self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            self._start()
            raise WorkerDied from error
        if not returned:
            raise result
        return result

    def close(self) -> None:
        """Ends the process and waits for its end."""
        self._connection.close()
        self._process.kill()  # a worker owns nothing that it would have to put away
        self._process.join()


def _serve(requests: connection.Connection, initialize: Callable[[], None]) -> None:
    """Runs in a worker process: answers each request with (True, result) or (False, error)."""
    initialize()
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = requests.recv()
            answer: tuple[bool, Any]
            try:
                answer = True, function(*arguments)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = False, error
            requests.send(answer)


def start_worker() -> None:
    """Prepares a worker process."""
    silence_pillow()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def silence_pillow() -> None:
    """Ignores Pillow's warnings: an image is used, or dropped and named."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _end_with_parent() -> None:
    """Ends this process with its parent, also in the middle of an item."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


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
        last: BaseException = StopIteration()
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as error:
            last = error
        finally:
            if isinstance(items, Generator):
                items.close()
        put(last)

    thread = threading.Thread(target=fill, name="run ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), BaseException):
            yield item
        if not isinstance(item, StopIteration):
            raise item
    finally:
        stopped.set()
        thread.join()
