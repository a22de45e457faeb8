"""Reads your own images: a folder of image files, each with its caption in a text file beside it.

    folder:PHOTOS               photos/cat.jpg with photos/cat.txt, including all sub-folders
    folder:PHOTOS,split=test    sets the name of the split; default: train

The contents of the text file are one caption, without surrounding whitespace. An empty file is an empty caption. Images
without a text file and text files without an image are rejected. Other files and hidden files are ignored.
"""

import os
from pathlib import Path
from typing import overload

from micro_dit.data.sources import (
    NO_CAPTION,
    NO_IMAGE,
    NOT_UTF8,
    Item,
    Part,
    Reject,
    check_split,
    escape,
    existing_path,
    is_image_name,
    make_item,
    slices,
)
from micro_dit.data.sources.image_files import read_file
from micro_dit.errors import UserError


class Folder:
    """A folder of images with `.txt` files; see `micro_dit.data.sources.Source`. Ids are relative paths."""

    name = "folder"

    def __init__(self, path: str, *, split: str = "train"):
        """Checks that the folder exists without reading it; raises UserError otherwise."""
        self.folder = existing_path(path, "folder of images")
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder} is not a folder. Set --source=folder:PATH to a folder of images with .txt files."
            )
        self.splits: tuple[str, ...] = (split,)
        self.attribution = f"your own data: {self.folder}"

    def parts(self, split: str) -> list[Part]:
        """Lists the folder and returns slices of its files, sorted by path."""
        check_split(self, split)
        names = relative_files(self.folder)
        images = [name for name in names if is_image_name(name)]
        if not images:
            raise UserError(
                f"There are no images in {self.folder} and its sub-folders. Correct the path in --source=folder:PATH."
            )
        stems = {name.rpartition(".")[0] for name in images}
        unmatched = [name for name in names if name.endswith(".txt") and name.removesuffix(".txt") not in stems]
        return [*slices(_CaptionedFiles(self.folder, sorted(images + unmatched)))]


class _CaptionedFiles:
    """Images with their text files, and text files without an image, read on demand."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "_CaptionedFiles": ...
    def __getitem__(self, index: int | slice) -> "Item | _CaptionedFiles":
        if isinstance(index, slice):
            return _CaptionedFiles(self.folder, self.names[index])
        name = self.names[index]
        if not is_image_name(name):
            return Reject(escape(name), NO_IMAGE)
        try:
            caption = (self.folder / name).with_suffix(".txt").read_bytes().decode("utf-8-sig").strip()
        except FileNotFoundError:
            return Reject(escape(name), NO_CAPTION)
        except UnicodeDecodeError:
            return Reject(escape(name), NOT_UTF8)
        image = read_file(self.folder, name)
        return Reject(escape(name), image) if isinstance(image, str) else make_item(name, image, caption)


def relative_files(folder: Path) -> list[str]:
    """Returns the relative paths of all files in a folder and its sub-folders, except hidden files and folders."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in files if not name.startswith(".")]
    return found
