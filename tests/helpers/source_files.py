"""What the tests of sources share: small images, archives, and a reader that checks what every source promises."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from micro_dit.data.sources import Example, Reject, open_source


def picture(color: str, format: str = "JPEG") -> bytes:
    """An image file of one color."""
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
    """Writes a zip, uncompressed as image archives are."""
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
    """Reads a split, and checks on the way what each source promises.

    Args:
        spec: As `open_source` takes it.
        split: The split.
        exact: The parts know their lengths.
    """
    parts, again = (open_source(str(spec), px=32).parts(split) for _ in range(2))
    assert [part.name for part in parts] == [part.name for part in again]
    assert len({part.name for part in parts}) == len(parts)
    items = []
    for part, same in zip(parts, again, strict=True):
        travelled = pickle.loads(pickle.dumps(same))
        content = list(part)
        assert content == list(part) == list(travelled)
        assert len(travelled) == len(part)
        if exact:
            assert len(part) == len(content)
        if hasattr(part, "__getitem__"):
            assert [part[number] for number in range(len(part))] == content
            assert [travelled[number] for number in range(len(part))] == content
        items += content
    examples = examples_of(items)
    assert len({example.id for example in examples}) == len(examples)
    for item in items:
        item.id.encode()  # as UTF-8
    for example in examples:
        assert example.captions
        assert isinstance(example.image, bytes)
        assert all(isinstance(caption, str) for caption in example.captions)
    return items


def examples_of(items: Iterable[Any]) -> list[Example]:
    return [item for item in items if isinstance(item, Example)]


def captions_of(items: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """Captions by id, of the examples."""
    return {item.id: item.captions for item in examples_of(items)}


def rejects_of(items: Iterable[Any]) -> dict[str, str]:
    """Reasons by id, of the rejects."""
    return {item.id: item.reason for item in items if isinstance(item, Reject)}
