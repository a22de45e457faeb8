"""Defines the interface of data sources of captioned images, and opens them by name.

A source has splits, a split has parts, and a part yields examples and rejects in a fixed order:

    source.parts("train") → [Part, Part, ...]        a part is an archive, or a slice of a listing
    for item in part: → Example | Reject             missing or damaged items are never skipped silently

Parts are cheap to create, have only picklable attributes (they are sent to worker processes), and open files only when
they are iterated, indexed or counted.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

from micro_dit.errors import UserError

SLICE_SIZE = 4096  # examples in a part of a source that has no archives
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")

# Reasons for rejects. They contain no ids or numbers, because rejects are counted by reason.
NO_CAPTION = "no caption"
NO_IMAGE = "caption without an image"
NOT_UTF8 = "caption is not valid UTF-8"
NOT_JSON = "caption record is not valid JSON"
MISSING_FILE = "image file is missing"
UNREADABLE_FILE = "image file cannot be read"
REPEATED = "id occurs twice in the archive"
DAMAGED = "archive is truncated or damaged"


class Example(NamedTuple):
    """One captioned image; all strings are valid Unicode."""

    id: str  # unique within the split, and the same in every run and on every machine
    image: bytes  # contents of an image file (PNG, JPEG, ...), not validated
    captions: tuple[str, ...]  # one or more captions, which may be empty strings


class Reject(NamedTuple):
    """An item or a damaged archive that cannot be used; the reason is one of the constants above."""

    id: str
    reason: str


Item = Example | Reject


class Part(Protocol):
    """A piece of a split that is read independently, in a fixed order.

    Parts of listings and of archives with random access also support indexing: `part[3]` is the fourth item.
    """

    name: str  # unique within the split and stable: the name of the archive without its suffix, or 'slice-00003'

    def __len__(self) -> int:
        """Returns the number of items including rejects; an estimate for compressed archives."""
        ...

    def __iter__(self) -> Iterator[Item]: ...


class Source(Protocol):
    """A data set of captioned images with named splits."""

    name: str  # key in `SOURCES`
    attribution: str  # one line with the credit and the license of the data
    splits: tuple[str, ...]

    def parts(self, split: str) -> Sequence[Part]:
        """Returns the parts of a split, always in the same order.

        Raises:
            UserError: The split does not exist, or a listing cannot be read.
        """
        ...


class Items(Protocol):
    """A sequence of items that are read when they are indexed; the basis of `Slice`."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Items": ...


class Slice:
    """A part that is a range of a sequence. Pickling it includes only this range."""

    def __init__(self, name: str, items: Items, start: int, stop: int):
        self.name, self.items, self.start, self.stop = name, items, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Item:
        return self.items[range(self.start, self.stop)[index]]

    def __iter__(self) -> Iterator[Item]:
        return (self.items[index] for index in range(self.start, self.stop))

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "items": self.items[self.start : self.stop], "start": 0, "stop": len(self)}


def slices(items: Items, size: int = SLICE_SIZE) -> list[Slice]:
    """Divides a sequence into parts of up to `size` items, named 'slice-00000', 'slice-00001', ..."""
    starts = range(0, len(items), size)
    return [Slice(f"slice-{n:05d}", items, start, min(start + size, len(items))) for n, start in enumerate(starts)]


def make_item(id: str, image: bytes, captions: object) -> Item:
    """Returns an example, or a reject if the captions are missing or not valid Unicode.

    Args:
        id: Id of the item.
        image: Contents of the image file.
        captions: A string or a list of strings; values of other types count as missing captions.
    """
    texts = [captions] if isinstance(captions, str) else captions if isinstance(captions, list | tuple) else []
    texts = [text for text in texts if isinstance(text, str)]
    if not texts:
        return Reject(escape(id), NO_CAPTION)
    if any(escape(text) != text for text in texts):
        return Reject(escape(id), NOT_UTF8)
    return Example(escape(id), image, tuple(dict.fromkeys(texts)))  # without duplicates


def escape(text: str) -> str:
    """Replaces lone surrogates, which cannot be encoded as UTF-8, with backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_image_name(name: str) -> bool:
    """Returns whether a file name has the suffix of an image."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def existing_path(path: str, what: str) -> Path:
    """Returns the path of an existing file or folder; `what` describes it in the error.

    Raises:
        UserError: The path does not exist.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"There is no {what} at {found}. Correct the path in --source.")
    return found


def check_split(source: Source, split: str) -> None:
    """Raises UserError if the source does not have the split."""
    if split not in source.splits:
        raise UserError(f"The source {source.name} has no split '{split}'. Its splits are {', '.join(source.splits)}.")


def parse_argument(spec: str, argument: str, options: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Parses 'path,key=value,...' into the path, which may contain commas, and the options.

    Args:
        spec: The whole value of --source, for error messages.
        argument: The part of `spec` after the colon.
        options: Names of the valid options.

    Raises:
        UserError: The path is missing, or an option is unknown.
    """
    path, *pairs = re.split(r",(?=\w+=)", argument)
    values = dict(pair.split("=", 1) for pair in pairs)
    known = ", ".join(f"{option}=..." for option in options)
    if not path:
        raise UserError(f"--source={spec} has no path. Write the path after the colon. Options: {known or 'none'}.")
    for key in values:
        if key not in options:
            raise UserError(f"--source={spec} has the unknown option '{key}'. Valid options: {known or 'none'}.")
    return path, values


def _open_openmoji(spec: str, argument: str, px: int) -> Source:
    from micro_dit.data.sources.openmoji import OpenMoji

    return OpenMoji(groups=tuple(argument.split(",")) if argument else None, px=px)


def _opener(module: str, name: str) -> Callable[[str, str, int], Source]:
    """Returns a function that opens a source class; its options are the keyword-only arguments of the constructor."""

    def open_by_path(spec: str, argument: str, px: int) -> Source:
        source = getattr(importlib.import_module(f"micro_dit.data.sources.{module}"), name)
        parameters = inspect.signature(source).parameters.values()
        path, options = parse_argument(spec, argument, [p.name for p in parameters if p.kind is p.KEYWORD_ONLY])
        return source(path, **options)

    return open_by_path


SOURCES = {
    "openmoji": _open_openmoji,
    "webdataset": _opener("webdataset", "WebDataset"),
    "sa1b": _opener("sa1b", "SA1B"),
    "textcaps": _opener("textcaps", "TextCaps"),
    "journeydb": _opener("journeydb", "JourneyDB"),
    "diffusiondb": _opener("diffusiondb", "DiffusionDB"),
    "coco": _opener("coco", "COCO"),
    "hf": _opener("hf", "HuggingFace"),
    "folder": _opener("folder", "Folder"),
    "listing": _opener("listing", "Listing"),
}


def open_source(spec: str, px: int) -> Source:
    """Opens a source by name.

    Args:
        spec: `name` or `name:argument`. The argument of OpenMoji is a list of groups and subgroups
            (`openmoji:smileys-emotion,animal-bird`); all other sources have a path and options (`folder:photos`,
            `listing:photos.csv,caption=title`).
        px: Side in pixels at which vector images are rasterized; raster images keep their sizes.

    Raises:
        UserError: The name is unknown, or the argument is invalid.
    """
    name, _, argument = spec.partition(":")
    if name not in SOURCES:
        raise UserError(f"Unknown data source '{name}' in --source={spec}. Known sources are {', '.join(SOURCES)}.")
    return SOURCES[name](spec, argument, px)
