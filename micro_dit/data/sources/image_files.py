"""Reads images of a folder or a zip file by rows of (id, file, captions). Used by several sources."""

import functools
import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, overload

from micro_dit.data.sources import MISSING_FILE, UNREADABLE_FILE, Item, Reject, escape, make_item
from micro_dit.errors import UserError


class Row(NamedTuple):
    """One image of a listing."""

    id: str
    file: str  # path relative to the root; may be absolute if the root is a folder
    captions: object  # a string or a list of strings


class ImageFiles:
    """Images in a folder or a zip file, read on demand; see `micro_dit.data.sources.Items`."""

    def __init__(self, root: Path, rows: list[Row]):
        self.root, self.rows = root, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageFiles": ...
    def __getitem__(self, index: int | slice) -> "Item | ImageFiles":
        if isinstance(index, slice):
            return ImageFiles(self.root, self.rows[index])
        row = self.rows[index]
        image = read_file(self.root, row.file)
        return Reject(escape(row.id), image) if isinstance(image, str) else make_item(row.id, image, row.captions)


def read_file(root: Path, file: str) -> bytes | str:
    """Returns the contents of a file in a folder or a zip file, or the reason (a string) if it cannot be read."""
    try:
        if root.suffix == ".zip":
            return open_zip(root).read(file)
        return (root / file).read_bytes()
    except (FileNotFoundError, NotADirectoryError, KeyError):
        return MISSING_FILE
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        # A name with a NUL byte, a folder, a disk error, or a member that is damaged, encrypted or cannot be unpacked.
        return UNREADABLE_FILE


def open_zip(path: Path) -> zipfile.ZipFile:
    """Returns an open zip file. It is cached because reading its directory can take longer than reading an image."""
    # The process id is part of the key, because a forked process shares the file position with its parent.
    return _open_zip(path, os.getpid())


@functools.lru_cache(maxsize=2)
def _open_zip(path: Path, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def find_images(folder: Path, name: str, archive: str) -> tuple[Path, str]:
    """Finds images in `folder/name`, or else in the zip file `folder/archive`, which may contain a folder `name`.

    Returns:
        The root for `ImageFiles`, and a prefix for the names of the images.

    Raises:
        UserError: Neither exists, or the zip file is damaged.
    """
    if (folder / name).is_dir():
        return folder / name, ""
    try:
        names = open_zip(folder / archive).namelist()
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has neither {name}/ nor {archive}. Download the images, or correct the folder in --source."
        ) from error
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{folder / archive} is damaged ({error}). Download it again.") from error
    return folder / archive, f"{name}/" if any(member.startswith(f"{name}/") for member in names) else ""
