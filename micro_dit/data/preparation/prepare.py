"""Prepares a data set, as described in micro_dit/precompute.py."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from micro_dit.data.captions import CLEANING_VERSION, clean_caption
from micro_dit.data.preparation.journal import Journal, check_process
from micro_dit.data.preparation.progress import PreparationProgress
from micro_dit.data.preparation.settings import PreparationSettings
from micro_dit.data.preparation.stages import Encoders, Job, make_parts
from micro_dit.data.preparation.workers import Decoders
from micro_dit.data.shards import FORMAT_VERSION, Manifest, read_manifest, record_fields
from micro_dit.data.sources import Slice, Source, open_source
from micro_dit.encoders.info import ImageEncoderInfo, TextEncoderInfo
from micro_dit.errors import UserError

# Worker processes import the main module and therefore this one, so jax is imported only in functions that need it.

IDS_SHOWN = 5  # per reason in the summary; the manifest lists more, and rejects.jsonl all


def make_shards(
    settings: PreparationSettings,
    out: str,
    *,
    workers: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    dollars_per_hour: float = 0.0,
    report: Callable[[str], None] = print,
) -> Manifest | None:
    """Writes a folder of shards, or resumes an unfinished one.

    Args:
        settings: Settings of the preparation.
        out: Output folder.
        workers: Number of worker processes that decode images; 0 decodes in threads of this process.
        process_index: Index of this process among those that share the work; by default the JAX process index.
        process_count: Number of processes that share the work; by default the JAX process count.
        dollars_per_hour: Price of this host, used only to report the cost.
        report: Called with each line of progress.

    Returns:
        The manifest, or None if other processes still have parts to process.

    Raises:
        UserError: An argument is invalid, `out` was started with other settings, a package is missing, no input is
            usable, or the disk or the device memory is full.
    """
    import jax
    from jax.experimental import multihost_utils

    started = time.monotonic()
    together = process_count is None and jax.process_count() > 1
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    check_process(index, count)
    source = open_checked(settings)
    encoders = load_encoders(settings)
    report(f"loaded {encoders.image.name} and {encoders.text.name} in {time.monotonic() - started:.1f} s")

    splits = [(split, source.parts(split)) for split in source.splits]
    jobs = [Job(split, number, len(parts), part) for split, parts in splits for number, part in enumerate(parts)]
    manifest = describe(source, settings, encoders)
    journal = open_journal(out, settings, manifest, jobs, index)
    if journal.finished:
        report(f"{out} is already complete")
        return read_manifest(out)
    own = jobs[index::count]
    left = [job for job in own if journal.read_part(job.split, job.index) is None]
    if len(left) < len(own):
        report(f"resuming: {len(own) - len(left)} of {len(own)} parts are done")
    progress = PreparationProgress(len(left), dollars_per_hour, report)
    with memory_errors(settings.batch_size), Decoders(workers) as decoders:
        make_parts(left, journal, manifest, settings, encoders, decoders, progress)

    if journal.complete:
        journal.merge(manifest)
    elif not together:
        report(f"finished the {len(own)} parts of this process; {out} is complete when all {count} are done")
        return None
    if together:
        multihost_utils.sync_global_devices("precompute")  # waits until the manifest has been written
    manifest = read_manifest(out)
    report(summary(manifest, out, time.monotonic() - started))
    return manifest


@contextlib.contextmanager
def memory_errors(batch_size: int) -> Iterator[None]:
    """Converts JAX's out-of-memory error into a UserError."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"The device ran out of memory with batches of {batch_size} images. Set a smaller --batch_size."
        ) from error


def open_checked(settings: PreparationSettings) -> Source:
    """Opens the source and checks that it can be prepared with the settings.

    Raises:
        UserError: A package for cleaning captions is missing, the source cannot be opened, or `validation` is set for a
            source that has its own splits.
    """
    if settings.clean_captions:
        clean_caption("<b>é</b>")  # fails early if a package is missing
    source = open_source(settings.source, px=max(settings.resolutions))
    if settings.validation and tuple(source.splits) != ("train",):
        splits = ", ".join(source.splits)
        raise UserError(f"The source {source.name} already has the splits {splits}. Remove --validation.")
    return source


def load_encoders(settings: PreparationSettings) -> Encoders:
    """Loads the image and text encoders onto all devices of this host, with batches sharded over the devices."""
    import jax

    from micro_dit.encoders.image import load_image_encoder
    from micro_dit.encoders.text import load_text_encoder
    from micro_dit.parallel.mesh import batch_sharding, make_mesh

    sharding = batch_sharding(make_mesh(devices=jax.local_devices()))
    image = load_image_encoder(settings.vae, settings.dtype, sharding)
    for resolution in settings.resolutions:
        if resolution % image.downsample:
            raise UserError(
                f"Resolution {resolution} is not a multiple of {image.downsample}, the downsampling factor of the "
                "image encoder. Correct --resolutions."
            )
    text = load_text_encoder(settings.text_encoder, settings.caption_tokens, settings.dtype, sharding)
    return Encoders(image, text)


def describe(source: Source, settings: PreparationSettings, encoders: Encoders) -> Manifest:
    """Returns the manifest without files, counts and statistics, which are known only after all parts are done."""
    image, text = encoders
    vae = ImageEncoderInfo(image.name, image.fingerprint, image.channels, image.downsample)
    text_encoder = TextEncoderInfo(text.name, text.fingerprint, text.tokens, text.channels)
    resolutions = tuple(settings.resolutions)
    return Manifest(
        source=source.name,
        attribution=source.attribution,
        resolutions=resolutions,
        posterior=settings.posterior,
        vae=vae,
        text_encoder=text_encoder,
        fields=record_fields(resolutions, settings.posterior, vae, text_encoder),
        caption_cleaning=CLEANING_VERSION if settings.clean_captions else "none",
        splits=dict.fromkeys([*source.splits, "validation"] if settings.validation else source.splits, ()),
    )


def open_journal(
    out: str, settings: PreparationSettings, manifest: Manifest, jobs: Sequence[Job], process_index: int
) -> Journal:
    """Opens the journal of the folder with all settings that the records depend on (not the batch size)."""
    parts = {split: [job.part for job in jobs if job.split == split] for split in manifest.splits}
    names = {split: [part.name for part in of_split] for split, of_split in parts.items()}
    # Adding an item to a listing changes its slices, so the number of items must stay the same.
    listed = {split: sum(len(part) for part in own if isinstance(part, Slice)) for split, own in parts.items()}
    wanted = {
        "format_version": FORMAT_VERSION,
        "source": settings.source,
        "examples listed": listed,
        "resolutions": ",".join(map(str, settings.resolutions)),
        "vae": vars(manifest.vae),
        "text_encoder": vars(manifest.text_encoder),
        "dtype": settings.dtype,
        "posterior": settings.posterior,
        "minimum_side": settings.smallest_side,
        "caption_cleaning": manifest.caption_cleaning,
        "validation": settings.validation,
        "seed": settings.seed,
    }
    return Journal(out, wanted, names, process_index)


def summary(manifest: Manifest, out: str, seconds: float) -> str:
    """Returns a summary of the records written and the inputs dropped and altered."""
    splits = ", ".join(f"{split} {manifest.records(split):,}" for split in manifest.splits)
    dropped = sum(tally.count for tally in manifest.dropped.values())
    seen = dropped + sum(manifest.records(split) for split in manifest.splits)
    size = f"{manifest.bytes / 1e6:.1f} MB in {seconds:.1f} s"
    lines = [f"{out}: {splits} of {seen:,} examples, {dropped:,} dropped; {size}"]
    for kind, reasons in (("dropped", manifest.dropped), ("altered", manifest.altered)):
        for reason, tally in reasons.items():
            more = ", …" if tally.count > IDS_SHOWN else ""
            lines.append(f"{kind} {tally.count:,}: {reason}: {', '.join(tally.ids[:IDS_SHOWN])}{more}")
    return "\n".join(lines)
