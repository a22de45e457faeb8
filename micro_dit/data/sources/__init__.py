"""Captioned images: what a source is, and the table of those that can be opened by name.

A source is cut into splits, a split into parts, and a part yields examples and rejects in a fixed order:

    source.parts("train") → [Part, Part, ...]        a part is an archive, or a slice of a listing
    for item in part: → Example | Reject             nothing that is missing or broken is skipped in silence

Parts are cheap to make, hold plain attributes only (they are sent to worker processes), and open files when they are
iterated, indexed or counted.
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

# Why a source rejects an item. Kept few, and free of ids and numbers: rejects are counted by reason.
NO_CAPTION = "no caption"
NO_IMAGE = "caption without an image"
NOT_UTF8 = "caption is not valid UTF-8"
NOT_JSON = "caption record is not valid JSON"
MISSING_FILE = "image file is missing"
UNREADABLE_FILE = "image file cannot be read"
REPEATED = "id occurs twice in the archive"
DAMAGED = "archive is truncated or damaged"


class Example(NamedTuple):
    """One captioned image; its texts are valid Unicode."""

    id: str  # unique within the split and stable between runs and machines
    image: bytes  # an encoded image file (PNG, JPEG, ...), not looked into
    captions: tuple[str, ...]  # one or more versions, perhaps empty


class Reject(NamedTuple):
    """An item, or a broken archive, that the source cannot yield as an example; the reason is one of those above."""

    id: str
    reason: str


Item = Example | Reject


class Part(Protocol):
    """A piece of a split that is read on its own, in a fixed order.

    Parts of listings and of archives with random access can be indexed as well: `part[3]` is the fourth item.
    """

    name: str  # unique within the split and stable: the archive's name without its ending, or 'slice-00003'

    def __len__(self) -> int:
        """Returns the number of items with rejects, estimated if a compressed archive would have to be read."""
        ...

    def __iter__(self) -> Iterator[Item]: ...


class Source(Protocol):
    """A data set of captioned images, cut into named splits."""

    name: str  # in `SOURCES`
    attribution: str  # one line: whose data it is, and under which license
    splits: tuple[str, ...]

    def parts(self, split: str) -> Sequence[Part]:
        """Returns the parts of a split, always in the same order.

        Raises:
            UserError: The split does not exist, or a listing cannot be read.
        """
        ...


class Items(Protocol):
    """A sequence of items, each read only when it is indexed; what `Slice` cuts."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Items": ...


class Slice:
    """A part that is a range of a sequence; it travels to another process without the rest of the sequence."""

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
    """Cuts a sequence into parts of `size` items, the last one shorter: 'slice-00000', 'slice-00001', ..."""
    starts = range(0, len(items), size)
    return [Slice(f"slice-{n:05d}", items, start, min(start + size, len(items))) for n, start in enumerate(starts)]


def make_item(id: str, image: bytes, captions: object) -> Item:
    """Makes an example of what was read, or a reject if its captions are missing or not valid Unicode.

    `captions` is a string or a sequence of strings as found in the data; anything else counts as no caption.
    """
    texts = [captions] if isinstance(captions, str) else captions if isinstance(captions, list | tuple) else []
    texts = [text for text in texts if isinstance(text, str)]
    if not texts:
        return Reject(escape(id), NO_CAPTION)
    if any(escape(text) != text for text in texts):
        return Reject(escape(id), NOT_UTF8)
    return Example(escape(id), image, tuple(dict.fromkeys(texts)))  # the same caption twice is one caption


def escape(text: str) -> str:
    """Replaces what cannot be written as UTF-8 (lone surrogates) by backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_image_name(name: str) -> bool:
    """Says whether a file name ends like an image's."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def existing_path(path: str, what: str) -> Path:
    """Returns the path of a file or folder that the user named.

    Raises:
        UserError: It is not there.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"There is no {what} at {found}: correct the path.")
    return found


def check_split(source: Source, split: str) -> None:
    """Raises a UserError if the source has no such split."""
    if split not in source.splits:
        raise UserError(f"The source {source.name} has no split '{split}'; known ones: {', '.join(source.splits)}.")


def parse_argument(spec: str, argument: str, options: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Splits 'path,key=value,...' into the path and the options; the path may hold commas. Errors name `spec`.

    Raises:
        UserError: The path is missing, or an option is unknown.
    """
    path, *pairs = re.split(r",(?=\w+=)", argument)
    values = dict(pair.split("=", 1) for pair in pairs)
    known = ", ".join(f"{option}=..." for option in options)
    if not path:
        raise UserError(f"The source '{spec}' needs a path after the colon (options, after a comma: {known}).")
    for key in values:
        if key not in options:
            raise UserError(f"The source '{spec}' has no option '{key}'; known ones: {known}.")
    return path, values


def _open_openmoji(spec: str, argument: str, px: int) -> Source:
    from micro_dit.data.sources.openmoji import OpenMoji

    return OpenMoji(groups=tuple(argument.split(",")) if argument else None, px=px)


def _opener(module: str, name: str) -> Callable[[str, str, int], Source]:
    """Opens a class by 'path,key=value,...'; its options are the keyword-only arguments of its constructor."""

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
        spec: `name`, or `name:argument`. OpenMoji takes groups and subgroups (`openmoji:smileys-emotion,animal-bird`),
            all others a path and options (`folder:photos`, `listing:photos.csv,caption=title`).
        px: Side in pixels at which vector images are drawn; sources of pixel images keep their own sizes.

    Raises:
        UserError: The name is not known, or the source refuses the argument.
    """
    name, _, argument = spec.partition(":")
    if name not in SOURCES:
        raise UserError(f"There is no data source '{name}' (asked for by '{spec}'); known ones: {', '.join(SOURCES)}.")
    return SOURCES[name](spec, argument, px)
