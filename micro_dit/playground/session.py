"""The state behind the page of micro_dit/playground: bounded settings, checkpoints to choose, images as they form.

One thread has the device: whoever asks, drawings follow one another.
"""

import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from PIL import Image

from micro_dit.api import GenerationSettings, Model, load
from micro_dit.diffusion.generate import Sampling
from micro_dit.errors import UserError
from micro_dit.images import file_name, save_png
from micro_dit.interop.model_folder import is_model_folder, read_config
from micro_dit.training.checkpoint import Checkpoints

MAX_LETTERS, MAX_STEPS, MAX_GUIDANCE, MAX_IMAGES = 1000, 100, 20.0, 8
MAX_SEED = 2**32 - MAX_IMAGES
KEPT_MODELS = 2
FORMING = 1 / 3  # of the time at most goes into pictures that are not finished


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for images; its bounds hold for requests that do not come from the page's controls, too.

    Attributes:
        prompt: Prompt.
        settings: Settings that the page has controls for.
        checkpoint: One of `Session.choices`.
        beside: Another one, to sample with the same settings; none if empty.

    Raises:
        UserError: A setting is out of bounds.
    """

    prompt: str
    settings: GenerationSettings
    checkpoint: str
    beside: str = ""

    def __post_init__(self) -> None:
        settings = self.settings
        for what, text in (("prompt", self.prompt), ("negative prompt", settings.negative_prompt)):
            if len(text) > MAX_LETTERS:
                raise UserError(f"the {what} has {len(text)} letters: use at most {MAX_LETTERS}.")
        for what, number, low, high in (
            ("seed", settings.seed, 0, MAX_SEED),
            ("number of steps", settings.steps, 1, MAX_STEPS),
            ("number of images", settings.num, 1, MAX_IMAGES),
        ):
            if not isinstance(number, int) or not low <= number <= high:
                raise UserError(f"the {what} is {number}: use a whole number from {low} to {high}.")
        if settings.guidance is None or not 0 <= settings.guidance <= MAX_GUIDANCE:
            raise UserError(f"the guidance is {settings.guidance}: use a number from 0 to {MAX_GUIDANCE:g}.")
        Sampling(settings.steps, settings.guidance, settings.sampler)  # type: ignore[arg-type]

    def image(self, number: int, checkpoint: str) -> "Request":
        """Returns the request for one of the images alone."""
        settings = dataclasses.replace(self.settings, num=1, seed=self.settings.seed + number)
        return Request(self.prompt, settings, checkpoint)


class Choice(NamedTuple):
    """A checkpoint to draw with, as `micro_dit.api.load` takes it."""

    path: Path
    step: int | None = None
    params: str | None = None


class Picture(NamedTuple):
    """An image, the request for it alone, and its PNG file, which is None while the image is forming."""

    image: Image.Image
    request: Request
    path: Path | None = None


class Frame(NamedTuple):
    """How far a drawing is.

    Attributes:
        done: from 0 to 1.
        pictures: those of each checkpoint; None where there is nothing to see yet.
        warnings: what a user should know.
    """

    done: float
    pictures: dict[str, list[Picture | None]]
    warnings: tuple[str, ...]


class Session:
    """Draws for anybody who asks, one after the other.

    Attributes:
        choices: checkpoints by the name that they are chosen by; the first is the default.
    """

    def __init__(self, paths: Sequence[str | Path], folder: Path):
        """Looks for checkpoints in work directories and model folders; pictures go to `folder`.

        Raises:
            UserError: one has no checkpoint.
        """
        self.choices = find_checkpoints(paths)
        self._folder = folder
        self._numbers = itertools.count()
        self._models: dict[str, Model] = {}  # the one used last is the last
        self._device = ThreadPoolExecutor(1, "device")
        self._closed = threading.Event()

    def model(self, label: str) -> Model:
        """The model of a checkpoint; so many of those used last stay in memory."""
        if label not in self.choices:
            raise UserError(f"there is no checkpoint {label!r}; choose {' or '.join(self.choices)}.")
        if (model := self._models.pop(label, None)) is None:
            while len(self._models) >= KEPT_MODELS:
                del self._models[next(iter(self._models))]
            choice = self.choices[label]
            model = load(choice.path, choice.step, params=choice.params)
            for other in self._models.values():
                model.share(other)
        self._models[label] = model
        return model

    def warm_up(self) -> Model:
        """The default model, with everything loaded and compiled that a first drawing would wait for."""

        def work() -> Model:
            model = self.model(next(iter(self.choices)))
            model.generate("a", steps=1)
            return model

        return self._device.submit(work).result()

    def draw(self, request: Request) -> Iterator[Frame]:
        """Frames of a drawing as it forms; the last has finished pictures, with files. Closing the iterator stops it.

        Raises:
            UserError: A checkpoint can't be loaded, or the sampler can't be used with these settings.
        """
        frames: SimpleQueue[Frame | None] = SimpleQueue()
        stop = threading.Event()

        def show(frame: Frame) -> None:
            if stop.is_set() or self._closed.is_set():
                raise InterruptedError("nobody looks on any more")
            frames.put(frame)

        drawing = self._device.submit(self._draw, request, show)
        drawing.add_done_callback(lambda _: frames.put(None))
        try:
            while (frame := frames.get()) is not None:
                yield frame
        finally:
            stop.set()
        drawing.result()  # raises what went wrong

    def _draw(self, request: Request, show: Callable[[Frame], None]) -> None:
        labels = dict.fromkeys(label for label in (request.checkpoint, request.beside) if label)
        sheets: dict[str, list[Picture | None]] = {label: [None] * request.settings.num for label in labels}
        warnings: dict[str, None] = {}

        def tell(number: int, done: float) -> None:
            done = (number + done) / len(sheets)
            show(Frame(done, {label: list(sheet) for label, sheet in sheets.items()}, tuple(warnings)))

        for number, (label, sheet) in enumerate(sheets.items()):
            tell(number, 0.0)
            model = self.model(label)
            model.warn = lambda text: warnings.update({text: None})
            own = [request.image(i, label) for i in range(request.settings.num)]
            images = model.generate(
                request.prompt,
                request.settings,
                watch=_show_forming(sheet, model, own, functools.partial(tell, number)),
            )
            sheet[:] = [self._save(image, model, one) for image, one in zip(images, own, strict=True)]
        tell(len(sheets), 0.0)

    def _save(self, image: Image.Image, model: Model, request: Request) -> Picture:
        seed = request.settings.seed
        path = self._folder / file_name(next(self._numbers), request.prompt, seed)
        metadata = {"prompt": request.prompt, "seed": str(seed)} | model.png_metadata(request.settings)
        save_png(image, path, metadata)
        return Picture(image, request, path)

    def close(self) -> None:
        """Stops the drawing in progress, and draws no more."""
        self._closed.set()
        self._device.shutdown(cancel_futures=True)


def _show_forming(
    sheet: list[Picture | None], model: Model, requests: Sequence[Request], tell: Callable[[float], None]
) -> Callable[[float, np.ndarray, np.ndarray], None]:
    """Returns what `Model.generate` calls after each call of the network: it updates a sheet with forming images.

    Decoding takes at most the fraction FORMING of the time.

    Args:
        sheet: Images of a checkpoint, updated in place.
        model: Model of the checkpoint.
        requests: Request for each image.
        tell: Called with the fraction done when the sheet was updated.
    """
    shown, spent = 0.0, 0.0

    def watch(done: float, rows: np.ndarray, denoised: np.ndarray) -> None:
        nonlocal shown, spent
        start = time.monotonic()
        if done < 1 and spent <= FORMING * (start - shown + spent):
            for row, image in zip(rows, model.decode(denoised), strict=True):
                sheet[row] = Picture(image, requests[row])
            shown = time.monotonic()
            spent = shown - start
            tell(done)

    return watch


def find_checkpoints(paths: Sequence[str | Path]) -> dict[str, Choice]:
    """Checkpoints of work directories and model folders by name, the newest of the first before the others.

    Raises:
        UserError: a folder has none.
    """
    found: dict[str, Choice] = {}
    for path in map(Path, paths):
        among = f"{path.resolve().name}, " if len(paths) > 1 else ""
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is no work directory of a run and no model folder (it has no config.json).")
        if is_model_folder(path):
            found[path.resolve().name] = Choice(path)
            continue
        checkpoints = Checkpoints(path) if (path / "checkpoints").is_dir() else None
        if checkpoints is None or not checkpoints.steps:
            raise UserError(f"{path} has no checkpoints yet: train for some steps first.")
        phases = read_config(path / "config.json")["config"]["phases"]
        for step in checkpoints.steps:
            name = f"{among}step {step}, {phases[checkpoints.read_meta(step)['phase']]['name']}"
            if checkpoints.has_average(step):
                found |= {f"{name}, average": Choice(path, step), f"{name}, raw": Choice(path, step, "raw")}
            else:
                found[name] = Choice(path, step)
        checkpoints.close()
    return found
