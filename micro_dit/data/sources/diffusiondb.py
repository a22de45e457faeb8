"""DiffusionDB: pictures made by Stable Diffusion, with the prompt that made each.

    diffusiondb:FOLDER                                      prompts from the part-000001.json in each archive
    diffusiondb:FOLDER,metadata=FOLDER/metadata.parquet     prompts from the table that comes with the data set
    diffusiondb:FOLDER,metadata=...,index=FILE              where to keep the index of that table, if not beside it

The folder holds, at any depth, the archives part-000001.zip, ... or the folders part-000001/, ... that come out of
them. Each is a part.
"""

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from micro_dit.data.sources import DAMAGED, NOT_JSON, Item, Part, Reject, check_split, existing_path, is_image_name
from micro_dit.data.sources.caption_index import CaptionIndex
from micro_dit.data.sources.image_files import ImageFiles, Row, open_zip, read_file
from micro_dit.data.sources.tables import read_rows
from micro_dit.errors import UserError


class DiffusionDB:
    """DiffusionDB (2M or Large); see `micro_dit.data.sources.Source`. Ids are 'part-000001/FILE'."""

    name = "diffusiondb"
    attribution = "DiffusionDB (https://poloclub.github.io/diffusiondb), CC0 1.0"
    splits: tuple[str, ...] = ("train",)

    def __init__(self, path: str, *, metadata: str = "", index: str = ""):
        """Lists the archives; opens none.

        Raises:
            UserError: There are no archives, or the metadata are not there.
        """
        folder = existing_path(path, "folder of DiffusionDB")
        found = [file for file in sorted(folder.rglob("part-*")) if file.suffix == ".zip" or file.is_dir()]
        self.archives = {file.stem: file for file in found}  # unpacked and packed in one place: one of them
        if not self.archives:
            raise UserError(f"There are no part-000001.zip, ... in {folder}: correct the folder.")
        self.metadata = existing_path(metadata, "metadata.parquet") if metadata else None
        self.index = CaptionIndex.beside(self.metadata, index) if self.metadata else None

    def parts(self, split: str) -> list[Part]:
        """Returns a part for each archive, and makes the index of the metadata if it is asked for and not there."""
        check_split(self, split)
        if (metadata := self.metadata) and self.index:
            self.index.ensure([metadata], "prompt", lambda: read_metadata(metadata))
        return [DiffusionDBPart(name, path, self.index) for name, path in sorted(self.archives.items())]


class DiffusionDBPart:
    """The images of an archive or a folder, sorted by name, with those that have a prompt but are not there."""

    def __init__(self, name: str, path: Path, index: CaptionIndex | None):
        self.name, self.path, self.index = name, path, index

    def __len__(self) -> int:
        images, rejects = self._list()
        return len(images) + len(rejects)

    def __iter__(self) -> Iterator[Item]:
        images, rejects = self._list()
        yield from (images[number] for number in range(len(images)))
        yield from rejects

    def __getitem__(self, number: int) -> Item:
        images, rejects = self._list()
        number = range(len(images) + len(rejects))[number]
        return images[number] if number < len(images) else rejects[number - len(images)]

    def _list(self) -> tuple[ImageFiles, list[Reject]]:
        try:
            names = os.listdir(self.path) if self.path.is_dir() else open_zip(self.path).namelist()
        except zipfile.BadZipFile:
            return ImageFiles(self.path, []), [Reject(self.name, DAMAGED)]
        rejects = []
        if self.index:
            keys = self.index.keys(f"{self.name}/")
            captions: dict[str, Any] = {key.partition("/")[2]: self.index.captions(key) for key in keys}
        else:
            try:
                captions = read_prompts(self.path, f"{self.name}.json")
            except ValueError:
                captions = {}
                rejects.append(Reject(self.name, NOT_JSON))
        files = sorted({*captions, *filter(is_image_name, names)})
        return ImageFiles(self.path, [Row(f"{self.name}/{file}", file, captions.get(file)) for file in files]), rejects


def read_prompts(path: Path, file: str) -> dict[str, Any]:
    """Prompts by image, of the JSON file in an archive or a folder; ValueError if it is damaged or not there."""
    content = read_file(path, file)
    if isinstance(content, str):
        raise ValueError(content)
    entries = json.loads(content.decode("utf-8-sig", "surrogateescape"))
    if not isinstance(entries, dict):
        raise ValueError("not an object")
    return {name: entry.get("p") if isinstance(entry, dict) else None for name, entry in entries.items()}


def read_metadata(file: Path) -> Iterator[tuple[str, str]]:
    """Yields ('part-000001/FILE', prompt) of the metadata."""
    for row in read_rows(file, ("image_name", "part_id", "prompt")):
        if isinstance(row["prompt"], str):
            yield f"part-{int(row['part_id']):06d}/{row['image_name']}", row["prompt"]
