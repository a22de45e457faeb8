"""Your own images: a folder of image files, each with its caption in a text file beside it.

    folder:PHOTOS               photos/cat.jpg with photos/cat.txt, and so on in all folders below
    folder:PHOTOS,split=test    the split gets another name than 'train'

The whole text file is one caption, without the blanks around it. An empty file is an empty caption; an image without
a text file is rejected, and so is a text file without an image. Files of other kinds and hidden files are ignored.
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
    """A folder of images with `.txt` files; see `micro_dit.data.sources.Source`. Ids are paths within the folder."""

    name = "folder"

    def __init__(self, path: str, *, split: str = "train"):
        """Raises UserError if there is no such folder; reads nothing."""
        self.folder = existing_path(path, "folder of images")
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder: 'folder:' takes a folder of images with .txt files.")
        self.splits: tuple[str, ...] = (split,)
        self.attribution = f"your own data: {self.folder}"

    def parts(self, split: str) -> list[Part]:
        """Lists the folder, in the order of the paths."""
        check_split(self, split)
        names = relative_files(self.folder)
        images = [name for name in names if is_image_name(name)]
        if not images:
            raise UserError(f"There are no images in {self.folder} or below: correct the path.")
        stems = {name.rpartition(".")[0] for name in images}
        alone = [name for name in names if name.endswith(".txt") and name.removesuffix(".txt") not in stems]
        return [*slices(_CaptionedFiles(self.folder, sorted(images + alone)))]


class _CaptionedFiles:
    """Images with the text beside them (and texts without an image), read on demand."""

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
    """Paths of all files in a folder and below, relative to it; hidden files and folders are left out."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in files if not name.startswith(".")]
    return found
