"""Pictures from a trained model: `python -m micro_dit.sample --workdir=runs/mask75 --prompt="red heart"`."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from micro_dit.command import run_command
from micro_dit.data.captions import clean_captions
from micro_dit.diffusion import edm
from micro_dit.diffusion.guidance import guide
from micro_dit.diffusion.samplers import heun, noise_levels
from micro_dit.errors import UserError
from micro_dit.models.dit import DiTConfig, Params, bind

MAX_BATCH = 32  # images at once; more are done in turns


class Generator:
    """Images for captions: the network under guidance, the sampler and the decoder, compiled once for a batch size."""

    def __init__(
        self,
        config: DiTConfig,
        image_encoder: Any,
        *,
        guidance: float,
        steps: int,
        sigma_data: float,
        dtype: Any = jnp.float32,
    ):
        """Sets up a generator; `image_encoder` is an encoders.image.ImageEncoder, the rest as in training."""
        if steps < 1:
            raise UserError(f"{steps} sampling steps: use at least 1.")
        self.config, self.image_encoder = config, image_encoder
        sigmas = noise_levels(steps)

        def latents(params: Params, captions: jax.Array, noise: jax.Array) -> jax.Array:
            F = guide(bind(config, params, dtype), guidance)
            return heun(lambda x, sigma: edm.denoise(F, x, sigma, captions, sigma_data), noise, sigmas)

        self._latents = jax.jit(latents)

    def __call__(self, params: Params, captions: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        """Images for caption embeddings; each depends on its own caption and seed, whatever the batch.

        Args:
            params: the network's.
            captions: (n, L, Y) float.
            seeds: n whole numbers.

        Returns:
            (n, H, W, 3) uint8.
        """
        side, channels = self.config.input_size, self.config.in_channels
        n = len(seeds)
        turns = math.ceil(n / MAX_BATCH)
        size = math.ceil(n / turns)
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        noise = jax.vmap(lambda key: jax.random.normal(key, (side, side, channels)))(keys)
        images = []
        for start in range(0, n, size):
            rows = np.arange(start, start + size) % n  # the last turn is filled up with repeats, which are dropped
            latents = self._latents(params, jnp.asarray(captions[rows], jnp.float32), noise[rows])
            images.append(to_uint8(self.image_encoder.decode(latents)))
        return np.concatenate(images)[:n]


def to_uint8(images: Any) -> np.ndarray:
    """[-1, 1] float → [0, 255] uint8."""
    return np.asarray(jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8))


def main(argv: Sequence[str]) -> None:
    from micro_dit.encoders.image import load_image_encoder
    from micro_dit.encoders.text import load_text_encoder
    from micro_dit.evaluation.grids import caption_grid, save_png
    from micro_dit.training.checkpoint import Checkpoints

    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; see --help.")
    workdir = Path(FLAGS.workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is no work directory of a run (it has no config.json); give the --workdir of one.")
    run = json.loads((workdir / "config.json").read_text())
    params, meta = Checkpoints(workdir).load_params(FLAGS.step)
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["model"].items()}
    config = DiTConfig(**fields)

    sampling, data = run["config"]["sampling"], run["config"]["data"]
    guidance = sampling["guidance"] if FLAGS.guidance is None else FLAGS.guidance
    steps = sampling["steps"] if FLAGS.steps is None else FLAGS.steps
    generator = Generator(
        config, load_image_encoder(data["vae"]), guidance=guidance, steps=steps,
        sigma_data=run["config"]["diffusion"]["sigma_data"],
    )  # fmt: skip
    encoder = load_text_encoder(data["text_encoder"], run["shards"]["caption_tokens"])
    prompts = [prompt for prompt in FLAGS.prompt for _ in range(FLAGS.num)]
    seeds = [FLAGS.seed + i for _ in FLAGS.prompt for i in range(FLAGS.num)]
    captions = clean_captions(FLAGS.prompt, run["shards"].get("caption_cleaning", "none"))  # as those of the shards
    embeddings = np.repeat(encoder.encode(captions), FLAGS.num, axis=0)
    images = generator({name: jnp.asarray(value) for name, value in params.items()}, embeddings, seeds)

    about = {
        "prompt": " | ".join(FLAGS.prompt), "seed": str(FLAGS.seed), "sampler": f"heun, {steps} steps",
        "guidance": str(guidance), "checkpoint": f"step {meta['step']} of {workdir.name}",
        "attribution": run["shards"]["attribution"],
    }  # fmt: skip
    picture = images[0] if len(images) == 1 else caption_grid(images, prompts)
    save_png(picture, FLAGS.out, about)
    print(f"{len(images)} image{'s' * (len(images) > 1)} from step {meta['step']}: {FLAGS.out}")


FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Work directory of the run.", required=True)
    flags.DEFINE_multi_string("prompt", None, "What to draw; may be given several times.", required=True)
    flags.DEFINE_string("out", "sample.png", "Where the picture goes: one image, or a grid of all.")
    flags.DEFINE_integer("num", 1, "Images per prompt.", lower_bound=1)
    flags.DEFINE_float("guidance", None, "Classifier-free guidance; by default that of the config.")
    flags.DEFINE_integer("steps", None, "Sampling steps; by default that of the config.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the first image; the next ones count on.")
    flags.DEFINE_integer("step", None, "Checkpoint to use; by default the newest.")


if __name__ == "__main__":
    define_flags()
    app.run(lambda argv: sys.exit(run_command(main, argv)))
