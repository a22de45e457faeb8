"""Generates images with a trained model: `python -m micro_dit.sample --workdir=runs/mask75 --prompt="red heart"`.

See docs/sampling.md.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from micro_dit.cli import parse_interval, read_prompts, run_command
from micro_dit.diffusion.samplers import SAMPLERS
from micro_dit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def main() -> None:
    """Generates images for the prompts in the flags."""
    from micro_dit.api import GenerationSettings, load
    from micro_dit.images import caption_grid, file_name, save_png

    prompts = [*FLAGS.prompt, *(read_prompts(FLAGS.prompts_file) if FLAGS.prompts_file else [])]
    if not prompts:
        raise UserError('There are no prompts. Set --prompt or --prompts_file. --prompt="" samples unconditionally.')
    out = Path(FLAGS.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out={FLAGS.out} does not end in .png. Set --out to a file such as sample.png.")
    interval = parse_interval(FLAGS.guidance_interval)
    model = load(FLAGS.workdir, FLAGS.step, FLAGS.batch_size, FLAGS.params)
    model.warn = lambda text: print(f"warning: {text}", file=sys.stderr)
    weak = None
    if FLAGS.autoguidance:
        by_step = FLAGS.autoguidance.isdecimal()
        weak = load(FLAGS.workdir, int(FLAGS.autoguidance)) if by_step else load(FLAGS.autoguidance)
    settings = GenerationSettings(
        FLAGS.num, FLAGS.seed, FLAGS.steps, FLAGS.guidance, FLAGS.sampler, interval, FLAGS.path_drop,
        FLAGS.negative_prompt, weak, read_image(FLAGS.image), FLAGS.strength, read_image(FLAGS.mask),
    )  # fmt: skip
    images = model.generate(prompts, settings, progress=True)

    metadata = model.png_metadata(settings, FLAGS.image, FLAGS.mask)
    sampled = [(prompt, FLAGS.seed + i) for prompt in prompts for i in range(FLAGS.num)]
    for number, (image, (prompt, seed)) in enumerate(zip(images, sampled, strict=True)):
        path = out if len(images) == 1 else out.with_suffix("") / file_name(number, prompt, seed)
        save_png(image, path, {"prompt": prompt, "seed": str(seed)} | metadata)
    also = ""
    if len(images) > 1:
        pixels = np.stack([np.asarray(image) for image in images])
        grid = caption_grid(pixels, [prompt or "–" for prompt, _ in sampled])
        seeds = {"seed": f"{FLAGS.seed} to {FLAGS.seed + FLAGS.num - 1}" if FLAGS.num > 1 else str(FLAGS.seed)}
        save_png(grid, out, {"prompt": " | ".join(prompts)} | seeds | metadata)
        also = f" (grid) and {out.with_suffix('')}/ (one file per image)"
    print(f"{len(images)} image{'s' * (len(images) > 1)} from {model.about.where}: {out}{also}")


def read_image(path: str) -> "Image | None":
    """Reads an image file as RGB. Returns None if the path is empty; raises UserError if the file can't be read."""
    from PIL import Image, UnidentifiedImageError

    if not path:
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise UserError(f"The image {path} can't be read ({error}). Check --image and --mask.") from error


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Work directory of a run, or a model folder.", required=True)
    flags.DEFINE_multi_string("prompt", [], "A prompt. Repeat the flag for several prompts.")
    flags.DEFINE_string("prompts_file", "", "Text file with one prompt per line.")
    flags.DEFINE_string(
        "out",
        "sample.png",
        "Output file (.png). Several images are written to it as a grid, and to a folder of the same name one by one.",
    )
    flags.DEFINE_integer("num", 1, "Number of images per prompt.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the first image of each prompt. Image i has the seed SEED + i.")
    flags.DEFINE_enum("sampler", "heun", list(SAMPLERS), "heun has two network calls per step, the others have one.")
    flags.DEFINE_integer("steps", None, "Number of sampler steps; by default the model's.")
    flags.DEFINE_float("guidance", None, "Guidance scale; by default the model's. 1 turns guidance off.")
    flags.DEFINE_string("guidance_interval", "", "low,high: noise levels between which guidance is applied.")
    flags.DEFINE_bool("path_drop", None, "Path-drop guidance, for models with fusion; by default the model's setting.")
    flags.DEFINE_string("negative_prompt", "", "Prompt that guidance steers away from, instead of the empty prompt.")
    flags.DEFINE_string(
        "autoguidance", "", "Weaker model that guidance steers away from: a step of this run, or a folder."
    )
    flags.DEFINE_string("image", "", "Start image.")
    flags.DEFINE_string("mask", "", "Mask image. The start image is resampled where the mask is white.")
    flags.DEFINE_float(
        "strength", None, "How much of the start image is resampled, from 0 to 1; by default 0.6, or 1 with a mask."
    )
    flags.DEFINE_integer("batch_size", 4, "Number of images per batch. Images do not depend on it.")
    flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest.")
    flags.DEFINE_enum("params", None, ["ema", "raw"], "Weights; by default ema if the checkpoint has EMA weights.")


if __name__ == "__main__":
    run_command(main, define_flags)
