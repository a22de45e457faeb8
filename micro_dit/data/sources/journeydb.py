"""JourneyDB: pictures made by Midjourney, with the prompt that made each and a caption that was written for it.

    journeydb:FOLDER                 the split's folder, or one that holds train/ (and valid/), or data/train/ ...
    journeydb:FOLDER,index=FOLDER    where to keep the index of captions, if not beside the annotations

A split's folder holds the annotations (train_anno_realease_repath.jsonl, unpacked) and, in imgs/ or beside them, the
archives 000.tgz, 001.tgz, ..., or the folders 000/, 001/, ... that come out of them. Each is a part; those that were
not downloaded are left out. Prompt and caption are two captions of an image. A .tgz is read from front to back.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from micro_dit.data.sources import (
    DAMAGED,
    MISSING_FILE,
    REPEATED,
    Item,
    Part,
    Reject,
    check_split,
    escape,
    existing_path,
    is_image_name,
    make_item,
)
from micro_dit.data.sources.caption_index import CaptionIndex
from micro_dit.data.sources.image_files import read_file
from micro_dit.data.sources.tables import read_rows
from micro_dit.errors import UserError

SPLITS = {"train": "train", "validation": "valid"}  # our names and JourneyDB's
ENDINGS = (".tgz", ".tar.gz", ".tar", "")


class JourneyDB:
    """JourneyDB; see `micro_dit.data.sources.Source`. Ids are '000/FILE'."""

    name = "journeydb"
    attribution = "JourneyDB (https://journeydb.github.io), for non-commercial use; images by Midjourney"

    def __init__(self, path: str, *, index: str = ""):
        """Looks for the annotations; raises UserError if there are none."""
        folder = existing_path(path, "folder of JourneyDB")
        self.index_folder = existing_path(index, "folder for the index") if index else None
        self.annotations: dict[str, Path] = {}
        for split, name in SPLITS.items():
            places = (folder, folder / name, folder / "data" / name)
            if found := [file for place in places for file in sorted(place.glob(f"{name}_anno*.jsonl"))]:
                self.annotations[split] = found[0]
        if not self.annotations:
            raise UserError(f"{folder} has no train_anno*.jsonl: correct the folder, or unpack train_anno*.jsonl.tgz.")
        self.splits: tuple[str, ...] = tuple(self.annotations)

    def parts(self, split: str) -> list[Part]:
        """Returns a part for each archive, and makes the index of captions if it is not there.

        Raises:
            UserError: There are no images, or the annotations cannot be read.
        """
        check_split(self, split)
        file = self.annotations[split]
        folder = file.parent / "imgs" if (file.parent / "imgs").is_dir() else file.parent
        numbers = sorted({name.partition(".")[0] for name in os.listdir(folder)})
        paths = [folder / f"{number}{ending}" for number in numbers if number.isdecimal() for ending in ENDINGS]
        archives: dict[str, Path] = {}
        for path in filter(Path.exists, paths):  # an archive that is unpacked as well is one part
            archives.setdefault(path.name.partition(".")[0], path)
        if not archives:
            raise UserError(f"There are no images in {folder}: it should hold 000.tgz, or a folder 000, and so on.")
        place = str(self.index_folder / f"{file.name}.index.sqlite") if self.index_folder else ""
        index = CaptionIndex.beside(file, place)
        index.ensure([file], "prompt and Task2", lambda: read_captions(file))
        return [JourneyPart(name, path, index) for name, path in archives.items()]


class JourneyPart:
    """The images of an archive or folder, in its order, then those that should be there but are not."""

    def __init__(self, name: str, path: Path, index: CaptionIndex):
        self.name, self.path, self.index = name, path, index

    def __len__(self) -> int:
        return len(self.index.keys(f"{self.name}/"))  # the annotated images: others are seen when they are read

    def __iter__(self) -> Iterator[Item]:
        seen = set()
        for file, image in read_folder(self.path) if self.path.is_dir() else read_archive(self.path):
            id = f"{self.name}/{file}" if file else self.name
            if isinstance(image, str) or file in seen:
                yield Reject(escape(id), image if isinstance(image, str) else REPEATED)
            else:
                yield make_item(id, image, self.index.captions(id))
            seen.add(file)
        for key in self.index.keys(f"{self.name}/"):
            if key.partition("/")[2] not in seen:
                yield Reject(key, MISSING_FILE)


def read_folder(folder: Path) -> Iterator[tuple[str, bytes | str]]:
    """Yields names and images of a folder, sorted; the reason (a str) for an image that cannot be read."""
    for name in sorted(filter(is_image_name, os.listdir(folder))):
        yield name, read_file(folder, name)


def read_archive(path: Path) -> Iterator[tuple[str, bytes | str]]:
    """Yields names and images of a tar, compressed or not, in its order; ('', reason) at the end if it is damaged."""
    try:
        # gzip itself notices a truncated file; tarfile's own decompression takes it for the end.
        with (
            open(path, "rb") if path.suffix == ".tar" else gzip.open(path) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            for info in tar:
                name = info.name.rpartition("/")[2]
                if is_image_name(name) and not name.startswith(".") and (member := tar.extractfile(info)):
                    yield name, member.read()
    except (tarfile.ReadError, gzip.BadGzipFile, EOFError, zlib.error):
        yield "", DAMAGED


def read_captions(file: Path) -> Iterator[tuple[str, str]]:
    """Yields ('000/FILE', caption) of the annotations: first the prompt, then the caption."""
    for number, row in enumerate(read_rows(file), 1):
        path, task = row.get("img_path"), row.get("Task2")
        if not isinstance(path, str) or path.count("/") < 1:
            raise UserError(f"Row {number} of {file} has no img_path such as './000/name.jpg': download it again.")
        for caption in (row.get("prompt"), task.get("Caption") if isinstance(task, dict) else None):
            if isinstance(caption, str) and caption.strip():
                yield "/".join(path.split("/")[-2:]), caption.strip()
