"""Tests that a killed and resumed precompute command writes the same bytes as an uninterrupted one."""

import io
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.pictures import encoded

ROOT = Path(__file__).parents[1]
PARTS, IMAGES = 24, 6
SECONDS_PER_BATCH = 0.04  # leaves time to kill the process


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes WebDataset tars with one damaged image each."""
    folder = tmp_path_factory.mktemp("archives")
    generator = np.random.default_rng(0)
    for part in range(PARTS):
        with tarfile.open(folder / f"{part:03}.tar", "w") as archive:
            for number in range(IMAGES):
                pixels = generator.integers(0, 256, (24, 20, 3), np.uint8)
                image = encoded(Image.fromarray(pixels)) if number != part % IMAGES else b"broken"
                for name, data in ((f"{part}-{number}.png", image), (f"{part}-{number}.txt", b"noise")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the contents of every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(archives: Path, out: Path, *more: str) -> subprocess.Popen:
    """Starts the command with stub encoders."""
    flags = [
        f"--source=webdataset:{archives}", f"--out={out}", f"--vae={SECONDS_PER_BATCH}", "--resolutions=16",
        "--batch_size=4", "--workers=1", "--posterior=sample",
    ]  # fmt: skip
    command = [sys.executable, "-m", "tests.helpers.stub_encoders", *flags, *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def descendants(pid: int) -> list[int]:
    """Returns the ids of all descendants of a process, or nothing on systems without /proc."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *descendants(child)]
    return found


def runs(pid: int) -> bool:
    """Returns whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parts_done(out: Path) -> int:
    return len(list((out / "parts").glob("*-*.json"))) if out.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Returns the output of an uninterrupted run."""
    out = tmp_path_factory.mktemp("undisturbed") / "shards"
    output = finish(start(archives, out))
    good = PARTS * (IMAGES - 1)
    assert f"train {good} of {PARTS * IMAGES} examples, {PARTS} dropped" in output
    return contents(out)


def test_resumes_bitwise_after_three_kills(archives: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out, chance, done = tmp_path / "shards", random.Random(), 0
    for _ in range(3):
        process = start(archives, out)
        deadline = time.monotonic() + 600
        while parts_done(out) < done + 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        workers = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "manifest.json").exists(), "killed too late"
        before, done = done, parts_done(out)
        assert before < done < PARTS
        deadline = time.monotonic() + 120
        while any(map(runs, workers)):
            assert time.monotonic() < deadline, "a worker process outlives its killed parent"
            time.sleep(0.05)
    output = finish(start(archives, out))
    assert f"resuming: {done} of {PARTS} parts are done" in output
    assert contents(out) == undisturbed


def test_two_concurrent_hosts_write_the_same_bytes(
    archives: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    hosts = [start(archives, out, f"--process_index={index}", "--process_count=2") for index in range(2)]
    outputs = [finish(host) for host in hosts]
    assert any("examples" in output for output in outputs)
    assert contents(out) == undisturbed
