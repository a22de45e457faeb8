"""Processes the parts of a source in pipelined stages that run concurrently.

    read → decode and crop → batch → dispatch to the device → fetch from the device → write

Each stage runs in its own thread and prefetches a bounded number of items; decoding runs in worker processes. This
module does not import jax, because worker processes import it: the encoders are passed as arguments.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from micro_dit.data.preparation.journal import Journal, PartReport
from micro_dit.data.preparation.progress import PreparationProgress
from micro_dit.data.preparation.settings import PreparationSettings
from micro_dit.data.preparation.workers import THREADS, Decoders, Prepared, prepare_example, run_ahead
from micro_dit.data.shard_writer import ShardFileWriter, shard_name
from micro_dit.data.shards import Manifest, Record
from micro_dit.data.sources import Part, Reject

if TYPE_CHECKING:
    from micro_dit.encoders.image import ImageEncoder
    from micro_dit.encoders.text import TextEncoder

BATCHES_TO_WRITE = 16  # encoded batches buffered while the disk finishes a file
REPEATED = "id appears twice in the part"
ENDED_WORKER = "decoding crashed the worker process"


class Encoders(NamedTuple):
    """The image and text encoder of a preparation."""

    image: "ImageEncoder"
    text: "TextEncoder"


@dataclasses.dataclass(frozen=True)
class Job:
    """A part to process, which is number `index` of `count` in its split."""

    split: str
    index: int
    count: int
    part: Part


def make_parts(
    jobs: Sequence[Job],
    journal: Journal,
    manifest: Manifest,
    settings: PreparationSettings,
    encoders: Encoders,
    decoders: Decoders,
    progress: PreparationProgress,
) -> None:
    """Processes parts in order, with all stages running concurrently."""
    prepare = partial(
        prepare_example,
        resolutions=settings.resolutions,
        minimum_side=settings.smallest_side,
        clean=settings.clean_captions,
    )
    items = run_ahead(read(jobs, progress), count=settings.batch_size)
    prepared = decoders.map(prepare, items, ahead=settings.batch_size + 4 * (decoders.workers or THREADS))
    batches = run_ahead(make_batches(prepared, settings), count=1)
    on_device = run_ahead(dispatch(batches, encoders), count=1)
    encoded = run_ahead(fetch(on_device, progress), count=BATCHES_TO_WRITE)
    with contextlib.closing(encoded):
        for job in jobs:
            journal.finish_part(write_part(job, encoded, journal, manifest, settings, progress))
            progress.finish_part()
    progress.close()


class Label(NamedTuple):
    """The id of an item, or None for the end of a part; `rejected` is the reason why the item cannot be used."""

    id: str | None
    rejected: str | None = None


def read(jobs: Iterable[Job], progress: PreparationProgress) -> Iterator[tuple[Label, tuple[Any, ...] | None]]:
    """Yields (label, (image file, captions)) for each item, (label, None) for rejects, and Label(None) after a part."""
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
    """Consecutive examples of one part, at most `batch_size` of them usable.

    Attributes:
        examples: Ids and prepared examples, without their images.
        pixels: By resolution r, (batch_size, r, r, 3) uint8 with one row per usable example; empty if there are none.
        last: Whether this is the last batch of the part.
    """

    examples: list[tuple[str, Prepared]]
    pixels: dict[int, np.ndarray]
    last: bool


def make_batches(decoded: Iterable[tuple[Label, Prepared | None]], settings: PreparationSettings) -> Iterator[Batch]:
    """Groups examples into batches that do not span parts, so that the records of a part are reproducible."""
    batch: list[tuple[str, Prepared]] = []
    pixels: dict[int, np.ndarray] = {}
    rows = 0
    for label, prepared in decoded:
        if label.id is not None:
            prepared = prepared or Prepared(dropped=label.rejected or ENDED_WORKER)
            for side, image in prepared.images.items():
                if side not in pixels:  # always a full batch: the encoder is compiled once per shape
                    pixels[side] = np.zeros((settings.batch_size, side, side, 3), np.uint8)
                pixels[side][rows] = image
            batch.append((label.id, prepared._replace(images={})))
            rows += not prepared.dropped
        if rows == settings.batch_size or label.id is None:
            yield Batch(batch, pixels, last=label.id is None)
            batch, pixels, rows = [], {}, 0


class OnDevice(NamedTuple):
    """A batch that has been dispatched to the encoders."""

    batch: Batch
    since: float  # dispatch time in seconds on the monotonic clock
    moments: dict[int, tuple[Any, Any]]
    captions: "Future[Captions]"


class Captions(NamedTuple):
    """Embeddings (n, L, Y) float16 of all captions of a batch, and whether each caption was truncated."""

    embeddings: np.ndarray
    cut: list[bool]


def dispatch(batches: Iterable[Batch], encoders: Encoders) -> Iterator[OnDevice]:
    """Dispatches each batch to the encoders without waiting for the results."""
    with ThreadPoolExecutor(1, "captions") as thread:
        for batch in batches:
            since = time.monotonic()
            moments = {side: encoders.image.encode(pixels) for side, pixels in batch.pixels.items()}
            yield OnDevice(batch, since, moments, thread.submit(encode_captions, batch, encoders.text))


def encode_captions(batch: Batch, encoder: "TextEncoder") -> Captions:
    """Embeds all captions of a batch."""
    captions = [caption for _, prepared in batch.examples for caption in prepared.captions]  # excludes dropped examples
    if not captions:
        return Captions(np.empty((0, encoder.tokens, encoder.channels), np.float16), [])
    cut = [count > encoder.tokens for count in encoder.count_tokens(captions)]
    return Captions(to_float16(encoder.encode(captions)), cut)


class Encoded(NamedTuple):
    """A batch with the mean and standard deviation of its latents, (batch_size, h, w, C) float32 by resolution."""

    batch: Batch
    moments: dict[int, tuple[np.ndarray, np.ndarray]]
    captions: Captions


def fetch(batches: Iterable[OnDevice], progress: PreparationProgress) -> Iterator[Encoded]:
    """Waits for the results of each batch while the next batch runs on the device."""
    for batch, since, moments, captions in batches:
        arrays = {side: (np.asarray(mean), np.asarray(std)) for side, (mean, std) in moments.items()}
        if arrays:
            progress.encoded(since, time.monotonic())
        yield Encoded(batch, arrays, captions.result())


def write_part(
    job: Job,
    batches: Iterable[Encoded],
    journal: Journal,
    manifest: Manifest,
    settings: PreparationSettings,
    progress: PreparationProgress,
) -> PartReport:
    """Writes the shard files of a part from its batches, and returns its report."""
    report = PartReport(job.split, job.index, job.part.name)
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in dict.fromkeys((job.split, "validation") if settings.validation else (job.split,)):
            path = journal.folder / shard_name(split, job.index, job.count)
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
            if encoded.batch.last:
                break
        else:
            raise RuntimeError("The last batch of the part is missing.")
    report.files = {split: writer.info for split, writer in writers.items()}
    report.latent_sums = [writer.latent_sums for writer in writers.values()]
    return report


def latents(encoded: Encoded, row: int, id: str, settings: PreparationSettings) -> dict[str, np.ndarray]:
    """Returns the latent fields of a record, float16."""
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
    """Returns standard normal noise that depends only on a name, not on the order or batch of the examples."""
    return np.random.default_rng(list(hashlib.sha256(name.encode()).digest())).standard_normal(shape)


def to_float16(array: np.ndarray) -> np.ndarray:
    """Casts to float16. Values out of range become infinite, and `write_part` rejects such examples."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16)
