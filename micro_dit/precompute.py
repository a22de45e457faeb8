"""Prepares a data set: every image becomes latents, every caption an embedding, and both go into shards.

    python -m micro_dit.precompute --source=openmoji:smileys-emotion --resolutions=128 \\
        --vae=micro_dit/assets/openmoji_vae --out=shards/smileys

Training reads the shards and runs neither encoder. An input that cannot be used is left out, counted, and named in the
manifest; one that is used after a change, such as a caption that was cut, is counted and named there too.
"""

import hashlib
import io
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from absl import app, flags
from PIL import Image, ImageOps

from micro_dit.command import run_command
from micro_dit.data.shards import (
    POSTERIORS,
    ImageEncoderInfo,
    Manifest,
    Record,
    ShardWriter,
    Tally,
    TextEncoderInfo,
    check_vacant,
    record_fields,
)
from micro_dit.data.sources import Example, Source, open_source
from micro_dit.encoders.image import ImageEncoder, load_image_encoder
from micro_dit.encoders.text import TextEncoder, load_text_encoder
from micro_dit.errors import UserError

Report = Callable[[str], None]

DECODE_THREADS = 4
IMAGES_AHEAD = 64  # decoded while the encoder is busy
SECONDS_BETWEEN_REPORTS = 5.0
IDS_SHOWN = 5  # in the summary; the manifest names more


def precompute(
    source: str,
    out: str,
    resolutions: Sequence[int],
    vae: str,
    text_encoder: str = "minilm",
    posterior: str = "mean_std",
    batch_size: int = 32,
    examples_per_shard: int = 4096,
    minimum_side: int | None = None,
    caption_tokens: int = 32,
    seed: int = 0,
    report: Report = print,
) -> Manifest:
    """Opens a source and two encoders by name, and writes a folder of shards.

    Args:
        source: name of the source and its argument, as in 'openmoji:smileys-emotion,animals-nature'.
        out: the folder to make.
        resolutions: sides of the square images in pixels; a record holds the latents of all of them.
        vae: folder of the image encoder, in diffusers' format.
        text_encoder: name of the text encoder.
        posterior: 'mean_std' stores the distribution of the latents, 'sample' one draw from it, in half the space.
        batch_size: images encoded at once.
        examples_per_shard: records in a file.
        minimum_side: images with a smaller side are dropped; by default the smallest of the resolutions, so that
            images in between are enlarged, and counted.
        caption_tokens: tokens of a caption embedding; longer captions are cut, and counted.
        seed: of the posterior's samples; each depends on it and on the example's id alone.
        report: called with each line of progress.

    Returns:
        The manifest of the shards.

    Raises:
        UserError: an argument is wrong, a package is missing, no input is usable, or the disk is full.
    """
    started = time.monotonic()
    if not resolutions or min(*resolutions, batch_size, examples_per_shard) < 1:
        raise UserError("Resolutions, batch size and examples per shard must be positive: correct the one that is not.")
    if posterior not in POSTERIORS:
        raise UserError(f"Unknown posterior '{posterior}': choose one of {', '.join(POSTERIORS)}.")
    check_vacant(out)
    opened = open_source(source, px=max(resolutions))
    image_encoder = load_image_encoder(vae)
    caption_encoder = load_text_encoder(text_encoder, caption_tokens)
    report(f"loaded {image_encoder.name} and {caption_encoder.name} in {time.monotonic() - started:.1f} s")
    manifest = write_shards(
        opened,
        out,
        resolutions,
        image_encoder,
        caption_encoder,
        posterior=posterior,
        batch_size=batch_size,
        examples_per_shard=examples_per_shard,
        minimum_side=min(resolutions) if minimum_side is None else minimum_side,
        seed=seed,
        report=report,
    )
    report(summary(manifest, out, time.monotonic() - started))
    return manifest


def write_shards(
    source: Source,
    out: str,
    resolutions: Sequence[int],
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
    *,
    posterior: str,
    batch_size: int,
    examples_per_shard: int,
    minimum_side: int,
    seed: int,
    report: Report,
) -> Manifest:
    """Source → encoders → shards; the arguments are `precompute`'s, opened."""
    resolutions = sorted(set(resolutions))
    for resolution in resolutions:
        if resolution % image_encoder.downsample:
            raise UserError(f"Resolution {resolution} is not a multiple of {image_encoder.downsample}: choose another.")
    vae = ImageEncoderInfo(
        image_encoder.name, image_encoder.fingerprint, image_encoder.channels, image_encoder.downsample
    )
    text = TextEncoderInfo(text_encoder.name, text_encoder.fingerprint, text_encoder.tokens, text_encoder.channels)
    fields = record_fields(resolutions, posterior, vae, text)
    dropped: dict[str, Tally] = defaultdict(Tally)
    altered: dict[str, Tally] = defaultdict(Tally)

    with ShardWriter(out, source.splits, fields, examples_per_shard) as writer:
        for split in source.splits:
            usable = prepare_split(source, split, resolutions, minimum_side, dropped, altered, report)
            while batch := list(islice(usable, batch_size)):
                latents = encode_images(batch, resolutions, image_encoder, posterior, batch_size, seed)
                captions = encode_captions(batch, text_encoder, altered)
                for image, arrays, caption in zip(batch, latents, captions, strict=True):
                    if all(np.isfinite(array).all() for array in arrays.values()):
                        writer.write(split, Record(image.id, image.caption, arrays | {"caption_embedding": caption}))
                    else:
                        dropped["latents are not finite in float16"].add(image.id)
        manifest = Manifest(
            source=source.name,
            attribution=source.attribution,
            resolutions=tuple(resolutions),
            posterior=posterior,
            vae=vae,
            text_encoder=text,
            fields=fields,
            dropped=dict(dropped),
            altered=dict(altered),
        )
        if writer.records == 0:
            reasons = ", ".join(f"{reason} ({tally.count})" for reason, tally in dropped.items()) or "it is empty"
            raise UserError(f"No example of {source.name} is usable: {reasons}.")
        return writer.publish(manifest)


class Prepared(NamedTuple):
    """An example on its way to the encoders."""

    id: str
    caption: str
    images: dict[int, np.ndarray]  # by resolution r, (r, r, 3) uint8
    altered: tuple[str, ...] = ()
    dropped: str | None = None  # the reason, if it cannot be used


def prepare_split(
    source: Source,
    split: str,
    resolutions: Sequence[int],
    minimum_side: int,
    dropped: dict[str, Tally],
    altered: dict[str, Tally],
    report: Report,
) -> Iterator[Prepared]:
    """Yields the usable examples of a split in order, and counts the others."""
    examples = source.examples(split)
    progress = Progress(split, len(examples), report)
    prepare = partial(prepare_example, resolutions=resolutions, minimum_side=minimum_side)
    for prepared in map_in_threads(lambda index: prepare(examples[index]), len(examples)):
        if prepared.dropped:
            dropped[prepared.dropped].add(prepared.id)
        else:
            for change in prepared.altered:
                altered[change].add(prepared.id)
            yield prepared
        progress.advance()


def prepare_example(example: Example, resolutions: Sequence[int], minimum_side: int) -> Prepared:
    """Decodes an image and crops it at every resolution; an image that cannot be used says why."""
    drop = partial(Prepared, example.id, example.caption, {}, ())
    try:
        example.caption.encode()
    except UnicodeEncodeError:
        return drop("caption is not valid Unicode")
    try:
        image = decode_image(example.image)
    except Exception as error:  # a broken file makes Pillow raise nearly anything, from SyntaxError to struct.error
        return drop(f"image cannot be decoded ({type(error).__name__})")
    if min(image.size) < minimum_side:
        return drop(f"image is smaller than {minimum_side} px")
    images = {resolution: center_crop(image, resolution) for resolution in resolutions}
    altered = tuple(f"image was enlarged to {side} px" for side in resolutions if min(image.size) < side)
    return Prepared(example.id, example.caption, images, altered)


def decode_image(data: bytes) -> Image.Image:
    """Decodes an image file to RGB, turned upright by its EXIF orientation, on white where it is transparent."""
    image: Image.Image = Image.open(io.BytesIO(data))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """Resizes the smaller side to `resolution` (bicubic), then crops the middle: (resolution, resolution, 3) uint8."""
    width, height = image.size
    smaller = min(width, height)
    width, height = width * resolution // smaller, height * resolution // smaller
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def encode_images(
    batch: Sequence[Prepared],
    resolutions: Sequence[int],
    encoder: ImageEncoder,
    posterior: str,
    batch_size: int,
    seed: int,
) -> list[dict[str, np.ndarray]]:
    """The latent fields of each image's record, float16."""
    records: list[dict[str, np.ndarray]] = [{} for _ in batch]
    for resolution in resolutions:
        # Always a full batch: the encoder compiles once for each shape.
        pixels = np.zeros((batch_size, resolution, resolution, 3), np.float32)
        for row, image in enumerate(batch):
            pixels[row] = image.images[resolution] / 127.5 - 1
        mean, std = map(np.asarray, encoder.encode(pixels))
        for row, image in enumerate(batch):
            latents = {f"latent_mean_{resolution}": mean[row], f"latent_std_{resolution}": std[row]}
            if posterior == "sample":
                noise = noise_of(f"{seed} {resolution} {image.id}", mean[row].shape)
                latents = {f"latent_sample_{resolution}": mean[row] + std[row] * noise}
            with np.errstate(over="ignore"):  # an overflow becomes infinite, and is looked for before writing
                records[row] |= {name: array.astype(np.float16) for name, array in latents.items()}
    return records


def noise_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise that depends on a name alone, not on the order or the batch of the examples."""
    return np.random.default_rng(list(hashlib.sha256(name.encode()).digest())).standard_normal(shape)


def encode_captions(batch: Sequence[Prepared], encoder: TextEncoder, altered: dict[str, Tally]) -> np.ndarray:
    """Caption embeddings (B, L, Y) float16; counts the captions that are cut or empty."""
    captions = [image.caption for image in batch]
    for image, tokens in zip(batch, encoder.count_tokens(captions), strict=True):
        if tokens > encoder.tokens:
            altered[f"caption was cut to {encoder.tokens} tokens"].add(image.id)
        if not image.caption.strip():
            altered["caption is empty, and trains the unconditional model"].add(image.id)
    return encoder.encode(captions).astype(np.float16)


def map_in_threads(function: Callable[[int], Prepared], count: int) -> Iterator[Prepared]:
    """Yields function(0) … function(count - 1) in order, working a little ahead."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        pending: deque[Future[Prepared]] = deque()
        for index in range(count):
            pending.append(pool.submit(function, index))
            if len(pending) > IMAGES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Progress:
    """Reports how far a split is, how fast, and how long it will take, every few seconds and at its end."""

    def __init__(self, split: str, total: int, report: Report):
        self.split, self.total, self.report = split, total, report
        self.done = 0
        self.started = self.reported = time.monotonic()

    def advance(self) -> None:
        """Counts one example."""
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.reported > SECONDS_BETWEEN_REPORTS:
            rate = self.done / max(now - self.started, 1e-6)
            left = (self.total - self.done) / rate
            self.report(f"{self.split}: {self.done} of {self.total} examples, {rate:.1f} a second, {left:.0f} s left")
            self.reported = now


def summary(manifest: Manifest, out: str, seconds: float) -> str:
    """What was made, what was left out, and what was changed."""
    splits = ", ".join(f"{split} {manifest.records(split)}" for split in manifest.splits)
    lines = [f"{out}: {splits} examples; {manifest.bytes / 1e6:.1f} MB in {seconds:.1f} s"]
    for kind, reasons in (("dropped", manifest.dropped), ("altered", manifest.altered)):
        for reason, tally in reasons.items():
            more = ", …" if tally.count > IDS_SHOWN else ""
            lines.append(f"{kind} {tally.count}: {reason}: {', '.join(tally.ids[:IDS_SHOWN])}{more}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Runs `precompute` with the flags."""
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; see --help.")
    values = flags.FLAGS
    precompute(
        source=values.source,
        out=values.out,
        resolutions=[int(resolution) for resolution in values.resolutions],
        vae=values.vae,
        text_encoder=values.text_encoder,
        posterior=values.posterior,
        batch_size=values.batch_size,
        examples_per_shard=values.examples_per_shard,
        minimum_side=values.minimum_side,
        caption_tokens=values.caption_tokens,
        seed=values.seed,
    )


def define_flags() -> None:
    """Defines the command's flags; not at import, where they could collide with those of another command."""
    flags.DEFINE_string("source", None, "Data set and its argument, e.g. openmoji:smileys-emotion,food-drink.")
    flags.DEFINE_string("out", None, "Folder to make.")
    flags.DEFINE_string("vae", None, "Folder of the image encoder (diffusers' config.json and safetensors).")
    flags.DEFINE_list("resolutions", ["256"], "Sides of the square images in pixels, e.g. 256,512.")
    flags.DEFINE_string("text_encoder", "minilm", "Name of the text encoder.")
    flags.DEFINE_enum("posterior", "mean_std", POSTERIORS, "Store the latents' distribution, or one sample of it.")
    flags.DEFINE_integer("batch_size", 32, "Images encoded at once.", lower_bound=1)
    flags.DEFINE_integer("examples_per_shard", 4096, "Records in a file.", lower_bound=1)
    flags.DEFINE_integer("minimum_side", None, "Drop images with a smaller side; default: the smallest resolution.")
    flags.DEFINE_integer("caption_tokens", 32, "Tokens of a caption embedding; longer captions are cut.")
    flags.DEFINE_integer("seed", 0, "Seed of the posterior's samples.")
    flags.register_validator(
        "resolutions", lambda sides: all(side.isdigit() for side in sides), message="must be numbers, e.g. 256,512"
    )
    flags.mark_flags_as_required(["source", "out", "vae"])


if __name__ == "__main__":
    define_flags()
    app.run(lambda argv: sys.exit(run_command(main, argv)))
