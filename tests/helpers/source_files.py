"""Helpers for tests of data sources: small images, archives, and a reader that checks the contract of every source."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from micro_dit.data.sources import Example, Reject, open_source


def image_file(color: str, format: str = "JPEG") -> bytes:
    """Returns the contents of an image file of one color."""
    file = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(file, format)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], mode: Any = "w") -> None:
    """Writes a tar ('w') or a .tgz ('w:gz') with members in the given order; a list may repeat a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    """Writes an uncompressed zip file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files at paths relative to a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def read_source(spec: str | Path, split: str = "train", exact: bool = True) -> list[Example | Reject]:
    """Reads a split and checks that the source follows its contract.

    Args:
        spec: Argument of `open_source`.
        split: Name of the split.
        exact: Whether the lengths of the parts are exact.
    """
    parts, again = (open_source(str(spec), px=32).parts(split) for _ in range(2))
    assert [part.name for part in parts] == [part.name for part in again]
    assert len({part.name for part in parts}) == len(parts)
    items = []
    for part, same in zip(parts, again, strict=True):
        unpickled = pickle.loads(pickle.dumps(same))
        content = list(part)
        assert content == list(part) == list(unpickled)
        assert len(unpickled) == len(part)
        if exact:
            assert len(part) == len(content)
        if hasattr(part, "__getitem__"):
            assert [part[number] for number in range(len(part))] == content
            assert [unpickled[number] for number in range(len(part))] == content
        items += content
    examples = examples_of(items)
    assert len({example.id for example in examples}) == len(examples)
    for item in items:
        item.id.encode()  # raises an error for invalid Unicode
    for example in examples:
        assert example.captions
        assert isinstance(example.image, bytes)
        assert all(isinstance(caption, str) for caption in example.captions)
    return items


def examples_of(items: Iterable[Any]) -> list[Example]:
    return [item for item in items if isinstance(item, Example)]


def captions_of(items: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """Returns the captions of the examples by id."""
    return {item.id: item.captions for item in examples_of(items)}


def rejects_of(items: Iterable[Any]) -> dict[str, str]:
    """Returns the reasons of the rejects by id."""
    return {item.id: item.reason for item in items if isinstance(item, Reject)}
