"""Pictures from a trained model: `python -m micro_dit.sample --workdir=runs/mask75 --prompt="red heart"`.

See docs/sampling.md. The work is done by micro_dit/api.py.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from micro_dit.cli import run_command
from micro_dit.diffusion.samplers import SAMPLERS
from micro_dit.errors import UserError

if TYPE_CHECKING:
    from micro_dit.api import About


def main() -> None:
    from micro_dit.api import load
    from micro_dit.images import caption_grid, save_png

    prompts = [*FLAGS.prompt, *(read_prompts(FLAGS.prompts_file) if FLAGS.prompts_file else [])]
    if not prompts:
        raise UserError('there is nothing to draw: give a --prompt (--prompt="" draws anything) or a --prompts_file.')
    out = Path(FLAGS.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out={FLAGS.out} must end in .png; several images also go into a folder of that name.")
    interval = parse_interval(FLAGS.guidance_interval)
    model = load(FLAGS.workdir, FLAGS.step, FLAGS.batch_size, FLAGS.params)
    model.warn = lambda text: print(f"warning: {text}", file=sys.stderr)
    steps = model.about.steps if FLAGS.steps is None else FLAGS.steps
    guidance = model.about.guidance if FLAGS.guidance is None else FLAGS.guidance
    weak = None
    if FLAGS.autoguidance:
        by_step = FLAGS.autoguidance.isdecimal()
        weak = load(FLAGS.workdir, int(FLAGS.autoguidance)) if by_step else load(FLAGS.autoguidance)
    images = model.generate(
        prompts, num=FLAGS.num, seed=FLAGS.seed, steps=steps, guidance=guidance, sampler=FLAGS.sampler,
        guidance_interval=interval, negative_prompt=FLAGS.negative_prompt, autoguidance=weak, progress=True,
        **read_start(FLAGS.image, FLAGS.mask, FLAGS.strength),
    )  # fmt: skip

    settings = png_metadata(
        model.about, sampler=FLAGS.sampler, steps=steps, guidance=guidance, guidance_interval=FLAGS.guidance_interval,
        negative_prompt=FLAGS.negative_prompt, autoguidance=weak.about.where if weak else "",
        image=FLAGS.image, mask=FLAGS.mask, strength="" if FLAGS.strength is None else str(FLAGS.strength),
    )  # fmt: skip
    drawn = [(prompt, FLAGS.seed + i) for prompt in prompts for i in range(FLAGS.num)]
    for number, (image, (prompt, seed)) in enumerate(zip(images, drawn, strict=True)):
        path = out if len(images) == 1 else out.with_suffix("") / file_name(number, prompt, seed)
        save_png(image, path, {"prompt": prompt, "seed": str(seed)} | settings)
    also = ""
    if len(images) > 1:
        grid = caption_grid(np.stack([np.asarray(image) for image in images]), [prompt or "–" for prompt, _ in drawn])
        seeds = {"seed": f"{FLAGS.seed} to {FLAGS.seed + FLAGS.num - 1}" if FLAGS.num > 1 else str(FLAGS.seed)}
        save_png(grid, out, {"prompt": " | ".join(prompts)} | seeds | settings)
        also = f", and each alone in {out.with_suffix('')}/"
    print(f"{len(images)} image{'s' * (len(images) > 1)} from {model.about.where}: {out}{also}")


def png_metadata(about: "About", *, sampler: str, steps: int, guidance: float, **others: str) -> dict[str, str]:
    """What a picture's file tells besides prompt and seed; nothing of the others that are empty."""
    told = {
        "sampler": f"{sampler}, {steps} steps", "guidance": str(float(guidance)), "checkpoint": about.where,
        "config": about.config_hash, "attribution": about.source,
    }  # fmt: skip
    return {name: value for name, value in (told | others).items() if value}


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file, without blank ones.

    Raises:
        UserError: the file can't be read, or has no prompt in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"the prompts file {path} can't be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompts file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"the prompts file {path} is empty: write a prompt on each line.")
    return prompts


def parse_interval(text: str) -> tuple[float, float] | None:
    """Two noise levels from 'low,high'; None from nothing."""
    if not text:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise UserError(f"--guidance_interval={text}: give two noise levels, as in 0.3,5.") from error
    return low, high


def read_start(image: str, mask: str, strength: float | None) -> dict[str, Any]:
    """What `Model.generate` takes to start from a picture."""
    return {"image": read_image(image), "mask": read_image(mask), "strength": strength}


def read_image(path: str) -> Any:
    """A picture from a file; None without one."""
    from PIL import Image, UnidentifiedImageError

    if not path:
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise UserError(f"the image {path} can't be read ({error}).") from error


def file_name(number: int, prompt: str, seed: int) -> str:
    """The file of one of several images."""
    words = re.sub(r"\W+", "_", prompt).strip("_")[:40]
    return f"{number:03}_{words or 'unconditional'}_seed_{seed}.png"


FLAGS = flags.FLAGS


def define_flags() -> None:
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
