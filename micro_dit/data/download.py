"""Downloads files over HTTP in parallel, and resumes after dropped connections and interrupted runs.

A download is written to `NAME.partial` and renamed to `NAME` once its size and its checksum, if published, match.
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
TIMEOUT_SECONDS = (15, 60)  # connect timeout, read timeout
ATTEMPTS = 8  # consecutive attempts without progress before a download fails
ATTEMPTS_TO_REPORT = 3  # fewer failed attempts are not printed, since connections drop now and then
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the next attempt; doubles each time
FAILURES_NAMED = 5  # failed files named in the error message


class RemoteFile(NamedTuple):
    """A file to download, with its size in bytes and its checksum if they are published."""

    name: str  # path relative to the output folder
    url: str
    size: int | None = None
    sha256: str | None = None
    headers: dict[str, str] = {}  # noqa: RUF012  (never modified)


class Dropped(Exception):
    """A download attempt failed and can be retried; `pause` is the server's Retry-After in seconds."""

    def __init__(self, message: str, pause: float = 0.0):
        super().__init__(message)
        self.pause = pause


class Unavailable(Exception):
    """A file cannot be downloaded, and a retry would not help."""


def download_all(files: Sequence[RemoteFile], folder: Path, workers: int, terms: str) -> None:
    """Downloads files in parallel.

    Args:
        files: Files to download.
        folder: Output folder.
        workers: Number of files downloaded at once.
        terms: URL of the page with the terms of use, named in the error if access is refused.

    Raises:
        UserError: Access is refused, which stops all downloads; or some files could not be downloaded, which is
            reported after all others are finished.
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
        finally:  # also after Ctrl-C: running downloads stop after the current chunk and can be resumed
            stop.set()
            pool.shutdown(cancel_futures=True)
    if failures:
        named = ", ".join(failures[:FAILURES_NAMED]) + (", …" if len(failures) > FAILURES_NAMED else "")
        raise UserError(
            f"{len(failures)} of {len(files)} files could not be downloaded: {named}. Run the same command again to "
            "retry them."
        )


class DownloadProgress:
    """A progress bar for all files; a file of unknown size counts as the average of the known sizes."""

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
        """Records the size of a file in bytes."""
        self._sizes[name] = size
        self._estimate()

    def finish_file(self) -> None:
        """Counts one more finished file."""
        self._finished += 1
        self.bar.set_postfix_str(f"{self._finished} of {len(self._sizes)} files")

    def _estimate(self) -> None:
        known = [size for size in self._sizes.values() if size is not None]
        if known:
            self.bar.total = sum(known) * len(self._sizes) / len(known)


class Download:
    """The download of one file. `NAME.partial` holds the received bytes, `NAME.partial.etag` their ETag."""

    def __init__(self, file: RemoteFile, folder: Path, progress: DownloadProgress, stop: threading.Event, terms: str):
        self.file, self.progress, self.stop, self.terms = file, progress, stop, terms
        self.path = folder / file.name
        self.partial = partial_path(self.path)
        self.version = self.partial.with_name(self.partial.name + ".etag")

    def run(self) -> None:
        """Retries until the file is complete; raises Dropped after ATTEMPTS consecutive attempts without progress."""
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
                    if fruitless >= ATTEMPTS_TO_REPORT:
                        line = f"{self.file.name}: {error}; {ATTEMPTS - fruitless} attempts left"
                        self.progress.bar.write(line, file=sys.stderr)
                    pause = FIRST_PAUSE * 2**fruitless * random.uniform(0.5, 1.0)  # jitter between workers
                    self.stop.wait(min(max(pause, error.pause), LONGEST_PAUSE))

    def attempt(self, session: "requests.Session") -> None:
        """Requests the missing bytes, appends them, and renames the file if it is complete."""
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
            raise Dropped("size or checksum differs from the published one")
        self.partial.replace(self.path)
        self.version.unlink(missing_ok=True)

    def _receive(self, session: "requests.Session") -> int | None:
        """Appends the response body, and returns the expected size of the whole file if it is known."""
        start = size_of(self.partial)
        headers = self.file.headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with session.get(self.file.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
            self._check_status(response)
            size, version = self._size_in(response), response.headers.get("ETag", "")
            if response.status_code == RANGE_NOT_SATISFIABLE and size == start:
                return size  # the file was complete but not yet renamed
            known = self.version.read_text() if self.version.exists() else ""
            if response.status_code != OK and (response.status_code != PARTIAL_CONTENT or version != known):
                self._start_over()
                raise Dropped("the file on the server has changed")
            if response.status_code == OK:  # the whole file, even if a range was requested
                self._start_over()
                self.version.write_text(version)
            with self.partial.open("ab") as output:
                for chunk in response.iter_content(CHUNK_BYTES):
                    with disk_errors(self.partial):  # only around disk writes, as network errors are OSErrors too
                        output.write(chunk)
                    self.progress.bar.update(len(chunk))
                    if self.stop.is_set():
                        raise Dropped("the download was interrupted")
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
        """Returns the size of the whole file in bytes, from the listing or else from the response headers."""
        whole = response.status_code == OK
        length = response.headers.get("Content-Length" if whole else "Content-Range", "").rpartition("/")[2]
        size = self.file.size if self.file.size is not None else int(length) if length.isdigit() else None
        if size is not None:
            self.progress.learn_size(self.file.name, size)
        return size

    def _start_over(self) -> None:
        self.progress.bar.update(-size_of(self.partial))
        self.partial.unlink(missing_ok=True)
        self.version.unlink(missing_ok=True)


def new_session() -> "requests.Session":
    """Returns a session that reuses connections; raises UserError if the package requests is not installed."""
    try:
        import requests
    except ImportError as error:
        raise UserError("Downloads require the package requests. Run pip install requests.") from error
    return requests.Session()


def partial_path(path: Path) -> Path:
    """Returns the path of an incomplete download."""
    return path.with_name(path.name + ".partial")


def size_of(path: Path) -> int:
    """Returns the size of a file in bytes, or 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Returns whether a file has been downloaded. A different size means that another version is published."""
    return path.is_file() and file.size in (None, path.stat().st_size)


def refused(terms: str) -> UserError:
    """Returns the error for HTTP status 401 or 403."""
    return UserError(
        f"The server refused access. Accept the terms at {terms}. For the Hugging Face Hub, also set HF_TOKEN; if the "
        "list of links has expired, download a new list of links from that page and pass it as --links."
    )


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its type if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
