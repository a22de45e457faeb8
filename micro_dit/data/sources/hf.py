"""Reads data sets with the Hugging Face library `datasets`, from a `save_to_disk` folder or from the hub.

    hf:FOLDER                                          columns 'image' and 'text', split 'train'
    hf:owner/name,image=jpg,caption=txt,split=test     other names of columns and split

Images are not decoded: the stored bytes are used unchanged. A caption may be a list of captions. Ids are row numbers.
"""

import importlib.util
from pathlib import Path
from typing import Any, overload

from micro_dit.data.sources import MISSING_FILE, NOT_UTF8, Item, Part, Reject, check_split, make_item, slices
from micro_dit.data.sources.image_files import read_file
from micro_dit.errors import UserError


class HuggingFace:
    """One split of a Hugging Face data set; see `micro_dit.data.sources.Source`."""

    name = "hf"

    def __init__(self, path: str, *, image: str = "image", caption: str = "text", split: str = "train"):
        """Stores the arguments without opening the data set; raises UserError if `datasets` is not installed."""
        if importlib.util.find_spec("datasets") is None:
            raise UserError("Hugging Face data sets require the package datasets. Run pip install datasets.")
        self.path, self.image, self.caption = path, image, caption
        self.splits: tuple[str, ...] = (split,)
        self.attribution = f"Hugging Face data set {path}: see its card for the license"

    def parts(self, split: str) -> list[Part]:
        """Opens or downloads the data set, and returns slices of its rows.

        Raises:
            UserError: The data set cannot be found or read, or lacks the split or a column.
        """
        import datasets

        check_split(self, split)
        folder = Path(self.path).expanduser()
        try:
            if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
                data = datasets.load_from_disk(str(folder))
                if isinstance(data, datasets.DatasetDict):
                    if split not in data:
                        raise UserError(
                            f"{self.path} has no split '{split}'. Set the option split=... in --source to one of "
                            f"{', '.join(data)}."
                        )
                    data = data[split]
            else:
                data = datasets.load_dataset(self.path, split=split)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"Cannot open the data set '{self.path}' ({reason}). Correct the name in --source=hf:NAME."
            ) from error
        for column in (self.image, self.caption):
            if column not in data.column_names:
                columns = ", ".join(data.column_names)
                raise UserError(
                    f"{self.path} has no column '{column}'. Set the options image=... and caption=... in --source to "
                    f"two of {columns}."
                )
        data = data.select_columns([self.image, self.caption])
        if isinstance(data.features[self.image], datasets.Image):
            data = data.cast_column(self.image, datasets.Image(decode=False))
        return [*slices(_Rows(data, self.image, self.caption))]


class _Rows:
    """Rows of a data set, read on demand; `first` is the number of the first row in the whole data set."""

    def __init__(self, data: Any, image: str, caption: str, first: int = 0):
        self.data, self.image, self.caption, self.first = data, image, caption, first

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "_Rows": ...
    def __getitem__(self, index: int | slice) -> "Item | _Rows":
        if isinstance(index, slice):
            rows = range(*index.indices(len(self)))
            return _Rows(self.data.select(rows), self.image, self.caption, self.first + rows.start)
        id = f"{self.first + index:09d}"
        try:
            row = self.data[index]
        except UnicodeDecodeError:
            return Reject(id, NOT_UTF8)
        image = image_bytes(row[self.image])
        return Reject(id, image) if isinstance(image, str) else make_item(id, image, row[self.caption])


def image_bytes(value: object) -> bytes | str:
    """Returns the bytes of an image from {'bytes', 'path'}, bytes or a path; or the reason of a reject as a string."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return read_file(Path(), value)
    return value if isinstance(value, bytes) else MISSING_FILE
