"""The stages from a part of a source to its shard files: read, decode, encode, write, all at the same time.

    read → decode and crop → batch → dispatch to the device → fetch from it → write

Each stage runs in a thread of its own, a bounded number of items ahead of the next one; decoding runs in processes.
Nothing here imports jax: the encoders come as arguments.

Letters: B images of a batch · n captions of a batch · h w latent rows, columns · L caption tokens · Y caption channels.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from micro_dit.data.preparation.journal import PartReport, Plan
from micro_dit.data.preparation.workers import THREADS, Decoders, Prepared, prepare_example, run_ahead
from micro_dit.data.shard_writer import ShardFileWriter, shard_name
from micro_dit.data.shards import Manifest, Record
from micro_dit.data.sources import Part, Reject

if TYPE_CHECKING:
    from micro_dit.encoders.image import ImageEncoder
    from micro_dit.encoders.text import TextEncoder

SECONDS_BETWEEN_REPORTS = 5.0
BATCHES_TO_WRITE = 16  # encoded, but not yet written: time enough for the disk to finish a file
REPEATED = "id appears twice in the part"
ENDED_WORKER = "decoding it ended the worker process"


class Settings(NamedTuple):
    """What becomes of an example; see `precompute`."""

    resolutions: tuple[int, ...]
    posterior: str
    minimum_side: int
    clean_captions: bool
    validation: float
    seed: int
    batch_size: int

    def split_of(self, id: str, split: str) -> str:
        """The split that an example goes to."""
        draw = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") / 2**64
        return "validation" if draw < self.validation else split


class Encoders(NamedTuple):
    image: "ImageEncoder"
    text: "TextEncoder"


@dataclasses.dataclass(frozen=True)
class Job:
    """A part to be made, the `index`-th of `count` in its split."""

    split: str
    index: int
    count: int
    part: Part


def make_parts(
    jobs: Sequence[Job],
    plan: Plan,
    manifest: Manifest,
    settings: Settings,
    encoders: Encoders,
    decoders: Decoders,
    progress: "Progress",
) -> None:
    """Makes parts, one after the other, in stages that work at the same time: while a batch is on the device, the next
    one is waiting there, the images of those to follow are read and decoded, and those that went before are written."""
    prepare = partial(
        prepare_example,
        resolutions=settings.resolutions,
        minimum_side=settings.minimum_side,
        clean=settings.clean_captions,
    )
    images_ahead = settings.batch_size + 4 * (decoders.workers or THREADS)
    items = run_ahead(read(jobs, progress), count=settings.batch_size)
    batches = run_ahead(make_batches(decoders.map(prepare, items, images_ahead), settings), count=1)
    on_device = run_ahead(dispatch(batches, encoders), count=1)
    encoded = run_ahead(fetch(on_device, progress), count=BATCHES_TO_WRITE)
    with contextlib.closing(encoded):
        for job in jobs:
            plan.finish_part(write_part(job, of_one_part(encoded), plan, manifest, settings, progress))
            progress.finish_part()
    progress.close()


class Label(NamedTuple):
    """An item of a part, or its end if there is no id; `rejected` is why the item cannot be used."""

    id: str | None
    rejected: str | None = None


def read(jobs: Iterable[Job], progress: "Progress") -> Iterator[tuple[Label, tuple[Any, ...] | None]]:
    """Yields every item's label with the image file and captions, if it has any; and a label for the end of a part."""
    for job in jobs:
        progress.begin_part(len(job.part))
        seen: set[str] = set()
        for item in job.part:
            if isinstance(item, Reject):
                yield Label(item.id, item.reason), None
            elif item.id in seen:
                yield Label(item.id, REPEATED), None
            else:
                seen.add(item.id)
                yield Label(item.id), (item.image, item.captions)
        yield Label(None), None


class Batch(NamedTuple):
    """Examples of one part: at most `batch_size` that can be used, and those in between that cannot.

    Attributes:
        examples: Ids and what is known of them; the images are in `pixels`.
        pixels: By resolution r, (batch_size, r, r, 3) uint8, a row for each usable example; empty if there is none.
        last: Whether the part ends here.
    """

    examples: list[tuple[str, Prepared]]
    pixels: dict[int, np.ndarray]
    last: bool

    @property
    def usable(self) -> list[Prepared]:
        return [prepared for _, prepared in self.examples if not prepared.dropped]


def make_batches(decoded: Iterable[tuple[Label, Prepared | None]], settings: Settings) -> Iterator[Batch]:
    """Batches do not cross the end of a part, so that a part's records do not depend on what was made before it."""
    batch: list[tuple[str, Prepared]] = []
    pixels: dict[int, np.ndarray] = {}
    rows = 0
    for label, prepared in decoded:
        if label.id is not None:
            prepared = prepared or Prepared(dropped=label.rejected or ENDED_WORKER)
            for side, image in prepared.images.items():
                if side not in pixels:  # always a full batch: the encoder compiles once for each shape
                    pixels[side] = np.zeros((settings.batch_size, side, side, 3), np.uint8)
                pixels[side][rows] = image
            batch.append((label.id, prepared._replace(images={})))
            rows += not prepared.dropped
        if rows == settings.batch_size or label.id is None:
            yield Batch(batch, pixels, last=label.id is None)
            batch, pixels, rows = [], {}, 0


class OnDevice(NamedTuple):
    """A batch whose results are being computed."""

    batch: Batch
    since: float  # seconds on the monotonic clock
    moments: dict[int, tuple[Any, Any]]
    captions: "Future[Captions]"


class Captions(NamedTuple):
    """Embeddings (n, L, Y) float16 of all captions of a batch, and whether each of them was cut."""

    embeddings: np.ndarray
    cut: list[bool]


def dispatch(batches: Iterable[Batch], encoders: Encoders) -> Iterator[OnDevice]:
    """Starts the encoders, and does not wait for them."""
    with ThreadPoolExecutor(1, "captions") as thread:
        for batch in batches:
            since = time.monotonic()
            moments = {side: encoders.image.encode(pixels) for side, pixels in batch.pixels.items()}
            yield OnDevice(batch, since, moments, thread.submit(encode_captions, batch, encoders.text))


def encode_captions(batch: Batch, encoder: "TextEncoder") -> Captions:
    """Embeds all captions of a batch."""
    captions = [caption for prepared in batch.usable for caption in prepared.captions]
    if not captions:
        return Captions(np.empty((0, encoder.tokens, encoder.channels), np.float16), [])
    return Captions(
        to_float16(encoder.encode(captions)), [count > encoder.tokens for count in encoder.count_tokens(captions)]
    )


class Encoded(NamedTuple):
    """A batch with the mean and standard deviation of its latents, (batch_size, h, w, C) float32 by resolution."""

    batch: Batch
    moments: dict[int, tuple[np.ndarray, np.ndarray]]
    captions: Captions


def fetch(batches: Iterable[OnDevice], progress: "Progress") -> Iterator[Encoded]:
    """Waits for the results of each batch; by then the next one is on the device."""
    for batch, since, moments, captions in batches:
        arrays = {side: (np.asarray(mean), np.asarray(std)) for side, (mean, std) in moments.items()}
        if arrays:
            progress.encoded(since, time.monotonic())
        yield Encoded(batch, arrays, captions.result())


def of_one_part(batches: Iterable[Encoded]) -> Iterator[Encoded]:
    """Batches up to the last one of a part."""
    for encoded in batches:
        yield encoded
        if encoded.batch.last:
            return
    raise RuntimeError("a part has no end: its last batch was lost on the way")


def write_part(
    job: Job, batches: Iterable[Encoded], plan: Plan, manifest: Manifest, settings: Settings, progress: "Progress"
) -> PartReport:
    """Writes the files of a part."""
    report = PartReport(job.split, job.index, job.part.name)
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in dict.fromkeys((job.split, "validation") if settings.validation else (job.split,)):
            path = plan.folder / shard_name(split, job.index, job.count)
            writers[split] = stack.enter_context(ShardFileWriter(path, manifest.fields))
        for encoded in batches:
            row, caption = 0, 0
            for id, prepared in encoded.batch.examples:
                if prepared.dropped:
                    report.rejects.append((id, prepared.dropped))
                    continue
                own = slice(caption, caption + len(prepared.captions))
                arrays = latents(encoded, row, id, settings) | {"caption_embedding": encoded.captions.embeddings[own]}
                row, caption = row + 1, own.stop
                if not all(np.isfinite(array).all() for array in arrays.values()):
                    report.rejects.append((id, "latents or caption embedding are not finite in float16"))
                    continue
                writers[settings.split_of(id, job.split)].write(Record(id, prepared.captions, arrays))
                for change in prepared.altered:
                    report.altered[change].add(id)
                if any(encoded.captions.cut[own]):
                    report.altered[f"caption was cut to {manifest.text_encoder.tokens} tokens"].add(id)
            progress.advance(len(encoded.batch.examples))
    report.files = {split: writer.info for split, writer in writers.items()}
    report.latent_sums = [writer.latent_sums for writer in writers.values()]
    return report


def latents(encoded: Encoded, row: int, id: str, settings: Settings) -> dict[str, np.ndarray]:
    """The latent fields of a record, float16."""
    arrays = {}
    for side, (means, stds) in encoded.moments.items():
        if settings.posterior == "sample":
            noise = noise_of(f"{settings.seed} {side} {id}", means[row].shape)
            arrays[f"latent_sample_{side}"] = to_float16(means[row] + stds[row] * noise)
        else:
            arrays[f"latent_mean_{side}"] = to_float16(means[row])
            arrays[f"latent_std_{side}"] = to_float16(stds[row])
    return arrays


def noise_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise that depends on a name alone, not on the order or the batch of the examples."""
    return np.random.default_rng(list(hashlib.sha256(name.encode()).digest())).standard_normal(shape)


def to_float16(array: np.ndarray) -> np.ndarray:
    """Casts; what is too large becomes infinite, and is looked for before writing."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16)


class Progress:
    """Reports every few seconds how far the work is, how fast, and how long it will take; and once at its end."""

    def __init__(self, parts: int, dollars_per_hour: float, report: Callable[[str], None]):
        self.parts, self.dollars_per_hour, self.report = parts, dollars_per_hour, report
        self.lengths: list[int] = []  # of the parts that have been opened
        self.finished = 0  # parts
        self.images = self.shown = 0
        self.started = self.reported = time.monotonic()
        self.encoded_since: float | None = None
        self.encoded_until = 0.0
        self.waited = 0.0  # seconds for which the device had nothing to do

    def begin_part(self, length: int) -> None:
        """Counts a part that is going to be read, of about so many items."""
        self.lengths.append(length)

    def finish_part(self) -> None:
        """Counts a part that is written."""
        self.finished += 1

    def encoded(self, since: float, until: float) -> None:
        """Counts the time from the dispatch of a batch to the arrival of its results."""
        if self.encoded_since is None:
            self.encoded_since = self.encoded_until = since
        self.waited += max(0.0, since - self.encoded_until)
        self.encoded_until = until

    def advance(self, images: int) -> None:
        """Counts examples that are written or left out."""
        self.images += images
        if time.monotonic() - self.reported > SECONDS_BETWEEN_REPORTS:
            self.show()

    def close(self) -> None:
        """Reports for the last time."""
        if self.images > self.shown:
            self.show()

    def show(self) -> None:
        """Reports now. Parts that have not been opened are taken to be as long as the others, on average."""
        self.reported, self.shown = time.monotonic(), self.images
        seconds = self.reported - self.started
        total = max(self.images, round(sum(self.lengths) * self.parts / len(self.lengths)))
        part = min(self.finished + 1, self.parts)
        left = seconds / self.images * (total - self.images)
        on_device = self.encoded_until - (self.encoded_since or self.encoded_until)
        line = (
            f"part {part} of {self.parts}: {self.images:,} of {total:,} images, {self.images / seconds:.1f} images/s, "
            f"device waited {self.waited / max(on_device, 1e-9):.0%} of the time, {duration(left)} left"
        )
        if self.dollars_per_hour:
            spent, whole = (self.dollars_per_hour * needed / 3600 for needed in (seconds, seconds + left))
            line += f", ${spent:,.2f} of ${whole:,.2f}"
        self.report(line)


def duration(seconds: float) -> str:
    """A time to wait, in the unit that suits it."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
