"""Your own images: a CSV, TSV, JSON, JSONL or Parquet file of (path, caption).

    listing:photos.csv                            columns 'path' and 'caption'
    listing:photos.parquet,path=file,caption=alt  columns of other names
    listing:held_out.jsonl,split=validation       the split gets another name than 'train'

Paths are relative to the folder of the listing; those outside are fine. In JSON and Parquet a caption may be a list of
captions, and in any format several rows with one path are several captions of that image. The listing is held in
memory: a few hundred bytes a row.
"""

from typing import Any

from micro_dit.data.sources import Part, check_split, existing_path, slices
from micro_dit.data.sources.image_files import ImageFiles, Row
from micro_dit.data.sources.tables import pick_column, read_rows
from micro_dit.errors import UserError

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Listing:
    """A table of image files; see `micro_dit.data.sources.Source`. Ids are the paths as they are written."""

    name = "listing"

    def __init__(self, file: str, /, *, path: str = "path", caption: str = "caption", split: str = "train"):
        """Raises UserError if there is no such file, or it is of another kind; reads nothing."""
        self.file = existing_path(file, "listing")
        if self.file.suffix not in SUFFIXES:
            raise UserError(f"{self.file} is no listing that can be read: use one of {', '.join(SUFFIXES)}.")
        self.path, self.caption = path, caption
        self.splits: tuple[str, ...] = (split,)
        self.attribution = f"your own data: {self.file}"

    def parts(self, split: str) -> list[Part]:
        """Reads the listing; its images stay on disk.

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
                path = f"row {number} without a path"  # no such file: it is counted as missing under this id
            captions.setdefault(path, []).extend(caption if isinstance(caption, list) else [caption])
        if not captions:
            raise UserError(f"{self.file} has no rows: write a path and a caption in each.")
        return [*slices(ImageFiles(self.file.parent, [Row(path, path, texts) for path, texts in captions.items()]))]
