"""Trains the small image autoencoder of the demo on OpenMoji.

    python -m micro_dit.encoders.train_vae --out=/tmp/openmoji_vae --minutes=45

An AutoencoderKL with 8× downsampling and 8 latent channels learns 64-pixel crops of the 'train' split at 128 pixels.
The loss is L1 on pixels and on their differences, half the squared error and a small Kullback-Leibler term, without
an adversary or a perceptual network: flat drawings need neither. What is written are the moving averages of the
weights, every few minutes and at the end, in diffusers' format and float16, with the latents' mean and standard
deviation on training images, so that normalized latents have a standard deviation of 0.9.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from micro_dit.cli import run_command
from micro_dit.data.sources.openmoji import OpenMoji
from micro_dit.encoders.autoencoder import AutoencoderConfig, AutoencoderKL
from micro_dit.encoders.image import ImageEncoder, load_parameters, save_autoencoder
from micro_dit.encoders.weights import Parameters
from micro_dit.errors import UserError

PIXELS = 128
CROP = 64
CONFIG = AutoencoderConfig(
    block_out_channels=(16, 24, 48, 96),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=4,
    sample_size=PIXELS,
    scaling_factor=0.9,  # standard deviation of the normalized latents
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
)
WARMUP_STEPS = 100
EMA_DECAY = 0.998
EDGE_WEIGHT, SQUARED_WEIGHT, KL_WEIGHT = 1.0, 0.5, 3e-4
# The last part of the training sees whole images: group norms then have the statistics that they will have in use.
WHOLE_IMAGES_FROM = 0.75
WEIGHT_DTYPE = np.float16


def make_optimizer() -> optax.GradientTransformation:
    """Muon for the convolutions, each taken as a matrix to its output channels, and Adam for the rest.

    Jordan et al., "Muon" (2024), with the update sizes of Liu et al., "Muon is Scalable" (2025). In trials of equal
    CPU time it was well ahead of Adam. The learning rate is applied by the train step.
    """

    def as_matrices(parameters: Parameters) -> Any:
        as_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
        return jax.tree.map(lambda leaf: as_matrix if leaf.ndim == 4 else None, parameters)

    muon = optax.contrib.muon(-1.0, consistent_rms=0.2, adam_b2=0.99, muon_weight_dimension_numbers=as_matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def reconstruction_loss(parameters: Parameters, images: jax.Array, key: jax.Array, graph: nnx.GraphDef) -> jax.Array:
    """The training loss of images (B, h, w, 3) in [-1, 1], with one latent sample each."""
    model = nnx.merge(graph, parameters)
    mean, log_variance = model.encode(images)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = model.decode(latents) - images
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()
    return jnp.abs(error).mean() + EDGE_WEIGHT * edges + SQUARED_WEIGHT * (error**2).mean() + KL_WEIGHT * kl


def train_step(
    state: dict,
    images: jax.Array,
    step: jax.Array,
    learning_rate: jax.Array,
    key: jax.Array,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
) -> tuple[dict, jax.Array]:
    """One optimizer step and one step of the moving averages.

    Args:
        state: {'parameters', 'ema', 'optimizer'}; donated.
        images: uint8 (B, h, w, 3).
        step: Number of steps before this one.
        learning_rate: Its learning rate.
        key: Random key of the whole run.
        graph: The model without its parameters.
        optimizer: From `make_optimizer`.
    """
    pixels = images.astype(jnp.float32) / 127.5 - 1
    noise_key = jax.random.fold_in(key, step)
    loss, gradient = jax.value_and_grad(reconstruction_loss)(state["parameters"], pixels, noise_key, graph)
    update, moments = optimizer.update(gradient, state["optimizer"], state["parameters"])
    parameters = jax.tree.map(lambda p, u: p - learning_rate * u, state["parameters"], update)
    decay = jnp.minimum(EMA_DECAY, (1 + step) / (10 + step))  # the first steps are soon forgotten
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], parameters)
    return {"parameters": parameters, "ema": ema, "optimizer": moments}, loss


def inked_crops(
    images: np.ndarray, ink: list[np.ndarray], rng: np.random.Generator, count: int, size: int
) -> np.ndarray:
    """Draws random crops that contain something, mirrored and turned.

    Args:
        images: uint8 (n, PIXELS, PIXELS, 3).
        ink: For each image the (row, column) pairs of pixels that are not white, from `find_ink`.
        rng: Source of randomness.
        count: Number of crops.
        size: Their side in pixels.

    Returns:
        uint8 (count, size, size, 3).
    """
    crops = np.empty((count, size, size, 3), np.uint8)
    for crop in crops:
        index = rng.integers(len(images))
        # A crop around a random inked pixel, which may lie anywhere in it, pushed back inside the image.
        corner = ink[index][rng.integers(len(ink[index]))] - rng.integers(size, size=2)
        row, column = np.clip(corner, 0, PIXELS - size)
        drawn = images[index, row : row + size, column : column + size]
        drawn = np.rot90(drawn, int(rng.integers(4)))
        crop[...] = drawn[::-1] if rng.integers(2) else drawn
    return crops


def find_ink(images: np.ndarray) -> list[np.ndarray]:
    """For each uint8 image the (row, column) of its non-white pixels on a grid of 4 pixels; (0, 0) if it has none."""
    inked = np.any(images[:, ::4, ::4] < 250, axis=-1)
    return [4 * np.argwhere(image) if image.any() else np.zeros((1, 2), int) for image in inked]


def learning_rate_at(progress: float, step: int, peak: float) -> float:
    """Linear warm-up in steps, then a cosine to 1% over the progress from 0 to 1 (of the time or of the steps)."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1))
    return peak * min(1, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * cosine)


def measure_latents(encoder: ImageEncoder, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of sampled latents of uint8 images, by the encoder's own scaling."""
    sums = []
    for batch in _batches(images):
        mean, std = (np.asarray(value, np.float64) for value in encoder.encode(batch))
        sums.append([mean.mean((0, 1, 2)), (mean**2 + std**2).mean((0, 1, 2)), np.full(mean.shape[-1], len(batch))])
    first, second, counts = np.moveaxis(np.array(sums), 1, 0)
    average = (first * counts).sum(0) / counts.sum(0)
    return average, np.sqrt((second * counts).sum(0) / counts.sum(0) - average**2)


def normalize_latents(parameters: Parameters, images: np.ndarray) -> AutoencoderConfig:
    """The configuration with `latents_mean` and `latents_std` measured on uint8 images."""
    unscaled = dataclasses.replace(CONFIG, scaling_factor=1.0)
    mean, std = measure_latents(ImageEncoder(unscaled, parameters, "unscaled"), images)
    return dataclasses.replace(CONFIG, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))


def reconstruct(encoder: ImageEncoder, images: np.ndarray) -> np.ndarray:
    """uint8 images (n, h, w, 3) through the mean latents and back."""
    decoded = [np.asarray(encoder.decode(encoder.encode(batch)[0])) for batch in _batches(images)]
    return np.round((np.concatenate(decoded) + 1) * 127.5).astype(np.uint8)


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio (n,) in decibels of pairs of uint8 images."""
    squared = (images.astype(np.float32) - others.astype(np.float32)) ** 2
    return 10 * np.log10(255**2 / np.maximum(squared.mean((1, 2, 3)), 1e-3))


def comparison(images: np.ndarray, reconstructions: np.ndarray, columns: int = 8) -> np.ndarray:
    """One uint8 picture: rows of originals, each above the row of its reconstructions, 4 gray pixels apart."""
    rows = []
    for start in range(0, len(images) - columns + 1, columns):
        for part in (images, reconstructions):
            tiles = np.pad(part[start : start + columns], ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=220)
            rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows)


def _batches(images: np.ndarray, size: int = 16) -> list[np.ndarray]:
    return [images[i : i + size].astype(np.float32) / 127.5 - 1 for i in range(0, len(images), size)]


def train(
    out: str,
    minutes: float | None,
    steps: int | None,
    seed: int,
    batch_size: int,
    learning_rate: float,
    init: str | None = None,
    report_seconds: float = 300,
) -> dict:
    """Trains, writes the autoencoder to `out`, and returns what `metrics.json` there holds.

    Args:
        out: Folder to write.
        minutes: Wall time to train for, or None.
        steps: Number of steps, or None. Exactly one of both is given.
        seed: Seed of initialization, crops and latent noise.
        batch_size: Crops in a step.
        learning_rate: Peak learning rate.
        init: Folder of an autoencoder of the same shape to go on from; None starts from random weights.
        report_seconds: Time between two evaluations and interim writes.
    """
    if (minutes is None) == (steps is None):
        raise UserError("The length of the training is not clear: give either --minutes or --steps.")
    source = OpenMoji(px=PIXELS)
    images = source.pixels("train")
    held_out = np.concatenate([source.pixels("validation"), source.pixels("compositions")])
    watched = held_out[:: max(1, len(held_out) // 48)]
    ink = find_ink(images)

    graph, initial = nnx.split(AutoencoderKL(CONFIG, rngs=nnx.Rngs(seed)))
    parameters = jax.tree.map(jnp.asarray, load_parameters(init, CONFIG) if init else nnx.to_pure_dict(initial))
    optimizer = make_optimizer()
    state = {
        "parameters": parameters,
        "ema": jax.tree.map(jnp.copy, parameters),  # a copy, as the state is donated
        "optimizer": optimizer.init(parameters),
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    print(f"{len(images)} training images, {len(held_out)} held out, {count:,} parameters", flush=True)
    step_function = jax.jit(functools.partial(train_step, graph=graph, optimizer=optimizer), donate_argnums=0)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)

    started, cpu_started = time.monotonic(), time.process_time()
    last_report, step, progress = started, 0, 0.0
    while progress < 1:
        rate = learning_rate_at(progress, step, learning_rate)
        size = CROP if progress < WHOLE_IMAGES_FROM else PIXELS
        crops = inked_crops(images, ink, rng, max(1, batch_size * CROP**2 // size**2), size)  # as many pixels
        state, loss = step_function(state, crops, jnp.int32(step), jnp.float32(rate), key)
        step += 1
        loss.block_until_ready()  # the clock below is the schedule
        now = time.monotonic()
        progress = step / steps if steps else (now - started) / (60 * minutes)  # type: ignore[operator]
        if now - last_report > report_seconds or step in (1, 100):
            watched_psnr = math.nan
            if step > 100:
                encoder = ImageEncoder(normalize_latents(state["ema"], images[::32]), state["ema"], "interim")
                save_autoencoder(out, encoder.config, state["ema"], WEIGHT_DTYPE)
                watched_psnr = float(psnr(watched, reconstruct(encoder, watched)).mean())
            speed = step / (now - started)
            left = (now - started) * (1 - progress) / progress / 60
            print(
                f"step {step}  loss {float(loss):.4f}  held-out PSNR {watched_psnr:.2f} dB  {speed:.2f} steps/s  "
                f"{(now - started) / 60:.1f} min ({(time.process_time() - cpu_started) / 60:.1f} CPU-min), "
                f"{left:.1f} min left",
                flush=True,
            )
            last_report = time.monotonic()

    trained_minutes, cpu_minutes = (time.monotonic() - started) / 60, (time.process_time() - cpu_started) / 60
    # What is reported is what a reader of the float16 file gets.
    rounded = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, WEIGHT_DTYPE), jnp.float32), state["ema"])
    encoder = ImageEncoder(normalize_latents(rounded, images[::4]), rounded, "final")
    save_autoencoder(out, encoder.config, rounded, WEIGHT_DTYPE)
    reconstructions = reconstruct(encoder, held_out)
    quality = psnr(held_out, reconstructions)
    metrics = {
        "command": " ".join(["python -m micro_dit.encoders.train_vae", *sys.argv[1:]]),
        "data": source.attribution,
        "pixels": PIXELS,
        "parameters": count,
        "steps": step,
        "wall_minutes": round(trained_minutes, 1),
        "cpu_minutes": round(cpu_minutes, 1),
        "held_out_images": len(held_out),
        "held_out_psnr_mean": round(float(quality.mean()), 2),
        "held_out_psnr_worst_tenth": round(float(np.quantile(quality, 0.1)), 2),
        "train_psnr_mean": round(float(psnr(images[::22], reconstruct(encoder, images[::22])).mean()), 2),
        "fingerprint": encoder.fingerprint,
    }
    (Path(out) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    from PIL import Image

    shown = np.linspace(0, len(held_out) - 1, 32).astype(int)
    Image.fromarray(comparison(held_out[shown], reconstructions[shown])).save(Path(out) / "reconstructions.png")
    print(json.dumps(metrics, indent=2), flush=True)
    return metrics


def main(argv: Sequence[str]) -> None:
    """Runs `train` with the flags."""
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; see --help.")
    values = flags.FLAGS
    train(
        values.out, values.minutes, values.steps, values.seed, values.batch_size, values.learning_rate, init=values.init
    )


def define_flags() -> None:
    """Defines the command's flags; not at import, where they could collide with those of another command."""
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_float("minutes", None, "Wall time to train for.")
    flags.DEFINE_integer("steps", None, "Number of steps, instead of --minutes.")
    flags.DEFINE_integer("seed", 0, "Seed of initialization, crops and latent noise.")
    flags.DEFINE_integer("batch_size", 8, "Crops in a step.")
    flags.DEFINE_float("learning_rate", 6e-3, "Peak learning rate.")
    flags.DEFINE_string("init", None, "Folder of an autoencoder to go on from.")


if __name__ == "__main__":
    define_flags()
    app.run(lambda argv: sys.exit(run_command(main, argv)))
