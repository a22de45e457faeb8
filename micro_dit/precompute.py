r"""Prepares a data set: encodes images to latents and captions to embeddings, and writes both to shards.

    python -m micro_dit.precompute --source=openmoji:smileys-emotion --resolutions=128 \
        --vae=micro_dit/assets/openmoji_vae --out=shards/smileys

Training reads only the shards and does not run the encoders. Inputs that cannot be used are dropped, counted, and
listed with the reason in rejects.jsonl. Inputs that are used after a change, such as a truncated caption, are counted.

The parts of the source (one archive, or a few thousand rows of a listing) are processed one by one. To resume an
interrupted run, run the same command again: it processes the remaining parts, and the result is identical to that of an
uninterrupted run. Several hosts can share one output folder: host i of n processes every n-th part, and the host that
finishes last writes the manifest.
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

# Each worker process imports this module, so jax is imported only inside the functions that need it.


def main() -> None:
    """Runs the command."""
    values = flags.FLAGS
    if (values.process_index is None) != (values.process_count is None):
        raise UserError("Set both --process_index and --process_count, or neither.")
    try:
        if values.source.startswith("mds:"):
            convert(values)
        else:
            encode(values)
    except KeyboardInterrupt:
        raise UserError("Interrupted. Run the same command again to resume.") from None


def encode(values: flags.FlagValues) -> None:
    """Runs `make_shards` with the values of the flags."""
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
    """Converts latents that were prepared by the public release, and rejects flags that apply only to encoding."""
    from micro_dit.data.preparation.mds import convert_mds

    for name in ("posterior", "minimum_side", "caption_tokens", "clean_captions", "validation", "dtype", "seed"):
        if values[name].present:
            raise UserError(f"--{name} has no effect with --source=mds:, which converts existing latents. Remove it.")
    if not values["text_encoder"].present:
        raise UserError("Set --text_encoder to the text encoder that computed the caption embeddings.")
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
    """Defines the command's flags. Not done at import time, because other commands define flags of the same names."""
    flags.DEFINE_string("source", None, "Data set and its argument, e.g. openmoji:food-drink or mds:FOLDER.")
    flags.DEFINE_string("out", None, "Output folder. If it is unfinished, the preparation is resumed.")
    flags.DEFINE_string("vae", None, "Image encoder: a folder in Diffusers format, or a model on the Hugging Face Hub.")
    flags.DEFINE_list("resolutions", ["256"], "Sides of the square images in pixels, e.g. 256,512.")
    flags.DEFINE_string("text_encoder", "minilm", "Name of the text encoder.")
    flags.DEFINE_integer("caption_tokens", None, "Tokens per caption embedding. Default: the maximum of the encoder.")
    flags.DEFINE_bool("clean_captions", True, "Clean captions with two passes of the DeepFloyd-IF rules.")
    flags.DEFINE_enum("posterior", "mean_std", POSTERIORS, "Store the mean and std of the latents, or one sample.")
    flags.DEFINE_integer("minimum_side", None, "Drop images with a smaller side. Default: the smallest resolution.")
    flags.DEFINE_float("validation", 0.0, "Fraction of the examples held out in the split 'validation'.")
    flags.DEFINE_string("dtype", "float32", "Dtype of the matrix products of the encoders: float32 or bfloat16.")
    flags.DEFINE_integer("seed", 0, "Seed of the posterior samples.")
    flags.DEFINE_integer("batch_size", 32, "Images per encoder batch, over all devices of this host.", lower_bound=1)
    flags.DEFINE_integer("workers", None, "Processes that decode images; 0 uses threads. Default: one per CPU.")
    flags.DEFINE_integer("process_index", None, "Index of this host, if several hosts share the work.")
    flags.DEFINE_integer("process_count", None, "Number of hosts that share the work and the folder --out.")
    flags.DEFINE_float("dollars_per_hour", 0.0, "Price of this host, to report the cost.", lower_bound=0)
    flags.register_validator(
        "resolutions", lambda sides: all(side.isdigit() for side in sides), message="must be integers, e.g. 256,512"
    )
    flags.mark_flags_as_required(["source", "out", "vae"])


if __name__ == "__main__":
    run_command(main, define_flags)
