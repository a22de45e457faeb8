"""Prepares a data set: every image becomes latents, every caption an embedding, all of it shards.

    python -m micro_dit.precompute --source=openmoji:smileys-emotion --out=shards/faces --resolutions=128 \\
        --vae=micro_dit/assets/openmoji_vae

Training reads only the shards: it runs neither encoder. An input that cannot be used is left out, counted and named in
the manifest; so is one that is used after a change, such as a caption that is cut.
"""

import hashlib
import io
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import app, flags
from PIL import Image, ImageOps

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
SECONDS_BETWEEN_REPORTS = 5.0


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
    """Opens a source and two encoders by name, and writes the shards.

    Args:
        source: name of the source and its argument, as in 'openmoji:smileys-emotion,animals-nature'.
        out: the folder to make.
        resolutions: sides of the square images in pixels; each record holds latents for all of them.
        vae: folder of the image encoder, in diffusers' format.
        text_encoder: name of the text encoder.
        posterior: 'mean_std' stores the distribution of the latent, 'sample' one draw from it (half the size).
        batch_size: images encoded at once.
        examples_per_shard: records in one file.
        minimum_side: images whose smaller side is less are dropped; by default the smallest of the resolutions.
        caption_tokens: tokens of a caption embedding; longer captions are cut.
        seed: of the posterior samples.
        report: called with each line of progress.

    Raises:
        UserError: an argument is wrong, a package is missing, no input is usable, or the disk is full.
    """
    started = time.monotonic()
    if not resolutions or min(resolutions) < 1 or min(batch_size, examples_per_shard) < 1:
        raise UserError("Resolutions, batch size and examples per shard must be positive numbers.")
    if posterior not in POSTERIORS:
        raise UserError(f"Unknown posterior '{posterior}': choose one of {', '.join(POSTERIORS)}.")
    check_vacant(out)
    opened = open_source(source, px=max(resolutions))
    image_encoder = load_image_encoder(vae)
    caption_encoder = load_text_encoder(text_encoder, caption_tokens)
    report(f"{opened.name}: encoders loaded in {time.monotonic() - started:.1f} s")
    return write_shards(
        opened,
        out,
        resolutions,
        image_encoder,
        caption_encoder,
        posterior,
        batch_size,
        examples_per_shard,
        minimum_side or min(resolutions),
        seed,
        report,
    )


def write_shards(
    source: Source,
    out: str,
    resolutions: Sequence[int],
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
    posterior: str,
    batch_size: int,
    examples_per_shard: int,
    minimum_side: int,
    seed: int,
    report: Report,
) -> Manifest:
    """Source → encoders → shards; the arguments are those of `precompute`, opened."""
    resolutions = sorted(set(resolutions))
    for resolution in resolutions:
        if resolution % image_encoder.downsample:
            raise UserError(
                f"Resolution {resolution} does not suit the image encoder {image_encoder.name}: "
                f"choose a multiple of {image_encoder.downsample}."
            )
    vae = ImageEncoderInfo(
        image_encoder.name, image_encoder.fingerprint, image_encoder.channels, image_encoder.downsample
    )
    text = TextEncoderInfo(text_encoder.name, text_encoder.fingerprint, text_encoder.tokens, text_encoder.channels)
    fields = record_fields(resolutions, posterior, vae, text)
    dropped: dict[str, Tally] = {}
    altered: dict[str, Tally] = {}
    started = time.monotonic()

    with ShardWriter(out, source.splits, fields, examples_per_shard) as writer:
        for split in source.splits:
            examples = source.examples(split)
            progress = Progress(split, len(examples), report)
            for batch in prepared_batches(examples, resolutions, minimum_side, batch_size):
                for image in batch:
                    for reasons, named in ((dropped, image.problem and [image.problem]), (altered, image.changes)):
                        for reason in named or ():
                            reasons.setdefault(reason, Tally()).add(image.id)
                usable = [image for image in batch if not image.problem]
                for record in encode_batch(usable, resolutions, image_encoder, text_encoder, posterior, batch_size, seed):
                    writer.write(split, record)
                progress.advance(len(batch))
        manifest = Manifest(
            source=source.name,
            attribution=source.attribution,
            resolutions=tuple(resolutions),
            posterior=posterior,
            vae=vae,
            text_encoder=text,
            fields=fields,
            dropped=dropped,
            altered=altered,
        )
        manifest = writer.publish(manifest)
    return manifest
