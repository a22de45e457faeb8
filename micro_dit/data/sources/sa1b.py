"""Reads Segment Anything 1B: tars of images, joined with LLaVA captions (for example those of PixArt-α).

    sa1b:FOLDER,captions=FILE_OR_FOLDER           tars as in `webdataset:`, captions as described below
    sa1b:FOLDER,captions=...,caption=KEY,key=KEY  column names of captions and images; default: CAPTION_KEYS, IMAGE_KEYS
    sa1b:FOLDER,captions=...,index=FILE           path of the caption index; default: beside the captions

The captions are Parquet, JSONL or JSON rows of (image, caption), a JSON object {image: caption}, or one text file per
image, in tars or in a folder. Images are identified by number, file name or path: 123, sa_123.jpg or x/y/sa_123.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from micro_dit.data.sources import Part, check_split, existing_path
from micro_dit.data.sources.caption_index import CaptionIndex
from micro_dit.data.sources.folder import relative_files
from micro_dit.data.sources.tables import pick_column, read_rows
from micro_dit.data.sources.webdataset import TarPart, TarSample, find_tars, index_tar
from micro_dit.errors import UserError

CAPTION_KEYS = ("caption_syn_pixart_llava15", "txt", "caption", "text")  # the captions of PixArt-α have priority
IMAGE_KEYS = ("__key__", "key", "image_id", "id", "file_name", "filename", "image", "image_path", "img_path", "path")
CAPTION_FILES = (".parquet", ".jsonl", ".json", ".tar", ".txt")


class SA1B:
    """The SA-1B source; see `micro_dit.data.sources.Source`. Ids are 'TAR/sa_NUMBER'."""

    name = "sa1b"
    attribution = (
        "SA-1B (https://ai.meta.com/datasets/segment-anything), SA-1B Dataset Research License; "
        "captions: PixArt-alpha/SAM-LLaVA-Captions10M"
    )
    splits: tuple[str, ...] = ("train",)

    def __init__(self, path: str, *, captions: str = "", caption: str = "", key: str = "", index: str = ""):
        """Lists the archives without opening them; raises UserError if there are no tars or no captions."""
        if not captions:
            raise UserError("SA-1B does not include captions. Set --source=sa1b:TARS,captions=FILE_OR_FOLDER.")
        self.tars = find_tars(path)
        self.captions = existing_path(captions, "file or folder of captions")
        self.caption_keys = (caption,) if caption else CAPTION_KEYS
        self.image_keys = (key,) if key else IMAGE_KEYS
        self.index = CaptionIndex.beside(self.captions, index)

    def parts(self, split: str) -> list[Part]:
        """Returns one part per tar, after writing the caption index if it is missing.

        Raises:
            UserError: The captions cannot be read, or the index cannot be written.
        """
        check_split(self, split)
        files = find_caption_files(self.captions)
        columns = f"columns {' '.join(self.image_keys)} / {' '.join(self.caption_keys)}"
        self.index.ensure(files, columns, lambda: self._read_captions(files))
        return [JoinedTarPart(name, tar, self.index) for name, tar in self.tars.items()]

    def _read_captions(self, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
        for file in files:
            if file.suffix == ".txt":
                yield image_key(file.name), file.read_bytes().decode("utf-8", "surrogateescape").strip()
            elif file.suffix == ".tar":
                yield from read_text_tar(file)
            else:
                yield from self._read_table(file)

    def _read_table(self, file: Path) -> Iterator[tuple[str, str]]:
        names: tuple[str, str] | None = None
        for row in read_rows(file):
            # The columns are determined by the first row; a later row without them has no caption.
            names = names or (pick_column(file, row, self.image_keys), pick_column(file, row, self.caption_keys))
            key, captions = (row.get(name) for name in names)
            for caption in captions if isinstance(captions, list) else [captions]:
                if isinstance(key, str | int) and isinstance(caption, str):
                    yield image_key(key), caption


class JoinedTarPart(TarPart):
    """The images of a tar, with captions from an index."""

    def __init__(self, name: str, path: str, index: CaptionIndex):
        super().__init__(name, path)
        self.index = index

    def captions(self, tar: BinaryIO, sample: TarSample) -> object:
        """Returns the captions of an image from the index, without reading the other members such as masks."""
        return self.index.captions(image_key(sample.key))


def image_key(image: str | int) -> str:
    """Returns the index key, such as 'sa_123', of a number, file name or path of an image."""
    stem = str(image).rpartition("/")[2].partition(".")[0]
    return f"sa_{stem}" if stem.isdecimal() else stem


def find_caption_files(path: Path) -> list[Path]:
    """Returns the caption files of a folder, sorted, or the given file; raises UserError if there are none."""
    files = [path / name for name in sorted(relative_files(path))] if path.is_dir() else [path]
    files = [file for file in files if file.suffix in CAPTION_FILES]
    if not files:
        raise UserError(
            f"There are no captions at {path}. Set captions=... in --source to a file or folder with the formats "
            f"{', '.join(CAPTION_FILES)}."
        )
    return files


def read_text_tar(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (image, caption) from a tar with one text file per image; raises UserError if it is damaged."""
    samples, rejects = index_tar(os.fspath(file))
    if rejects:
        raise UserError(f"Cannot read the captions in {file}: {rejects[-1].reason}. Download the file again.")
    with open(file, "rb") as tar:
        for sample in samples:
            if "txt" in sample.members:
                text = sample.members["txt"].read(tar).decode("utf-8", "surrogateescape")
                yield image_key(sample.key), text.strip()
