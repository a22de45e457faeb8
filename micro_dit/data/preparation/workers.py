"""Runs work ahead of its consumer: decoding in worker processes, and other stages in threads."""

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

THREADS = 4  # decoding threads if there are no worker processes
EMPTY_CAPTION = "caption is empty (used for unconditional training)"
LONGEST_CAPTION = 5_000  # characters; no encoder uses more, and the time for cleaning is quadratic in the length


class Prepared(NamedTuple):
    """An example that is ready to be encoded, or the reason why it is dropped.

    Attributes:
        captions: One or more captions.
        images: By resolution r, (r, r, 3) uint8.
        altered: Kinds of changes that were applied.
        dropped: Reason why the example cannot be used; None if it can.
    """

    captions: tuple[str, ...] = ()
    images: dict[int, np.ndarray] = {}  # noqa: RUF012 (never written to)
    altered: tuple[str, ...] = ()
    dropped: str | None = None


def prepare_example(
    image: bytes, captions: Sequence[str], resolutions: Sequence[int], minimum_side: int, clean: bool
) -> Prepared:
    """Crops the image at every resolution and cleans the captions; sets `dropped` if the image cannot be used."""
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
    """A pool of worker processes that maps a function over items in order and survives crashes of its workers.

    Use it as a context manager, which ends all worker processes. Each process imports the main module and the module of
    the function, so both should import quickly. The processes end with this process, even if it is killed.
    """

    def __init__(self, workers: int):
        """Sets the number of processes; 0 uses threads of this process, which suffices for a few hundred images."""
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers or THREADS, "decode")  # one per worker process
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
            raise UserError("Cannot start processes to decode images. Set --workers=0 to decode in threads.")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels waiting items, waits for running ones, and ends all threads and processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def map(
        self, function: Callable[..., R], items: Iterable[tuple[T, tuple[Any, ...] | None]], ahead: int
    ) -> Iterator[tuple[T, R | None]]:
        """Calls a function for each item and yields the results in order.

        Args:
            function: Function to call; it must be importable.
            items: Pairs of a label and the arguments, or None instead of arguments.
            ahead: Maximum number of items in progress.

        Yields:
            The label and the result. The result is None if the arguments are None, or if they crashed two worker
            processes in a row.
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
            while pending:  # results of the items before the error
                yield result()
            raise
        while pending:
            yield result()

    def _call(self, function: Callable[..., R], *arguments: Any) -> R | None:
        """Calls a function in an idle worker, and retries once if the worker dies, as the item may not be the cause."""
        worker = self._idle.get()
        try:
            for _ in range(2):
                with contextlib.suppress(WorkerDied):
                    return worker.call(function, arguments)
            return None
        finally:
            self._idle.put(worker)


class WorkerDied(Exception):
    """A worker process ended before it returned a result."""


class _Worker:
    """A worker process with its own pipe, which is replaced by a new process when it dies.

    `concurrent.futures.ProcessPoolExecutor` is not suitable: a worker that dies breaks the whole pool and fails all
    running items, and on Python 3.11 a pool that breaks while `submit` starts a process leaves that process running.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        spawn = get_context("spawn")  # not fork, because JAX has started threads
        self._connection, theirs = spawn.Pipe()
        # The process inherits only its own end of the pipe, so that either side reads EOF when the other dies.
        self._process = spawn.Process(target=_serve, args=(theirs, start_worker), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
        """Calls a function in the process. If the process dies, starts a new one and raises WorkerDied."""
        request = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)  # may raise before anything is sent
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
        """Ends the process and waits for it."""
        self._connection.close()
        self._process.kill()  # a worker has no state to clean up
        self._process.join()


def _serve(requests: connection.Connection, initialize: Callable[[], None]) -> None:
    """Runs the loop of a worker process, which answers each request with (True, result) or (False, error)."""
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
    """Initializes a worker process."""
    silence_pillow()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is sent to all processes; the main process ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def silence_pillow() -> None:
    """Ignores warnings of Pillow, because unusable images are reported as rejects."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _end_with_parent() -> None:
    """Ends this process when its parent ends, even while it processes an item."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def run_ahead(items: Iterable[T], count: int) -> Generator[T, None, None]:
    """Yields items that a background thread prefetches from `items`, at most `count` in advance.

    An exception of `items` is raised after the items before it. Closing the generator ends the thread and closes
    `items`, so that closing the last stage of a chain closes all stages.
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
