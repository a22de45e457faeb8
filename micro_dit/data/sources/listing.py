"""Reads your own images from a CSV, TSV, JSON, JSONL or Parquet file of (path, caption).

    listing:photos.csv                            columns 'path' and 'caption'
    listing:photos.parquet,path=file,caption=alt  other names of the columns
    listing:held_out.jsonl,split=validation       sets the name of the split; default: train

Paths are relative to the folder of the listing, and may point outside of it. In JSON and Parquet a caption may be a
list of captions. In all formats, rows with the same path are several captions of one image. The listing is kept in
memory and needs a few hundred bytes per row.
"""

from typing import Any

from micro_dit.data.sources import Part, check_split, existing_path, slices
from micro_dit.data.sources.image_files import ImageFiles, Row
from micro_dit.data.sources.tables import pick_column, read_rows
from micro_dit.errors import UserError

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Listing:
    """A table of image files; see `micro_dit.data.sources.Source`. Ids are the paths as written in the table."""

    name = "listing"

    def __init__(self, file: str, /, *, path: str = "path", caption: str = "caption", split: str = "train"):
        """Checks the path without reading the file; raises UserError if it is missing or has an unknown suffix."""
        self.file = existing_path(file, "listing")
        if self.file.suffix not in SUFFIXES:
            raise UserError(f"{self.file} is not a supported listing. Supported formats are {', '.join(SUFFIXES)}.")
        self.path, self.caption = path, caption
        self.splits: tuple[str, ...] = (split,)
        self.attribution = f"your own data: {self.file}"

    def parts(self, split: str) -> list[Part]:
        """Reads the listing, but not its images, and returns slices of it.

        Raises:
            UserError: A column is missing, or the file is damaged or empty.
        """
        check_split(self, split)
        captions: dict[str, list[Any]] = {}
        for number, row in enumerate(read_rows(self.file, (self.path, self.caption)), 1):
            if number == 1:
                pick_column(self.file, row, [self.path])
                pick_column(self.file, row, [self.caption])
            path, caption = row.get(self.path), row.get(self.caption)
            if not isinstance(path, str) or not path:
                path = f"row {number} without a path"  # becomes a reject for a missing file
            captions.setdefault(path, []).extend(caption if isinstance(caption, list) else [caption])
        if not captions:
            raise UserError(f"{self.file} has no rows. Add rows with a path and a caption.")
        return [*slices(ImageFiles(self.file.parent, [Row(path, path, texts) for path, texts in captions.items()]))]
