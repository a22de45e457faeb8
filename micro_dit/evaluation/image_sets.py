"""Sets of generated images: image i has the seed `seed` + i and the prompt of its number, whoever draws it and when.

So a set does not depend on batch sizes, devices or processes; it can be interrupted, gone on with, and made larger.
"""

import abc
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from micro_dit.data.images import UnusableImage, crop_image
from micro_dit.errors import UserError
from micro_dit.files import hash_text, write_atomically
from micro_dit.images import save_png

SETTINGS_FILE = "set.json"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

SampleImages = Callable[[Sequence[str], Sequence[int]], np.ndarray]  # prompts, seeds → (n, H, W, 3) uint8


class Images(abc.ABC):
    """Images that can be read again and again, in the order of their numbers.

    Attributes:
        prompts: what each shows; empty if nobody knows.
    """

    prompts: Sequence[str] = ()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def _read(self, numbers: slice) -> np.ndarray: ...

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yields all images, (size, H, W, 3) uint8 at once, and what is left at the end."""
        for start in range(0, len(self), size):
            yield self._read(slice(start, start + size))


class InMemory(Images):
    """Images in an array (n, H, W, 3) uint8."""

    def __init__(self, images: np.ndarray, prompts: Sequence[str] = ()):
        self._images, self.prompts = images, prompts

    def __len__(self) -> int:
        return len(self._images)

    def _read(self, numbers: slice) -> np.ndarray:
        return self._images[numbers]


class FromFiles(Images):
    """Image files, each cropped to a square in the middle."""

    def __init__(self, files: Sequence[Path], side: int | None = None, prompts: Sequence[str] = ()):
        """`side` is that of the crops in pixels; without one, images are read as they are."""
        self.files, self._side, self.prompts = list(files), side, prompts

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, numbers: slice) -> np.ndarray:
        return np.stack([self._decode(file) for file in self.files[numbers]])

    def _decode(self, file: Path) -> np.ndarray:
        try:
            if self._side is not None:
                return crop_image(file.read_bytes(), [self._side], 1)[0][self._side]
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except (UnusableImage, UnidentifiedImageError, OSError) as error:
            raise UserError(f"the image {file} can't be read ({error}); repair it or take it out.") from error


def image_folder(folder: str | Path, side: int, only: Iterable[str] | None = None) -> FromFiles:
    """The images of a folder and the folders in it, cropped to `side` pixels, sorted by name.

    With `only`, other file names are passed over, and all of these must be there.

    Raises:
        UserError: there is no such folder, there are no images in it, or some are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one of real images, or a statistics file (.npz).")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if only is not None:
        by_name = {file.name: file for file in files}
        wanted = list(only)
        if missing := [name for name in wanted if name not in by_name]:
            raise UserError(f"{folder} lacks {len(missing)} of {len(wanted)} images, such as {missing[0]}.")
        files = [by_name[name] for name in wanted]
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}).")
    return FromFiles(files, side)


# ---- Generated sets --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageSetSettings:
    """Everything that an image depends on, except for its number.

    Attributes:
        model, prompts_hash: Hashes of the weights and of the prompts' texts.
        params: 'ema' or 'raw'.
        guidance: Guidance scale.
        steps: Steps of Heun's sampler.
        seed: Seed of image 0.
        dtype: Dtype of the matrix products.
        prompts: What the prompts are called, such as 'held-out captions'.
        interval: Noise levels between which guidance is applied; None for all.
        path_drop: Whether guidance skips the backbone.
    """

    model: str
    params: str
    guidance: float
    steps: int
    seed: int
    dtype: str
    prompts: str
    prompts_hash: str
    interval: tuple[float, float] | None = None
    path_drop: bool = False

    @property
    def folder(self) -> str:
        """Name of the folder, which no other settings have."""
        default = {"interval": None, "path_drop": False}  # left out, so that older folders keep their names
        fields = {name: value for name, value in dataclasses.asdict(self).items() if default.get(name, ...) != value}
        text = json.dumps(fields, sort_keys=True)
        return f"images_{self.params}_guidance_{self.guidance:g}_{hash_text(text)[:8]}"


def fill_batch(images: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last image until there are `size`: one shape, compiled once."""
    return np.concatenate([images, images[-1:].repeat(size - len(images), 0)])


def numbered(prompts: Sequence[str], n: int) -> list[str]:
    """Returns the prompts of n images: the given ones in turn."""
    return [prompts[i % len(prompts)] for i in range(n)]


def prepare_image_files(folder: Path, settings: ImageSetSettings, n: int) -> list[Path]:
    """Returns the files of n images; makes their folder, with a file of the settings in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (about := folder / SETTINGS_FILE).exists():
        write_atomically(about, json.dumps(dataclasses.asdict(settings), indent=2, ensure_ascii=False) + "\n")
    return [folder / f"{number:06d}.png" for number in range(n)]


def sample_missing(
    files: Sequence[Path], prompts: Sequence[str], seeds: Sequence[int], sample: SampleImages, *, batch_size: int,
    share: tuple[int, int] = (0, 1), after_batch: Callable[[int], bool] = lambda done: False,
) -> None:  # fmt: skip
    """Samples the images whose files are missing, in order; a file has its name only when it is complete.

    The processes of `share` (the index of this one and their number) take batches in turn. `after_batch` is called with
    the number of images in the batch and returns whether to stop.
    """
    # Processes that start at other moments see other files: what is whose must not depend on what is there.
    index, count = share
    missing = [i for i, file in enumerate(files) if not file.exists() and i // batch_size % count == index]
    for start in range(0, len(missing), batch_size):
        rows = missing[start : start + batch_size]
        filled = rows + [rows[-1]] * (batch_size - len(rows))  # one shape, compiled once
        images = sample([prompts[i] for i in filled], [seeds[i] for i in filled])
        for i, image in zip(rows, images, strict=False):
            save_png(image, files[i], {"prompt": prompts[i], "seed": str(seeds[i])})
        if after_batch(len(rows)):
            return
