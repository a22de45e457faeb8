"""Prepares a data set: every image becomes latents, every caption an embedding, and both go into shards.

    python -m micro_dit.precompute --source=openmoji:smileys-emotion --resolutions=128 \\
        --vae=micro_dit/assets/openmoji_vae --out=shards/smileys

Training reads the shards and runs neither encoder. An input that cannot be used is left out, counted, and named with
the reason in rejects.jsonl; one that is used after a change, such as a caption that was cut, is counted too.

The source's parts (an archive, or some thousand rows of a listing) are made one by one. A run that ended early, however
it ended, continues with the parts that are not done when it is started again; the result is the same. Several hosts
can share a folder: each takes every n-th part, and the last one to finish completes it.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from absl import app, flags

from micro_dit.data.captions import CLEANING_VERSION, clean_caption
from micro_dit.data.preparation.journal import Plan
from micro_dit.data.preparation.stages import Encoders, Job, Progress, Settings, make_parts
from micro_dit.data.preparation.workers import Decoders
from micro_dit.data.shards import FORMAT_VERSION, POSTERIORS, Manifest, read_manifest, record_fields
from micro_dit.data.sources import Slice, Source, open_source
from micro_dit.encoders.info import ImageEncoderInfo, TextEncoderInfo
from micro_dit.errors import UserError

# Each decoding process imports this module once more: what brings jax is imported where it is used.

IDS_SHOWN = 5  # in the summary; the manifest names more, and rejects.jsonl all


def precompute(
    source: str,
    out: str,
    resolutions: Sequence[int],
    vae: str,
    text_encoder: str = "minilm",
    posterior: str = "mean_std",
    batch_size: int = 32,
    minimum_side: int | None = None,
    caption_tokens: int | None = None,
    clean_captions: bool = True,
    validation: float = 0.0,
    dtype: str = "float32",
    seed: int = 0,
    workers: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    dollars_per_hour: float = 0.0,
    report: Callable[[str], None] = print,
) -> Manifest | None:
    """Makes a folder of shards, or what is missing of it.

    Args:
        source: name of the source and its argument, as in 'openmoji:smileys-emotion,animals-nature'.
        out: the folder to make or to continue.
        resolutions: sides of the square images in pixels; a record holds the latents of all of them.
        vae: the image encoder: a folder in diffusers' format, or a name on the Hugging Face hub.
        text_encoder: name of the text encoder.
        posterior: 'mean_std' stores the distribution of the latents, 'sample' one draw from it, in half the space.
        batch_size: images encoded at once, on all devices of this host together.
        minimum_side: images with a smaller side are dropped; by default the smallest of the resolutions, so that
            images in between are enlarged, and counted.
        caption_tokens: tokens of a caption embedding, by default the encoder's own number; longer captions are cut, and
            counted.
        clean_captions: whether to apply `micro_dit.data.captions.clean_caption`.
        validation: share of the examples that go to a split 'validation', by a hash of their ids; for a source that
            has no split but 'train'.
        dtype: of the encoders' matrix products, 'float32' or 'bfloat16'.
        seed: of the posterior's samples; each depends on it, the resolution and the example's id alone.
        workers: processes that decode; 0 takes threads of this one, which suits a few hundred images.
        process_index: which of the hosts that share the work this is; by default as JAX was started.
        process_count: how many hosts share the work; by default as JAX was started.
        dollars_per_hour: price of this host, to show what is spent.
        report: called with each line of progress.

    Returns:
        The manifest of the shards; None if other processes still have parts to make.

    Raises:
        UserError: an argument is wrong, `out` was begun with other settings, a package is missing, no input is usable,
            or the disk or the device's memory is full.
    """
    import jax

    started = time.monotonic()
    together = process_count is None and jax.process_count() > 1
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if not 0 <= index < count:
        raise UserError(f"The process index must be from 0 to {count - 1} among {count} processes, not {index}.")
    smallest = min(resolutions, default=0)
    settings = Settings(
        tuple(sorted(set(resolutions))), posterior, smallest if minimum_side is None else minimum_side,
        clean_captions, validation, seed, batch_size,
    )  # fmt: skip
    check_settings(settings)
    opened = open_source(source, px=max(resolutions))
    if validation and tuple(opened.splits) != ("train",):
        has = ", ".join(opened.splits)
        raise UserError(f"The source {opened.name} has splits of its own ({has}): leave out --validation.")
    jobs = [
        Job(split, number, len(parts), part)
        for split, parts in ((split, opened.parts(split)) for split in opened.splits)
        for number, part in enumerate(parts)
    ]
    encoders = load_encoders(vae, text_encoder, caption_tokens, dtype, settings.resolutions)
    report(f"loaded {encoders.image.name} and {encoders.text.name} in {time.monotonic() - started:.1f} s")

    manifest = describe(opened, settings, encoders)
    plan = begin(out, source, dtype, settings, manifest, jobs, index)
    if plan.finished:
        report(f"{out} is finished: nothing is left to do")
        return read_manifest(out)
    own = jobs[index::count]
    left = [job for job in own if plan.read_part(job.split, job.index) is None]
    if len(left) < len(own):
        report(f"{len(own) - len(left)} of {len(own)} parts are done already")
    progress = Progress(len(left), dollars_per_hour, report)
    try:
        with Decoders(workers) as decoders:
            make_parts(left, plan, manifest, settings, encoders, decoders, progress)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"The device's memory is too small for batches of {batch_size} images: take less.") from error

    if not plan.missing():
        manifest = plan.merge(manifest)
    elif not together:
        report(f"this process has made its {len(own)} parts; the last of the {count} processes completes {out}")
        return None
    if together:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("precompute")  # from here on the manifest is there for all
        manifest = read_manifest(out)
    report(summary(manifest, out, time.monotonic() - started))
    return manifest


def check_settings(settings: Settings) -> None:
    """Raises UserError if something is out of range, or needs a package that is missing."""
    if not settings.resolutions or min(*settings.resolutions, settings.batch_size) < 1:
        raise UserError("Resolutions and batch size must be positive: correct the one that is not.")
    if settings.posterior not in POSTERIORS:
        raise UserError(f"Unknown posterior '{settings.posterior}': choose one of {', '.join(POSTERIORS)}.")
    if not 0 <= settings.validation < 1:
        raise UserError(f"The share for validation must be at least 0 and less than 1, not {settings.validation}.")
    if settings.clean_captions:
        clean_caption("<b>é</b>")


def load_encoders(
    vae: str, text_encoder: str, caption_tokens: int | None, dtype: str, resolutions: Sequence[int]
) -> Encoders:
    """Loads both onto all devices of this host, which get equal shares of each batch."""
    import jax

    from micro_dit.encoders.image import load_image_encoder
    from micro_dit.encoders.text import load_text_encoder
    from micro_dit.parallel.mesh import batch_sharding, make_mesh

    sharding = batch_sharding(make_mesh(devices=jax.local_devices()))
    image = load_image_encoder(vae, dtype, sharding)
    for resolution in resolutions:
        if resolution % image.downsample:
            raise UserError(f"Resolution {resolution} is not a multiple of {image.downsample}: choose another.")
    return Encoders(image, load_text_encoder(text_encoder, caption_tokens, dtype, sharding))


def describe(source: Source, settings: Settings, encoders: Encoders) -> Manifest:
    """The manifest, but for what is not known before all parts are done."""
    image, text = encoders
    vae = ImageEncoderInfo(image.name, image.fingerprint, image.channels, image.downsample)
    text_encoder = TextEncoderInfo(text.name, text.fingerprint, text.tokens, text.channels)
    return Manifest(
        source=source.name,
        attribution=source.attribution,
        resolutions=settings.resolutions,
        posterior=settings.posterior,
        vae=vae,
        text_encoder=text_encoder,
        fields=record_fields(settings.resolutions, settings.posterior, vae, text_encoder),
        dropped={},
        altered={},
        statistics={},
        caption_cleaning=CLEANING_VERSION if settings.clean_captions else "none",
        splits=dict.fromkeys([*source.splits, "validation"] if settings.validation else source.splits, ()),
    )


def begin(
    out: str, source: str, dtype: str, settings: Settings, manifest: Manifest, jobs: Sequence[Job], process_index: int
) -> Plan:
    """Opens the folder, for all that its content depends on; the batch size, say, may change from run to run."""
    parts: dict[str, list[str]] = {split: [] for split in manifest.splits}
    listed: dict[str, int] = dict.fromkeys(manifest.splits, 0)
    for job in jobs:
        parts[job.split].append(job.part.name)
        if isinstance(job.part, Slice):  # of a listing, where each part changes if something is added
            listed[job.split] += len(job.part)
    wanted = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "examples listed": listed,
        "resolutions": ",".join(map(str, settings.resolutions)),
        "vae": vars(manifest.vae),
        "text_encoder": vars(manifest.text_encoder),
        "dtype": dtype,
        "posterior": settings.posterior,
        "minimum_side": settings.minimum_side,
        "caption_cleaning": manifest.caption_cleaning,
        "validation": settings.validation,
        "seed": settings.seed,
    }
    return Plan(out, wanted, parts, process_index)


def summary(manifest: Manifest, out: str, seconds: float) -> str:
    """What was made, what was left out, and what was changed."""
    splits = ", ".join(f"{split} {manifest.records(split):,}" for split in manifest.splits)
    dropped = sum(tally.count for tally in manifest.dropped.values())
    seen = dropped + sum(manifest.records(split) for split in manifest.splits)
    lines = [
        f"{out}: {splits} of {seen:,} examples, {dropped:,} dropped; {manifest.bytes / 1e6:.1f} MB in {seconds:.1f} s"
    ]
    for kind, reasons in (("dropped", manifest.dropped), ("altered", manifest.altered)):
        for reason, tally in reasons.items():
            more = ", …" if tally.count > IDS_SHOWN else ""
            lines.append(f"{kind} {tally.count:,}: {reason}: {', '.join(tally.ids[:IDS_SHOWN])}{more}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Checks the flags, and does what they ask for."""
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; see --help.")
    values = flags.FLAGS
    if (values.process_index is None) != (values.process_count is None):
        raise UserError("--process_index and --process_count must be given together, or neither.")
    try:
        if values.source.startswith("mds:"):
            convert(values)
        else:
            encode(values)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command continues.") from None


def encode(values: flags.FlagValues) -> None:
    """Runs `precompute` with the flags."""
    precompute(
        source=values.source,
        out=values.out,
        resolutions=[int(resolution) for resolution in values.resolutions],
        vae=values.vae,
        text_encoder=values.text_encoder,
        posterior=values.posterior,
        batch_size=values.batch_size,
        minimum_side=values.minimum_side,
        caption_tokens=values.caption_tokens,
        clean_captions=values.clean_captions,
        validation=values.validation,
        dtype=values.dtype,
        seed=values.seed,
        workers=values.workers if values.workers is not None else os.cpu_count() or 1,
        process_index=values.process_index,
        process_count=values.process_count,
        dollars_per_hour=values.dollars_per_hour,
        report=partial(print, flush=True),
    )


def convert(values: flags.FlagValues) -> None:
    """Converts latents that the public release has prepared; what they hold was decided then."""
    from micro_dit.data.preparation.mds import convert_mds

    for name in ("posterior", "minimum_side", "caption_tokens", "clean_captions", "validation", "dtype", "seed"):
        if values[name].present:
            raise UserError(f"--{name} means nothing for latents that exist already: leave it out.")
    if not values["text_encoder"].present:
        raise UserError("--text_encoder is missing: name the encoder that made the caption embeddings.")
    started = time.monotonic()
    manifest = convert_mds(
        values.source.removeprefix("mds:"),
        values.out,
        vae=values.vae,
        text_encoder=values.text_encoder,
        resolutions=[int(side) for side in values.resolutions] if values["resolutions"].present else None,
        process_index=values.process_index or 0,
        process_count=values.process_count or 1,
        report=partial(print, flush=True),
    )
    if manifest is not None:
        print(summary(manifest, values.out, time.monotonic() - started))


def define_flags() -> None:
    """Defines the command's flags; not at import, where they could collide with those of another command."""
    flags.DEFINE_string("source", None, "Data set and its argument, e.g. openmoji:food-drink or mds:FOLDER.")
    flags.DEFINE_string("out", None, "Folder to make, or to continue.")
    flags.DEFINE_string("vae", None, "Image encoder: a folder in diffusers' format, or a name on the Hugging Face hub.")
    flags.DEFINE_list("resolutions", ["256"], "Sides of the square images in pixels, e.g. 256,512.")
    flags.DEFINE_string("text_encoder", "minilm", "Name of the text encoder.")
    flags.DEFINE_integer("caption_tokens", None, "Tokens of a caption embedding; default: the encoder's own.")
    flags.DEFINE_bool("clean_captions", True, "Clean captions by the rules of DeepFloyd-IF, twice.")
    flags.DEFINE_enum("posterior", "mean_std", POSTERIORS, "Store the latents' distribution, or one sample of it.")
    flags.DEFINE_integer("minimum_side", None, "Drop images with a smaller side; default: the smallest resolution.")
    flags.DEFINE_float("validation", 0.0, "Share of the examples held out in a split 'validation', by their ids.")
    flags.DEFINE_string("dtype", "float32", "Of the encoders' matrix products: float32 or bfloat16.")
    flags.DEFINE_integer("seed", 0, "Seed of the posterior's samples.")
    flags.DEFINE_integer("batch_size", 32, "Images encoded at once, on all devices together.", lower_bound=1)
    flags.DEFINE_integer("workers", None, "Processes that decode images, 0 for none; default: one for each CPU.")
    flags.DEFINE_integer("process_index", None, "Which of the hosts this is, of those that share the work.")
    flags.DEFINE_integer("process_count", None, "How many hosts share the work; each needs the same folder --out.")
    flags.DEFINE_float("dollars_per_hour", 0.0, "Price of this host, to show what is spent.", lower_bound=0)
    flags.register_validator(
        "resolutions", lambda sides: all(side.isdigit() for side in sides), message="must be numbers, e.g. 256,512"
    )
    flags.mark_flags_as_required(["source", "out", "vae"])


if __name__ == "__main__":
    from micro_dit.cli import run_command  # brings jax

    define_flags()
    app.run(lambda argv: sys.exit(run_command(main, argv)))
