"""The state of the playground: validated requests, available checkpoints, and sampling with intermediate images."""

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
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.pretrained import read_run

MAX_LETTERS, MAX_STEPS, MAX_GUIDANCE, MAX_IMAGES = 1000, 100, 20.0, 8
MAX_SEED = 2**32 - MAX_IMAGES
KEPT_MODELS = 2
FORMING = 1 / 3  # largest fraction of the time that is spent on decoding unfinished images


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for images. The constructor checks all bounds, because requests do not have to come from the page.

    Raises:
        UserError: A setting is out of bounds.
    """

    prompt: str
    settings: GenerationSettings
    checkpoint: str  # one of `Session.choices`
    beside: str = ""  # a second checkpoint to sample with the same settings; empty for none

    def __post_init__(self) -> None:
        settings = self.settings
        for what, text in (("prompt", self.prompt), ("negative prompt", settings.negative_prompt)):
            if len(text) > MAX_LETTERS:
                raise UserError(f"The {what} has {len(text)} characters. Shorten it to at most {MAX_LETTERS}.")
        for what, number, low, high in (
            ("seed", settings.seed, 0, MAX_SEED),
            ("number of steps", settings.steps, 1, MAX_STEPS),
            ("number of images", settings.num, 1, MAX_IMAGES),
        ):
            if not isinstance(number, int) or not low <= number <= high:
                raise UserError(f"The {what} is {number}. Use an integer from {low} to {high}.")
        if settings.guidance is None or not 0 <= settings.guidance <= MAX_GUIDANCE:
            raise UserError(f"The guidance scale is {settings.guidance}. Use a number from 0 to {MAX_GUIDANCE:g}.")
        Sampling(settings.steps, settings.guidance, settings.sampler)  # type: ignore[arg-type]

    def image(self, number: int, checkpoint: str) -> "Request":
        """Returns the request for a single image of this request."""
        settings = dataclasses.replace(self.settings, num=1, seed=self.settings.seed + number)
        return Request(self.prompt, settings, checkpoint)


class Choice(NamedTuple):
    """The arguments of `micro_dit.api.load` for a checkpoint."""

    path: Path
    step: int | None = None
    params: str | None = None


class Sample(NamedTuple):
    """An image, the request for this image, and its PNG file. The file is None while the image is unfinished."""

    image: Image.Image
    request: Request
    path: Path | None = None


class Frame(NamedTuple):
    """The state of a request in progress."""

    done: float  # fraction done, from 0 to 1
    samples: dict[str, list[Sample | None]]  # images by checkpoint; None before the first intermediate image
    warnings: tuple[str, ...]


class Session:
    """Processes requests one at a time, in a single thread that uses the device.

    Attributes:
        choices: Available checkpoints by label. The first one is the default.
    """

    def __init__(self, paths: Sequence[str | Path], folder: Path):
        """Finds the available checkpoints.

        Args:
            paths: Work directories and model folders.
            folder: Folder for the images.
        """
        self.choices = find_checkpoints(paths)
        self._folder = folder
        self._numbers = itertools.count()
        self._models: dict[str, Model] = {}  # ordered from least to most recently used
        self._device = ThreadPoolExecutor(1, "device")
        self._closed = threading.Event()

    def model(self, label: str) -> Model:
        """Returns the model of a checkpoint. The KEPT_MODELS most recently used models stay in memory."""
        if label not in self.choices:
            raise UserError(f"Unknown checkpoint {label!r}. Choose one of: {'; '.join(self.choices)}.")
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
        """Returns the default model, after loading and compiling everything that the first request needs."""

        def work() -> Model:
            model = self.model(next(iter(self.choices)))
            model.generate("a", steps=1)
            return model

        return self._device.submit(work).result()

    def draw(self, request: Request) -> Iterator[Frame]:
        """Samples images. Closing the iterator stops the request.

        Yields:
            Frames with intermediate images. The last frame has the finished images and their files.

        Raises:
            UserError: A checkpoint can't be loaded, or a setting is invalid.
        """
        frames: SimpleQueue[Frame | None] = SimpleQueue()
        stop = threading.Event()

        def show(frame: Frame) -> None:
            if stop.is_set() or self._closed.is_set():
                raise InterruptedError("the request was stopped")
            frames.put(frame)

        sampling = self._device.submit(self._draw, request, show)
        sampling.add_done_callback(lambda _: frames.put(None))
        try:
            while (frame := frames.get()) is not None:
                yield frame
        finally:
            stop.set()
        sampling.result()  # raises the exception of the request, if any

    def _draw(self, request: Request, show: Callable[[Frame], None]) -> None:
        labels = dict.fromkeys(label for label in (request.checkpoint, request.beside) if label)
        samples: dict[str, list[Sample | None]] = {label: [None] * request.settings.num for label in labels}
        warnings: dict[str, None] = {}

        def report(number: int, done: float) -> None:
            copies = {label: list(own) for label, own in samples.items()}
            show(Frame((number + done) / len(samples), copies, tuple(warnings)))

        for number, (label, own) in enumerate(samples.items()):
            report(number, 0.0)
            model = self.model(label)
            model.warn = lambda text: warnings.update({text: None})
            requests = [request.image(i, label) for i in range(request.settings.num)]
            watch = _show_forming(own, model, requests, functools.partial(report, number))
            images = model.generate(request.prompt, request.settings, watch=watch)
            own[:] = [self._save(image, model, one) for image, one in zip(images, requests, strict=True)]
        report(len(samples), 0.0)

    def _save(self, image: Image.Image, model: Model, request: Request) -> Sample:
        seed = request.settings.seed
        path = self._folder / file_name(next(self._numbers), request.prompt, seed)
        metadata = {"prompt": request.prompt, "seed": str(seed)} | model.png_metadata(request.settings)
        save_png(image, path, metadata)
        return Sample(image, request, path)

    def close(self) -> None:
        """Stops the request in progress and rejects further requests."""
        self._closed.set()
        self._device.shutdown(cancel_futures=True)


def _show_forming(
    samples: list[Sample | None], model: Model, requests: Sequence[Request], report: Callable[[float], None]
) -> Callable[[float, np.ndarray, np.ndarray], None]:
    """Returns a callback `watch` for `Model.generate` that updates `samples` in place and reports the fraction done.

    Images are decoded only as often as the time limit FORMING allows.
    """
    shown, spent = 0.0, 0.0

    def watch(done: float, rows: np.ndarray, denoised: np.ndarray) -> None:
        nonlocal shown, spent
        start = time.monotonic()
        if done < 1 and spent <= FORMING * (start - shown + spent):
            for row, image in zip(rows, model.decode(denoised), strict=True):
                samples[row] = Sample(image, requests[row])
            shown = time.monotonic()
            spent = shown - start
            report(done)

    return watch


def find_checkpoints(paths: Sequence[str | Path]) -> dict[str, Choice]:
    """Returns the checkpoints of work directories and model folders by label.

    The folders are in the given order, and the checkpoints of a run are sorted from newest to oldest.

    Raises:
        UserError: A folder has no checkpoints.
    """
    found: dict[str, Choice] = {}
    for path in map(Path, paths):
        prefix = f"{path.resolve().name}, " if len(paths) > 1 else ""
        run = read_run(path)
        if run is None:
            found[path.resolve().name] = Choice(path)
            continue
        phases, checkpoints = run["config"]["phases"], Checkpoints(path)
        for step in checkpoints.steps:
            name = f"{prefix}step {step}, {phases[checkpoints.read_meta(step)['phase']]['name']}"
            if checkpoints.has_average(step):
                found |= {f"{name}, EMA": Choice(path, step), f"{name}, raw": Choice(path, step, "raw")}
            else:
                found[name] = Choice(path, step)
        checkpoints.close()
    return found
