"""Rows of (id, image file, captions) whose images lie in a folder or in a zip: what most listings come down to."""

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
    file: str  # path within the root; absolute paths stand for themselves if the root is a folder
    captions: object  # a string or a sequence of strings


class ImageFiles:
    """The images of rows in a folder or a zip, read one by one, on demand; see `micro_dit.data.sources.Items`."""

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
    """Reads a file of a folder or a zip; returns the reason (a str) if it cannot be read."""
    try:
        if root.suffix == ".zip":
            return open_zip(root).read(file)
        return (root / file).read_bytes()
    except (FileNotFoundError, NotADirectoryError, KeyError):
        return MISSING_FILE
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        # A name with a NUL, a folder, a failing disk; a member that is damaged, encrypted or of an unknown compression.
        return UNREADABLE_FILE


def open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip, or returns the one that is open: reading its table of contents can take longer than an image."""
    # By process, because a forked process would move the file position of its parent.
    return _open_zip(path, os.getpid())


@functools.lru_cache(maxsize=2)
def _open_zip(path: Path, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def find_images(folder: Path, name: str, archive: str) -> tuple[Path, str]:
    """Finds images in `folder/name`, or else in the zip `folder/archive`, perhaps in a folder `name` there.

    Returns:
        The root for `ImageFiles`, and what to put before the names of the images.

    Raises:
        UserError: There is neither, or the zip is damaged.
    """
    if (folder / name).is_dir():
        return folder / name, ""
    try:
        names = open_zip(folder / archive).namelist()
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds neither {name}/ nor {archive}: download the images.") from error
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{folder / archive} is damaged ({error}): download it again.") from error
    return folder / archive, f"{name}/" if any(member.startswith(f"{name}/") for member in names) else ""
