"""Training of a small image autoencoder on the OpenMoji drawings.

An AutoencoderKL with 8× downsampling and 8 latent channels is trained on 64-pixel crops of 128-pixel images. The loss
is the sum of L1 on pixels, L1 on differences of neighboring pixels, half the squared error and a small KL term. It has
no adversarial or perceptual term, which flat drawings do not need. The EMA weights are written in diffusers' format as
float16, with the mean and standard deviation of the latents of training images.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

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
# The last part of training uses whole images, so that group norms see the same statistics as at inference.
WHOLE_IMAGES_FROM = 0.75
WEIGHT_DTYPE = np.float16
REPORT_SECONDS = 300.0  # interval between evaluations, which also write the weights


def make_optimizer() -> optax.GradientTransformation:
    """Returns Muon for convolution kernels, reshaped to matrices (h·w·I, O), and Adam for other parameters.

    Muon is from Jordan et al., "Muon" (2024), with the update scale of Liu et al., "Muon is Scalable" (2025). At equal
    CPU time it reached a clearly lower loss than Adam. The learning rate is applied by the train step.
    """

    def as_matrices(parameters: Parameters) -> Any:
        as_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
        return jax.tree.map(lambda leaf: as_matrix if leaf.ndim == 4 else None, parameters)

    muon = optax.contrib.muon(-1.0, consistent_rms=0.2, adam_b2=0.99, muon_weight_dimension_numbers=as_matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def reconstruction_loss(parameters: Parameters, images: jax.Array, key: jax.Array, graph: nnx.GraphDef) -> jax.Array:
    """Computes the training loss of images (B, h, w, 3) in [-1, 1], with one latent sample per image."""
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
    """Runs one optimizer step.

    Args:
        state: {'parameters', 'ema', 'optimizer'}, donated.
        images: (B, h, w, 3) uint8.
        step: () int32, number of steps done.
        learning_rate: () float32.
        key: Base key; the noise key is derived from it and `step`.
        graph: Graph definition of the autoencoder.
        optimizer: Result of `make_optimizer`.

    Returns:
        The new state and the loss.
    """
    pixels = images.astype(jnp.float32) / 127.5 - 1
    noise_key = jax.random.fold_in(key, step)
    loss, gradient = jax.value_and_grad(reconstruction_loss)(state["parameters"], pixels, noise_key, graph)
    update, moments = optimizer.update(gradient, state["optimizer"], state["parameters"])
    parameters = jax.tree.map(lambda p, u: p - learning_rate * u, state["parameters"], update)
    decay = jnp.minimum(EMA_DECAY, (1 + step) / (10 + step))  # small at first, to discount the initial weights
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], parameters)
    return {"parameters": parameters, "ema": ema, "optimizer": moments}, loss


def inked_crops(
    images: np.ndarray, ink: list[np.ndarray], rng: np.random.Generator, count: int, size: int
) -> np.ndarray:
    """Samples crops that contain a random pixel of `ink`, randomly flipped and rotated by multiples of 90 degrees.

    Args:
        images: (n, PIXELS, PIXELS, 3) uint8.
        ink: Result of `find_ink` for these images.
        rng: Random generator.
        count: Number of crops.
        size: Side of a crop in pixels.

    Returns:
        (count, size, size, 3) uint8.
    """
    crops = np.empty((count, size, size, 3), np.uint8)
    for crop in crops:
        index = rng.integers(len(images))
        # The inked pixel is at a random position in the crop, except where the crop is moved to fit into the image.
        corner = ink[index][rng.integers(len(ink[index]))] - rng.integers(size, size=2)
        row, column = np.clip(corner, 0, PIXELS - size)
        rotated = np.rot90(images[index, row : row + size, column : column + size], int(rng.integers(4)))
        crop[...] = rotated[::-1] if rng.integers(2) else rotated
    return crops


def find_ink(images: np.ndarray) -> list[np.ndarray]:
    """Returns the positions of each uint8 image's non-white pixels, on a grid with a spacing of 4 pixels.

    Returns:
        An array (pixels, 2) of rows and columns for each image; [[0, 0]] for a white image.
    """
    inked = np.any(images[:, ::4, ::4] < 250, axis=-1)
    return [4 * np.argwhere(image) if image.any() else np.zeros((1, 2), int) for image in inked]


def learning_rate_at(progress: float, step: int, peak: float) -> float:
    """Returns the learning rate: linear warm-up over WARMUP_STEPS, times a cosine decay to 1% over `progress`.

    `progress` is the fraction, 0 to 1, of the run's time or steps.
    """
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1))
    return peak * min(1, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * cosine)


def measure_latents(encoder: ImageEncoder, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation, each (C,), of latents sampled for uint8 images, in the encoder's scaling."""
    sums = []
    for batch in _batches(images):
        mean, std = (np.asarray(value, np.float64) for value in encoder.encode(batch))
        sums.append([mean.mean((0, 1, 2)), (mean**2 + std**2).mean((0, 1, 2)), np.full(mean.shape[-1], len(batch))])
    first, second, counts = np.moveaxis(np.array(sums), 1, 0)
    average = (first * counts).sum(0) / counts.sum(0)
    return average, np.sqrt((second * counts).sum(0) / counts.sum(0) - average**2)


def normalize_latents(parameters: Parameters, images: np.ndarray) -> AutoencoderConfig:
    """Returns CONFIG with `latents_mean` and `latents_std` measured on uint8 images."""
    unscaled = dataclasses.replace(CONFIG, scaling_factor=1.0)
    mean, std = measure_latents(ImageEncoder(unscaled, parameters, "unscaled"), images)
    return dataclasses.replace(CONFIG, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))


def reconstruct(encoder: ImageEncoder, images: np.ndarray) -> np.ndarray:
    """Encodes uint8 images (n, h, w, 3) to their mean latents, and decodes these."""
    decoded = [np.asarray(encoder.decode(encoder.encode(batch)[0])) for batch in _batches(images)]
    return np.round((np.concatenate(decoded) + 1) * 127.5).astype(np.uint8)


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the peak signal-to-noise ratio, (n,) in decibels, of pairs of uint8 images."""
    squared = (images.astype(np.float32) - others.astype(np.float32)) ** 2
    return 10 * np.log10(255**2 / np.maximum(squared.mean((1, 2, 3)), 1e-3))


def comparison(images: np.ndarray, reconstructions: np.ndarray, columns: int = 8) -> np.ndarray:
    """Returns a uint8 grid of images: each row of originals is above the row of its reconstructions."""
    rows = []
    for start in range(0, len(images) - columns + 1, columns):
        for part in (images, reconstructions):
            tiles = np.pad(part[start : start + columns], ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=220)
            rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows)


def _batches(images: np.ndarray, size: int = 16) -> list[np.ndarray]:
    return [images[i : i + size].astype(np.float32) / 127.5 - 1 for i in range(0, len(images), size)]


@dataclasses.dataclass(frozen=True)
class AutoencoderTraining:
    """The settings of a training run; exactly one of `minutes` and `steps` is set."""

    minutes: float | None = None  # wall time of the training
    steps: int | None = None
    seed: int = 0  # for initialization, crops and latent noise
    batch_size: int = 8  # crops per step
    learning_rate: float = 6e-3  # peak learning rate
    init: str | None = None  # folder of an autoencoder with the same configuration, to initialize from

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise UserError("The length of the training is ambiguous. Set either --minutes or --steps.")

    def progress(self, step: int, seconds: float) -> float:
        """Returns the completed fraction of the run; at 1 or more it ends."""
        return step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or 0))


def train_autoencoder(
    images: np.ndarray, held_out: np.ndarray, out: str, settings: AutoencoderTraining
) -> dict[str, Any]:
    """Trains an autoencoder and writes it to a folder, with a grid of reconstructions.

    Args:
        images: (n, PIXELS, PIXELS, 3) uint8, training images.
        held_out: (m, PIXELS, PIXELS, 3) uint8, images for evaluation.
        out: Folder to write.
        settings: Settings of the run.

    Returns:
        Sizes, times and reconstruction quality, by name.
    """
    graph, initial = nnx.split(AutoencoderKL(CONFIG, rngs=nnx.Rngs(settings.seed)))
    loaded = load_parameters(settings.init, CONFIG) if settings.init else nnx.to_pure_dict(initial)
    parameters = jax.tree.map(jnp.asarray, loaded)
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    print(f"{len(images)} training images, {len(held_out)} held out, {count:,} parameters", flush=True)

    report = InterimReport(out, images[::32], held_out[:: max(1, len(held_out) // 48)])
    ema, steps = fit(graph, parameters, images, settings, report)
    minutes, cpu_minutes = report.minutes()

    # The evaluation uses the float16 weights, because these are the ones in the file.
    rounded = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, WEIGHT_DTYPE), jnp.float32), ema)
    encoder = ImageEncoder(normalize_latents(rounded, images[::4]), rounded, "final")
    save_autoencoder(out, encoder.config, rounded, WEIGHT_DTYPE)
    reconstructions = reconstruct(encoder, held_out)
    shown = np.linspace(0, len(held_out) - 1, 32).astype(int)
    Image.fromarray(comparison(held_out[shown], reconstructions[shown])).save(Path(out) / "reconstructions.png")
    quality = psnr(held_out, reconstructions)
    return {
        "pixels": PIXELS,
        "parameters": count,
        "steps": steps,
        "wall_minutes": round(minutes, 1),
        "cpu_minutes": round(cpu_minutes, 1),
        "held_out_images": len(held_out),
        "held_out_psnr_mean": round(float(quality.mean()), 2),
        "held_out_psnr_worst_tenth": round(float(np.quantile(quality, 0.1)), 2),
        "train_psnr_mean": round(float(psnr(images[::22], reconstruct(encoder, images[::22])).mean()), 2),
        "fingerprint": encoder.fingerprint,
    }


def fit(
    graph: nnx.GraphDef,
    parameters: Parameters,
    images: np.ndarray,
    settings: AutoencoderTraining,
    report: Callable[[int, float, jax.Array, Parameters], None],
) -> tuple[Parameters, int]:
    """Runs the training loop.

    Args:
        graph: Graph definition of the autoencoder.
        parameters: Initial parameters, donated.
        images: (n, PIXELS, PIXELS, 3) uint8.
        settings: Settings of the run.
        report: Called after each step with the number of steps, the completed fraction, the loss and the EMA weights.

    Returns:
        The EMA weights and the number of steps.
    """
    optimizer = make_optimizer()
    state = {
        "parameters": parameters,
        "ema": jax.tree.map(jnp.copy, parameters),  # copied, because a buffer cannot be donated twice
        "optimizer": optimizer.init(parameters),
    }
    step_function = jax.jit(functools.partial(train_step, graph=graph, optimizer=optimizer), donate_argnums=0)
    rng, key = np.random.default_rng(settings.seed), jax.random.key(settings.seed)
    ink = find_ink(images)
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        rate = learning_rate_at(progress, step, settings.learning_rate)
        size = CROP if progress < WHOLE_IMAGES_FROM else PIXELS
        count = max(1, settings.batch_size * CROP**2 // size**2)  # keeps the number of pixels per step
        crops = inked_crops(images, ink, rng, count, size)
        state, loss = step_function(state, crops, jnp.int32(step), jnp.float32(rate), key)
        step += 1
        loss.block_until_ready()  # the schedule depends on the time of finished steps
        progress = settings.progress(step, time.monotonic() - started)
        report(step, progress, loss, state["ema"])
    return state["ema"], step


class InterimReport:
    """Evaluates and writes the EMA weights every REPORT_SECONDS, and prints the progress."""

    def __init__(self, out: str, images: np.ndarray, watched: np.ndarray):
        """Starts the clock.

        Args:
            out: Folder for the weights.
            images: Training images for the statistics of the latents.
            watched: Held-out images for the PSNR.
        """
        self._out, self._images, self._watched = out, images, watched
        self._started = self._last = time.monotonic()
        self._cpu_started = time.process_time()

    def minutes(self) -> tuple[float, float]:
        """Returns wall time and CPU time of this process since the start, in minutes."""
        return (time.monotonic() - self._started) / 60, (time.process_time() - self._cpu_started) / 60

    def __call__(self, step: int, progress: float, loss: jax.Array, ema: Parameters) -> None:
        """Reports if REPORT_SECONDS have passed, and after steps 1 and 100."""
        if time.monotonic() - self._last <= REPORT_SECONDS and step not in (1, 100):
            return
        (minutes, cpu_minutes), watched_psnr = self.minutes(), math.nan
        if step > 100:
            encoder = ImageEncoder(normalize_latents(ema, self._images), ema, "interim")
            save_autoencoder(self._out, encoder.config, ema, WEIGHT_DTYPE)
            watched_psnr = float(psnr(self._watched, reconstruct(encoder, self._watched)).mean())
        print(
            f"step {step}  loss {float(loss):.4f}  held-out PSNR {watched_psnr:.2f} dB  "
            f"{step / (60 * minutes):.2f} steps/s  {minutes:.1f} min ({cpu_minutes:.1f} CPU-min), "
            f"{minutes * (1 - progress) / progress:.1f} min left",
            flush=True,
        )
        self._last = time.monotonic()
