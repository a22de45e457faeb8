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
    """Samples the prompts that the flags name."""
    from micro_dit.api import GenerationSettings, load
    from micro_dit.images import caption_grid, file_name, save_png

    prompts = [*FLAGS.prompt, *(read_prompts(FLAGS.prompts_file) if FLAGS.prompts_file else [])]
    if not prompts:
        raise UserError('there is nothing to draw: give a --prompt (--prompt="" draws anything) or a --prompts_file.')
    out = Path(FLAGS.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out={FLAGS.out} must end in .png; several images also go into a folder of that name.")
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
        also = f", and each alone in {out.with_suffix('')}/"
    print(f"{len(images)} image{'s' * (len(images) > 1)} from {model.about.where}: {out}{also}")


def read_image(path: str) -> "Image | None":
    """Reads an image file; returns None without a path, and raises UserError if the file can't be read."""
    from PIL import Image, UnidentifiedImageError

    if not path:
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise UserError(f"the image {path} can't be read ({error}).") from error


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Work directory of a run, or a model folder.", required=True)
    flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
    flags.DEFINE_string("prompts_file", "", "A text file with a prompt on each line.")
    flags.DEFINE_string("out", "sample.png", "Where the picture goes; several as a grid, and in a folder each alone.")
    flags.DEFINE_integer("num", 1, "Images per prompt.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of a prompt's first image; the next ones count on.")
    flags.DEFINE_enum("sampler", "heun", list(SAMPLERS), "heun calls the network twice a step; euler is DDIM.")
    flags.DEFINE_integer("steps", None, "Sampling steps; by default the model's.")
    flags.DEFINE_float("guidance", None, "Scale of guidance, 1 for none; by default the model's.")
    flags.DEFINE_string("guidance_interval", "", "low,high: noise levels between which there is guidance.")
    flags.DEFINE_bool("path_drop", None, "Path-drop guidance, for models with fusion; by default the model's setting.")
    flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
    flags.DEFINE_string("autoguidance", "", "A weaker model to lead away from: a step of this run, or another folder.")
    flags.DEFINE_string("image", "", "A picture to start from.")
    flags.DEFINE_string("mask", "", "A picture: only where it is white, the image is drawn anew.")
    flags.DEFINE_float("strength", None, "How much of the image is drawn anew, 0 to 1; by default 0.6, with a mask 1.")
    flags.DEFINE_integer("batch_size", 4, "Images at once; an image does not depend on how many there are.")
    flags.DEFINE_integer("step", None, "Checkpoint to use; by default the newest.")
    flags.DEFINE_enum("params", None, ["ema", "raw"], "ema, the default where there is a moving average, or raw.")


if __name__ == "__main__":
    run_command(main, define_flags)
