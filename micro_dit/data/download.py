"""Downloads files over HTTP, in parallel, through dropped connections and over several runs.

A file grows as `NAME.partial` and gets its name when its size, and its checksum where one is published, are right.
"""

import os
import random
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from tqdm import tqdm

from micro_dit.errors import UserError
from micro_dit.files import disk_errors, hash_file

if TYPE_CHECKING:
    import requests

OK, PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 200, 206, 416
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
CHUNK_BYTES = 1 << 18
TIMEOUT_SECONDS = (15, 60)  # to connect; between two chunks
ATTEMPTS = 8  # in a row that bring nothing
ATTEMPTS_TO_TELL_OF = 3  # a connection that drops now and then is nothing special
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the next attempt; doubles each time
FAILURES_NAMED = 5  # of those that are counted


class RemoteFile(NamedTuple):
    """A file to download; size and checksum where the publisher tells them."""

    name: str  # path below the output folder
    url: str
    size: int | None = None
    sha256: str | None = None
    headers: dict[str, str] = {}  # noqa: RUF012  (never changed)


class Dropped(Exception):
    """An attempt failed in a way that the next may not; `pause` is how long the server asks to be left alone, in s."""

    def __init__(self, message: str, pause: float = 0.0):
        super().__init__(message)
        self.pause = pause


class Unavailable(Exception):
    """A file that no further attempt would bring."""


def download_all(files: Sequence[RemoteFile], folder: Path, workers: int, terms: str) -> None:
    """Downloads files in parallel.

    Raises:
        UserError: Access is refused, which stops all; or, at the end, some files could not be downloaded.
    """
    stop = threading.Event()
    failures = []
    with DownloadProgress(files, folder) as progress, ThreadPoolExecutor(workers) as pool:
        downloads = {pool.submit(Download(file, folder, progress, stop, terms).run): file for file in files}
        try:
            for future in as_completed(downloads):
                try:
                    future.result()
                    progress.finish_file()
                except (Dropped, Unavailable) as error:
                    failures.append(f"{downloads[future].name} ({error})")
        finally:  # also after Ctrl-C: what is under way ends at its next chunk, and goes on from there next time
            stop.set()
            pool.shutdown(cancel_futures=True)
    if failures:
        named = ", ".join(failures[:FAILURES_NAMED]) + (", …" if len(failures) > FAILURES_NAMED else "")
        raise UserError(f"{len(failures)} of {len(files)} files could not be downloaded: {named}; run it again.")


class DownloadProgress:
    """One bar for all files; a file whose size is not known yet counts as much as those known do on average."""

    def __init__(self, files: Sequence[RemoteFile], folder: Path):
        here = sum(size_of(partial_path(folder / file.name)) for file in files)
        self._sizes = {file.name: file.size for file in files}
        self._finished = 0
        self.bar = tqdm(initial=here, unit="B", unit_scale=True, mininterval=1.0, disable=not files)
        self._estimate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def learn_size(self, name: str, size: int) -> None:
        """Takes note of the size of a file."""
        self._sizes[name] = size
        self._estimate()

    def finish_file(self) -> None:
        """Counts a file."""
        self._finished += 1
        self.bar.set_postfix_str(f"{self._finished} of {len(self._sizes)} files")

    def _estimate(self) -> None:
        known = [size for size in self._sizes.values() if size is not None]
        if known:
            self.bar.total = sum(known) * len(self._sizes) / len(known)


class Download:
    """One file on its way: `NAME.partial` holds what has come, `NAME.partial.etag` the version it is part of."""

    def __init__(self, file: RemoteFile, folder: Path, progress: DownloadProgress, stop: threading.Event, terms: str):
        self.file, self.progress, self.stop, self.terms = file, progress, stop, terms
        self.path = folder / file.name
        self.partial = partial_path(self.path)
        self.version = self.partial.with_name(self.partial.name + ".etag")

    def run(self) -> None:
        """Attempts it until the file is in place, or ATTEMPTS in a row brought nothing, which raises Dropped."""
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        fruitless = 0
        with new_session() as session:
            while not self.stop.is_set():
                before = size_of(self.partial)
                try:
                    return self.attempt(session)
                except Dropped as error:
                    fruitless = 0 if size_of(self.partial) > before else fruitless + 1
                    if fruitless == ATTEMPTS:
                        raise
                    if fruitless >= ATTEMPTS_TO_TELL_OF:
                        line = f"{self.file.name}: {error}; {ATTEMPTS - fruitless} attempts are left"
                        self.progress.bar.write(line, file=sys.stderr)
                    pause = FIRST_PAUSE * 2**fruitless * random.uniform(0.5, 1.0)  # not all workers at once
                    self.stop.wait(min(max(pause, error.pause), LONGEST_PAUSE))

    def attempt(self, session: "requests.Session") -> None:
        """Asks for what is missing, appends it, and puts the file in place if it is whole then."""
        from requests import RequestException

        try:
            size = self._receive(session)
        except RequestException as error:
            raise Dropped(first_line(error)) from error
        here = size_of(self.partial)
        if size is not None and here < size:
            raise Dropped(f"the connection was closed after {here} of {size} bytes")
        if size not in (None, here) or self.file.sha256 not in (None, hash_file(self.partial)):
            self._start_over()
            raise Dropped("size or checksum are not the published ones")
        self.partial.replace(self.path)
        self.version.unlink(missing_ok=True)

    def _receive(self, session: "requests.Session") -> int | None:
        """Appends what the server sends, and returns the size that the file should have then."""
        start = size_of(self.partial)
        headers = self.file.headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with session.get(self.file.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
            self._check_status(response)
            size, version = self._size_in(response), response.headers.get("ETag", "")
            if response.status_code == RANGE_NOT_SATISFIABLE and size == start:
                return size  # it was whole, but not yet in place
            known = self.version.read_text() if self.version.exists() else ""
            if response.status_code != OK and (response.status_code != PARTIAL_CONTENT or version != known):
                self._start_over()
                raise Dropped("another version is published by now")
            if response.status_code == OK:  # from the beginning, whatever was asked for
                self._start_over()
                self.version.write_text(version)
            with self.partial.open("ab") as output:
                for chunk in response.iter_content(CHUNK_BYTES):
                    with disk_errors(self.partial):  # of the disk alone: those of the network are OSErrors as well
                        output.write(chunk)
                    self.progress.bar.update(len(chunk))
                    if self.stop.is_set():
                        raise Dropped("it was interrupted")
                with disk_errors(self.partial):
                    output.flush()
                    os.fsync(output.fileno())
        return size

    def _check_status(self, response: "requests.Response") -> None:
        status = response.status_code
        if status in (401, 403):
            raise refused(self.terms)
        if status in TRY_AGAIN:
            pause = response.headers.get("Retry-After", "")
            raise Dropped(f"HTTP {status}", float(pause) if pause.isdigit() else 0.0)
        if status not in (OK, PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE):
            raise Unavailable(f"HTTP {status}")

    def _size_in(self, response: "requests.Response") -> int | None:
        """The file's whole size, as listed, or else as the answer says."""
        whole = response.status_code == OK
        told = response.headers.get("Content-Length" if whole else "Content-Range", "").rpartition("/")[2]
        size = self.file.size if self.file.size is not None else int(told) if told.isdigit() else None
        if size is not None:
            self.progress.learn_size(self.file.name, size)
        return size

    def _start_over(self) -> None:
        self.progress.bar.update(-size_of(self.partial))
        self.partial.unlink(missing_ok=True)
        self.version.unlink(missing_ok=True)


def new_session() -> "requests.Session":
    """Opens connections that last for several requests."""
    try:
        import requests
    except ImportError as error:
        raise UserError("Downloading needs the package requests: pip install requests.") from error
    return requests.Session()


def partial_path(path: Path) -> Path:
    """Where a file grows."""
    return path.with_name(path.name + ".partial")


def size_of(path: Path) -> int:
    """Size of a file in bytes; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Says whether a file is there: only whole files carry their name, so that another size means another version."""
    return path.is_file() and file.size in (None, path.stat().st_size)


def refused(terms: str) -> UserError:
    """What to do when a server says 401 or 403."""
    return UserError(
        f"Access is refused: accept the terms on {terms}, set HF_TOKEN if it is on the Hugging Face hub, or get a new "
        "list of links there if yours has expired, and run it again."
    )


def first_line(error: Exception) -> str:
    """A library's message, without the lines of advice below it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
