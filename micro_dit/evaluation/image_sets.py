"""Sets of images, and sampling of generated sets.

In a generated set, image i has the seed `seed` + i and the prompt with this index. A set therefore does not depend on
batch size, devices or processes. Sampling can be interrupted and resumed, and a set can be extended later.
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
    """An ordered set of images that can be read repeatedly.

    Attributes:
        prompts: Prompt of each image; empty if there are none.
    """

    prompts: Sequence[str] = ()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def _read(self, numbers: slice) -> np.ndarray: ...

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yields all images in batches (size, H, W, 3) uint8. The last batch may be smaller."""
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
    """Image files.

    With `side`, each image is resized and center-cropped to side×side pixels. Otherwise all have to be of one size.
    """

    def __init__(self, files: Sequence[Path], side: int | None = None, prompts: Sequence[str] = ()):
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
            raise UserError(f"The image {file} can't be read ({error}). Replace or remove the file.") from error


def image_folder(folder: str | Path, side: int, only: Iterable[str] | None = None) -> FromFiles:
    """Returns the images in a folder and its subfolders, sorted by path.

    Args:
        folder: The folder.
        side: Side of the center crops in pixels.
        only: Names of the image files to use, in this order; by default all of them.

    Raises:
        UserError: The folder does not exist, contains no images, or lacks an image of `only`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"The folder {folder} does not exist. Set --reference to a folder of real images or a statistics file "
            "(.npz)."
        )
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if only is not None:
        by_name = {file.name: file for file in files}
        wanted = list(only)
        if missing := [name for name in wanted if name not in by_name]:
            raise UserError(
                f"{len(missing)} of {len(wanted)} images are missing in {folder}, such as {missing[0]}. Set "
                "--reference to a folder with the images of all prompts."
            )
        files = [by_name[name] for name in wanted]
    if not files:
        raise UserError(f"{folder} contains no images ({', '.join(SUFFIXES)}). Set --reference to a folder of images.")
    return FromFiles(files, side)


# ---- Generated sets --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageSetSettings:
    """Everything that determines the images of a set.

    Attributes:
        model: Hash of the weights.
        params: 'ema' or 'raw'.
        guidance: Guidance scale.
        steps: Number of Heun steps.
        seed: Seed of image 0.
        dtype: Dtype of the matrix products.
        prompts: Name of the prompts, such as 'held-out captions'.
        prompts_hash: Hash of the prompts.
        interval: (low, high), noise levels between which guidance is applied. None applies it at all noise levels.
        path_drop: Whether to use path-drop guidance.
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
        """Name of the folder, unique for these settings."""
        default = {"interval": None, "path_drop": False}  # left out, so that folders of earlier versions are found
        fields = {name: value for name, value in dataclasses.asdict(self).items() if default.get(name, ...) != value}
        text = json.dumps(fields, sort_keys=True)
        return f"images_{self.params}_guidance_{self.guidance:g}_{hash_text(text)[:8]}"


def fill_batch(images: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last image until the batch has `size` images, so that all batches share one compiled program."""
    return np.concatenate([images, images[-1:].repeat(size - len(images), 0)])


def numbered(prompts: Sequence[str], n: int) -> list[str]:
    """Returns the prompts of n images, repeating the list of prompts as needed."""
    return [prompts[i % len(prompts)] for i in range(n)]


def prepare_image_files(folder: Path, settings: ImageSetSettings, n: int) -> list[Path]:
    """Creates the folder of an image set with its settings file, and returns the paths of its n images."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (about := folder / SETTINGS_FILE).exists():
        write_atomically(about, json.dumps(dataclasses.asdict(settings), indent=2, ensure_ascii=False) + "\n")
    return [folder / f"{number:06d}.png" for number in range(n)]


def sample_missing(
    files: Sequence[Path], prompts: Sequence[str], seeds: Sequence[int], sample: SampleImages, *, batch_size: int,
    share: tuple[int, int] = (0, 1), after_batch: Callable[[int], bool] = lambda done: False,
) -> None:  # fmt: skip
    """Samples the images whose files are missing, in order. Each file is written atomically.

    Args:
        files: Paths of all images.
        prompts: Prompt of each image.
        seeds: Seed of each image.
        sample: Samples a batch of images.
        batch_size: Number of images per batch.
        share: Index of this process and number of processes. Batches are distributed round-robin.
        after_batch: Called with the number of new images after each batch; returns whether to stop.
    """
    # Processes that start at different times see different files, so the assignment of images to processes must not
    # depend on which files exist.
    index, count = share
    missing = [i for i, file in enumerate(files) if not file.exists() and i // batch_size % count == index]
    for start in range(0, len(missing), batch_size):
        rows = missing[start : start + batch_size]
        filled = rows + [rows[-1]] * (batch_size - len(rows))  # equal shapes share one compiled program
        images = sample([prompts[i] for i in filled], [seeds[i] for i in filled])
        for i, image in zip(rows, images, strict=False):
            save_png(image, files[i], {"prompt": prompts[i], "seed": str(seeds[i])})
        if after_batch(len(rows)):
            return
