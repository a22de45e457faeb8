"""Tests the downloader with a local server that drops connections, ignores ranges and refuses access."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from micro_dit.data import download, fetch
from micro_dit.data.download import RemoteFile
from micro_dit.data.fetch import DATASETS, list_files, subset
from micro_dit.errors import UserError

ROOT = Path(__file__).parents[2]
CONTENT = random.Random(0).randbytes(300_000)


class Server:
    """Serves `files` by path; each request consumes one of `faults`: an HTTP status, or a way to alter the response."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = defaultdict(list)
        self.requests: list[tuple[str, Message]] = []
        self.delay = 0.0  # seconds before each 10 kB
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: Any) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((path, request.headers))
        fault = self.faults[path].pop(0) if self.faults[path] else None
        if isinstance(fault, int) or path not in self.files:
            request.send_response(fault or 404)
            request.send_header("Location", f"http://localhost:{self.http.server_port}{path}")
            request.send_header("Retry-After", "0")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content = self.files[path]
        asked = request.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and fault != "ignore range" else 0
        if start >= len(content) > 0:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
        else:
            request.send_response(206 if start else 200)
            if start:
                request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            request.send_header("Content-Length", str(len(content) - start))
        request.send_header("ETag", hashlib.sha256(content).hexdigest()[:8])
        request.end_headers()
        body = content[start:]
        if fault == "drop":
            body = body[: len(body) // 2]
            request.close_connection = True
        for position in range(0, len(body), 10_000):
            time.sleep(self.delay)
            with contextlib.suppress(ConnectionError):  # the client has disconnected
                request.wfile.write(body[position : position + 10_000])

    def ranges(self, path: str) -> list[str | None]:
        return [headers.get("Range") for asked, headers in self.requests if asked == path]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def write_links(server: Server, folder: Path, count: int) -> str:
    """Adds files to the server, and writes a list of links in the format of SA-1B."""
    lines = ["file_name\tcdn_link"]
    for index in range(count):
        server.files[f"/{index}.tar"] = CONTENT[index:]
        lines.append(f"{index}.tar\t{server.url}/{index}.tar?token=1")
    path = folder / "links.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def run(server: Server, tmp_path: Path, count: int = 1, **arguments: Any) -> Path:
    """Fetches `count` files that are listed in a file of links."""
    links = write_links(server, tmp_path, count)
    out = tmp_path / "out"
    fetch.fetch("sa1b", str(out), links=links, report=lambda line: None, **arguments)
    return out


def assert_whole(out: Path, count: int) -> None:
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        f"{index}.tar": CONTENT[index:] for index in range(count)
    }


def test_resumes_after_dropped_connections(server: Server, tmp_path: Path) -> None:
    server.faults["/0.tar"] = ["drop", 503, "drop", 429, "drop"]
    assert_whole(run(server, tmp_path, count=3), 3)
    asked = server.ranges("/0.tar")
    assert asked[:3] == [None, "bytes=150000-", "bytes=150000-"]  # the second response was 503
    assert asked[3] == asked[4] == "bytes=220000-"  # only complete chunks are written
    assert len(asked) == 6
    assert len(server.ranges("/1.tar")) == 1


def test_restarts_if_the_server_ignores_the_range(server: Server, tmp_path: Path) -> None:
    server.faults["/0.tar"] = ["drop", "ignore range"]
    assert_whole(run(server, tmp_path), 1)


def test_restarts_if_the_file_has_changed(server: Server, tmp_path: Path) -> None:
    server.faults["/0.tar"] = ["drop"]
    real = server.answer

    def answer(request: Any) -> None:
        real(request)
        server.files["/0.tar"] = CONTENT[::-1]

    server.answer = answer
    assert (run(server, tmp_path) / "0.tar").read_bytes() == CONTENT[::-1]


def test_complete_files_are_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    out = run(server, tmp_path, count=2)
    server.requests.clear()
    run(server, tmp_path, count=2)
    assert server.requests == []
    (out / "1.tar").rename(out / "1.tar.partial")  # killed after the last byte, but before the rename
    (out / "1.tar.partial.etag").write_text(hashlib.sha256(CONTENT[1:]).hexdigest()[:8])
    run(server, tmp_path, count=2)
    assert server.ranges("/1.tar") == [f"bytes={len(CONTENT) - 1}-"]
    assert_whole(out, 2)


def test_a_missing_file_does_not_stop_other_downloads(server: Server, tmp_path: Path) -> None:
    server.faults["/1.tar"] = [404]
    with pytest.raises(UserError, match=r"1 of 3 files could not be downloaded: 1\.tar \(HTTP 404\)"):
        run(server, tmp_path, count=3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.tar", "2.tar"]
    assert_whole(run(server, tmp_path, count=3), 3)


def test_refused_access_names_the_terms_of_use(server: Server, tmp_path: Path) -> None:
    server.faults["/0.tar"] = [403]
    with pytest.raises(UserError, match=r"Accept the terms at https://ai\.meta\.com/.* new list of links"):
        run(server, tmp_path, workers=1, count=30)
    assert len(server.requests) < 30  # the other downloads were canceled


def test_fails_after_repeated_server_errors(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.faults["/0.tar"] = [503] * download.ATTEMPTS
    with pytest.raises(UserError, match="HTTP 503"):
        run(server, tmp_path)
    assert len(server.requests) == download.ATTEMPTS
    assert "0.tar: HTTP 503; 5 attempts left" in capfd.readouterr().err


def test_unreachable_server_raises_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.001)
    (tmp_path / "links").write_text("a.tar\thttp://127.0.0.1:9/a.tar\n")
    with pytest.raises(UserError, match=r"1 of 1 files could not be downloaded: a\.tar"):
        fetch.fetch("sa1b", str(tmp_path / "out"), links=str(tmp_path / "links"), report=lambda line: None)


# ---- The Hugging Face Hub --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A small copy of the hub with the files of a repository. Its tars have checksums."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    repository = DATASETS["cc12m"].repository
    entries = []
    names = ["_info.json", "README.md", *(f"cc12m-train-{index:04d}.tar" for index in range(100))]
    for index, name in enumerate(names):
        content = CONTENT[index : index + 1000]
        server.files[f"/datasets/{repository}/resolve/main/{name}"] = content
        entry = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
        if name.endswith(".tar"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        entries.append(entry)
    server.files[f"/api/datasets/{repository}/tree/main"] = json.dumps(entries).encode()
    return server


def fetch_from_hub(hub: Server, out: Path, **arguments: Any) -> list[str]:
    return fetch.fetch("cc12m", str(out), endpoint=hub.url, report=lambda line: None, **arguments)


def test_downloads_a_fraction_of_a_repository(hub: Server, tmp_path: Path) -> None:
    names = fetch_from_hub(hub, tmp_path, fraction=0.05)
    assert names[0] == "_info.json"
    assert len(names) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, headers in hub.requests)
    hub.requests.clear()
    more = fetch_from_hub(hub, tmp_path, fraction=0.1)
    assert len(more) == 11
    assert set(names) < set(more)
    assert len(hub.requests) == 1 + 5  # the listing and the missing files


def test_token_is_sent_only_to_the_hub(hub: Server, tmp_path: Path) -> None:
    """The hub redirects downloads to other hosts, which must not receive the token."""
    path = f"/datasets/{DATASETS['cc12m'].repository}/resolve/main/_info.json"
    hub.faults[path] = [302]
    fetch_from_hub(hub, tmp_path, fraction=0.01)
    first, second = [headers for asked, headers in hub.requests if asked == path]
    assert first["Authorization"] == "Bearer hf_secret"
    assert second["Authorization"] is None
    assert (tmp_path / "_info.json").read_bytes() == hub.files[path]


def test_retries_if_the_checksum_differs(hub: Server, tmp_path: Path) -> None:
    path = f"/datasets/{DATASETS['cc12m'].repository}/resolve/main/cc12m-train-0007.tar"
    right = hub.files[path]
    hub.files[path] = bytes(1000)
    real = hub.answer

    def answer(request: Any) -> None:
        real(request)
        if request.path == path:
            hub.files[path] = right

    hub.answer = answer
    fetch_from_hub(hub, tmp_path)
    assert (tmp_path / "cc12m-train-0007.tar").read_bytes() == right
    assert hub.ranges(path) == [None, None]


def test_gated_repository_names_the_terms_of_use(hub: Server, tmp_path: Path) -> None:
    hub.faults[f"/datasets/{DATASETS['cc12m'].repository}/resolve/main/_info.json"] = [403]
    with pytest.raises(UserError, match=r"Accept the terms at https://huggingface\.co/datasets/pixparse/cc12m-wds"):
        fetch_from_hub(hub, tmp_path, fraction=0.01)


def test_unlisted_repository_raises_a_user_error(hub: Server, tmp_path: Path) -> None:
    hub.faults[f"/api/datasets/{DATASETS['cc12m'].repository}/tree/main"] = [404]
    with pytest.raises(UserError, match=r"Cannot list pixparse/cc12m-wds"):
        fetch_from_hub(hub, tmp_path)


def test_unreachable_hub_raises_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub retries too
    with pytest.raises(UserError, match=r"Cannot list pixparse/cc12m-wds .*refused"):
        fetch.fetch("cc12m", str(tmp_path), endpoint="http://127.0.0.1:9")


def test_repository_without_the_expected_files_raises_a_user_error(hub: Server, tmp_path: Path) -> None:
    hub.files[f"/api/datasets/{DATASETS['cc12m'].repository}/tree/main"] = b"[]"
    with pytest.raises(UserError, match="The expected files are no longer published"):
        fetch_from_hub(hub, tmp_path)


# ---- Arguments -------------------------------------------------------------------------------------------------------


def test_subsets_are_nested_and_complete_at_fraction_one() -> None:
    files = [RemoteFile(f"{index}.tar", "") for index in range(1000)]
    sets = [{file.name for file in subset(files, fraction)} for fraction in (1e-6, 0.01, 0.1, 0.5, 1.0)]
    assert [len(names) for names in sets] == [1, 10, 100, 500, 1000]
    assert all(small < large for small, large in itertools.pairwise(sets))
    assert subset(files, 1.0) == files


def test_files_of_fixed_urls_have_unique_names() -> None:
    for dataset in DATASETS.values():
        if not dataset.repository and not dataset.linked:
            names = [file.name for file in list_files(dataset, 0.01, None, None)]
            assert len(names) == len(dataset.needed) == len(set(names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("../a.tar\thttp://h/a", r"unsafe path '\.\./a\.tar'"),
        ("/etc/passwd\thttp://h/a", "unsafe path '/etc/passwd'"),
        ("a.tar http://h/a", "does not consist of 'name TAB URL' lines"),
        ("", "does not consist of 'name TAB URL' lines"),
        ("name\turl\n", "does not consist of 'name TAB URL' lines"),
        ("photo.jpg\thttp://h/a", "The expected files are no longer published"),
    ],
)
def test_invalid_link_files_raise_a_user_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "links").write_text(text)
    with pytest.raises(UserError, match=message):
        fetch.fetch("sa1b", str(tmp_path / "out"), links=str(tmp_path / "links"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "laion"}, "Unknown data set 'laion'.*cc12m"),
        ({"fraction": 0.0}, "--fraction must be"),
        ({"fraction": 1.5}, "--fraction must be"),
        ({"workers": 0}, "--workers at least 1"),
        ({}, "requires --links=FILE.*ai.meta.com"),
        ({"links": "nowhere.txt"}, "Cannot read the list of links nowhere.txt"),
    ],
)
def test_invalid_arguments_raise_a_user_error(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch.fetch(**{"dataset": "sa1b", "out": str(tmp_path)} | arguments)


def test_unknown_sizes_are_estimated(tmp_path: Path) -> None:
    files = [RemoteFile("a", "", 100), RemoteFile("b", ""), RemoteFile("c", "", 300)]
    with download.DownloadProgress(files, tmp_path) as progress:
        assert progress.bar.total == 600
        progress.learn_size("b", 50)
        assert progress.bar.total == 450


def test_resumes_after_a_kill(server: Server, tmp_path: Path) -> None:
    server.files["/large.tar"] = CONTENT * 5
    server.delay = 0.05  # 0.2 MB/s leaves time for the kill, even on a busy machine
    (tmp_path / "links").write_text(f"large.tar\t{server.url}/large.tar\n")
    flags = ["--dataset=sa1b", f"--links={tmp_path / 'links'}", f"--out={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "micro_dit.data.fetch", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    partial = tmp_path / "out" / "large.tar.partial"
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    size = partial.stat().st_size
    assert 0 < size < len(CONTENT) * 5
    server.delay = 0.0
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert server.ranges("/large.tar") == [None, f"bytes={size}-"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["large.tar"]
    assert (tmp_path / "out" / "large.tar").read_bytes() == CONTENT * 5
