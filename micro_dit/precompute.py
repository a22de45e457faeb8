r"""Prepares a data set: every image becomes latents, every caption an embedding, and both go into shards.

    python -m micro_dit.precompute --source=openmoji:smileys-emotion --resolutions=128 \
        --vae=micro_dit/assets/openmoji_vae --out=shards/smileys

Training reads the shards and runs neither encoder. An input that cannot be used is left out, counted, and named with
the reason in rejects.jsonl; one that is used after a change, such as a caption that was cut, is counted too.

The source's parts (an archive, or some thousand rows of a listing) are made one by one. A run that ended early, however
it ended, continues with the parts that are not done when it is started again; the result is the same. Several hosts
can share a folder: each takes every n-th part, and the last one to finish completes it.
"""

import dataclasses
import os
import time
from functools import partial

from absl import flags

from micro_dit.cli import run_command
from micro_dit.data.preparation.prepare import make_shards, summary
from micro_dit.data.preparation.settings import PreparationSettings
from micro_dit.data.shards import POSTERIORS
from micro_dit.errors import UserError

# Each decoding process imports this module again, so jax is imported only where it is used.


def main() -> None:
    """Checks the flags, and does what they ask for."""
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
    """Runs `make_shards` with the flags."""
    fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(PreparationSettings)}
    make_shards(
        PreparationSettings(**fields | {"resolutions": [int(side) for side in values.resolutions]}),
        values.out,
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
    run_command(main, define_flags)
