"""Samples latents and images from captions and seeds, on one device or many.

Commands, API, previews, evaluation and playground share it: equal captions, seeds and settings give equal pixels.
L caption tokens · Y caption channels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from micro_dit.diffusion import edm
from micro_dit.diffusion.guidance import autoguide, drop_path, extrapolate, guide, scale_at
from micro_dit.diffusion.samplers import SAMPLERS, Denoiser, keep_known, noise_levels, partial_noise_levels, sample
from micro_dit.errors import UserError
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import Params, bind

MAX_BATCH = 32  # images sampled at once


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of a sampler under guidance.

    Attributes:
        steps: Number of sampler steps.
        guidance: Guidance scale; 1 turns guidance off.
        sampler: One of SAMPLERS.
        interval: (low, high) noise levels between which guidance is applied; None applies it at all levels.
        strength: Fraction of the way from noise to image that is sampled; below 1, sampling starts from an image.
        path_drop: Whether guidance leads away from the network without its backbone (path-drop guidance).

    Raises:
        UserError: A setting makes no sense.
    """

    steps: int
    guidance: float = 1.0
    sampler: str = "heun"
    interval: tuple[float, float] | None = None
    strength: float = 1.0
    path_drop: bool = False

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"there is no sampler {self.sampler!r}; choose {', '.join(SAMPLERS)}.")
        if self.steps < 1:
            raise UserError(f"{self.steps} sampling steps: use at least 1.")
        if self.sampler == "dpmpp_2m" and self.steps < 2:
            raise UserError("dpmpp_2m needs the step before: use at least 2 sampling steps, or another sampler.")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            low, high = self.interval
            raise UserError(f"the guidance interval {low:g} to {high:g} is empty; use 0 <= low < high.")
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength:g}: use a number from 0 (the image as it is) to 1.")

    def check(self, config: DiTConfig) -> None:
        """Raises UserError if a network can't be sampled with these settings."""
        if self.path_drop and not config.fusion:
            raise UserError("path-drop guidance needs a network with model.fusion: leave out --path_drop.")

    @property
    def sigmas(self) -> np.ndarray:
        """Noise levels, descending to 0; only 0 at strength 0."""
        if self.strength in (0, 1):
            return noise_levels(self.steps) if self.strength else np.zeros(1)
        return partial_noise_levels(self.steps, self.strength)

    @property
    def calls(self) -> int:
        """Number of calls of the denoiser."""
        steps = len(self.sigmas) - 1
        return 2 * steps - 1 if self.sampler == "heun" and steps else steps


class Inputs(NamedTuple):
    """Inputs of the denoiser that stay the same in all steps."""

    params: Params
    captions: Any  # (B, L, Y) float32
    negative: Any  # (L, Y) float32, embedding that guidance leads away from; zeros without a negative prompt
    weak: Params | None = None  # parameters of the weak network of autoguidance


Branches = Literal["conditional", "unconditional", "both", "path_drop"]


class Generator:
    """Samples latents and images with a network.

    The guided denoiser is compiled once per batch size and branches of guidance, for all other settings.
    """

    def __init__(
        self, config: DiTConfig, *, sigma_data: float, dtype: Any = jnp.float32, sharding: Sharding | None = None
    ):
        """Sets up the denoiser of a network.

        Args:
            config: Network configuration.
            sigma_data: Standard deviation of the latents, as in training.
            dtype: dtype of the matrix products.
            sharding: Placement of the latents; by default one device. Replicated latents allow any sharding of the
                parameters. With latents split along the batch, each device has its own copy of the parameters.
        """
        self.config, self.sigma_data, self.dtype = config, sigma_data, jnp.dtype(dtype)
        latents = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        denoise, everywhere = self.denoise, latents
        if isinstance(latents, NamedSharding) and not latents.is_fully_replicated:
            everywhere = NamedSharding(latents.mesh, PartitionSpec())
            denoise = functools.partial(_denoise_rows, self.denoise, latents.mesh, latents.spec)
        self._denoise = jax.jit(denoise, static_argnames=("branches", "weak_config"), out_shardings=latents)
        self._place: Callable[[Any], Any] = jax.jit(lambda arrays: arrays, out_shardings=latents)
        self._replicate: Callable[[Any], Any] = jax.jit(lambda array: array, out_shardings=everywhere)

    def images(
        self, params: Params, captions: np.ndarray, seeds: Sequence[int], sampling: Sampling,
        decode: Callable[[np.ndarray], Any], batch_size: int = MAX_BATCH,
    ) -> np.ndarray:  # fmt: skip
        """Samples images (n, f·H, f·W, 3) uint8; each depends on its own caption and seed, not on the batch.

        Args:
            params: Parameters of the network, on the devices.
            captions: (n, L, Y) float, caption embeddings.
            seeds: n whole numbers.
            sampling: Sampler settings.
            decode: Maps latents (B, H, W, C) to pixels in [-1, 1]; `ImageEncoder.decode`.
            batch_size: Largest number of images sampled at once.
        """
        n = len(seeds)
        noise, captions = draw_noise(self.config, seeds), np.asarray(captions, np.float32)
        images = []
        for rows in batches(n, math.ceil(n / math.ceil(n / batch_size))):
            # Every process has all latents, and decodes them on its own devices.
            images.append(to_uint8(decode(self.latents(params, captions[rows], noise[rows], sampling))))
        return np.concatenate(images)[:n]

    def latents(
        self,
        params: Params,
        captions: np.ndarray,
        noise: np.ndarray,
        sampling: Sampling,
        *,
        negative: np.ndarray | None = None,
        weak: tuple[DiTConfig, Params] | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        after_call: Callable[[np.ndarray], object] | None = None,
    ) -> np.ndarray:
        """Samples latents (B, H, W, C) float32.

        Args:
            params: Parameters of the network, on the devices.
            captions: (B, L, Y) float32, caption embeddings.
            noise: (B, H, W, C) float32, unit normal.
            sampling: Sampler settings.
            negative: (L, Y) float32, embedding of a negative prompt.
            weak: Configuration and parameters of a weak network, for autoguidance by the guidance scale.
            known: For inpainting: original latents, and a mask that is True where they are resampled.
            after_call: Called after each call of the denoiser with the denoised latents (B, H, W, C). Without it, calls
                are dispatched without waiting for the previous one.
        """
        weak_config, weak_params = weak or (None, None)
        negative = np.zeros_like(captions[0]) if negative is None else negative
        inputs = Inputs(params, self._place(captions), self._replicate(negative), weak_params)

        def D(x: jax.Array, sigma: float) -> jax.Array:
            level = np.full(1, sigma, np.float32)
            scale = scale_at(float(level[0]), sampling.guidance, sampling.interval)
            branches = branches_of(scale, weak is not None, sampling.path_drop)
            return self._denoise(inputs, np.float32(scale), x, level, branches=branches, weak_config=weak_config)

        def watched(x: jax.Array, sigma: float) -> jax.Array:
            D_x = denoiser(x, sigma)
            if after_call:
                after_call(np.asarray(D_x))
            return D_x

        denoiser: Denoiser = keep_known(D, *known) if known else D
        return np.asarray(sample(watched, self._place(noise), sampling.sigmas, sampling.sampler))

    def denoise(
        self, inputs: Inputs, scale: Any, x: jax.Array, sigma: jax.Array, *, branches: Branches,
        weak_config: DiTConfig | None = None,
    ) -> jax.Array:  # fmt: skip
        """Computes D(x; sigma) under guidance, (B, H, W, C) float32. Not compiled; can be traced.

        scale is () float32, x (B, H, W, C) float32 and sigma (1,) float32. With a weak network, the branches 'both' are
        the two networks.
        """
        network = bind(self.config, inputs.params, self.dtype)
        F: edm.Network = network
        if branches == "path_drop":
            F = drop_path(network, functools.partial(network, shallow=True), scale, inputs.negative)
        elif branches == "both" and inputs.weak is not None:
            assert weak_config is not None
            F = autoguide(F, bind(weak_config, inputs.weak, self.dtype), scale)
        elif branches == "both":
            F = extrapolate(F, scale, inputs.negative)
        elif branches == "unconditional":
            F = guide(F, 0, inputs.negative)
        return edm.denoise(F, x, sigma, inputs.captions, self.sigma_data)

    def abstract_denoise(
        self, params: Params, images: int, text_tokens: int, sharding: Sharding, guided: bool = True
    ) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
        """Returns the denoiser and its abstract arguments, to compile it without any array.

        The abstract parameters have shardings; `sharding`, as given to `__init__`, is that of everything else.
        """
        side, channels, width = self.config.input_size, self.config.in_channels, self.config.caption_channels

        def placed(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

        inputs = Inputs(params, placed(images, text_tokens, width), placed(text_tokens, width))
        scale, sigma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (1,)))
        denoise = functools.partial(self.denoise, branches=branches_of(2.0 if guided else 1.0))
        return denoise, (inputs, scale, placed(images, side, side, channels), sigma)


def _denoise_rows(
    denoise: Callable[..., jax.Array], mesh: Any, rows: PartitionSpec, inputs: Inputs, *arrays: Any, **static: Any
) -> jax.Array:
    """Denoises each device's own rows, so that no batch travels between devices."""
    whole = PartitionSpec()
    specs = (Inputs(whole, rows, whole, whole), whole, rows, whole)  # type: ignore[arg-type]
    per_device = functools.partial(denoise, **static)
    return jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(inputs, *arrays)


def branches_of(scale: float, autoguidance: bool = False, path_drop: bool = False) -> Branches:
    """Returns the branches that a guidance scale needs."""
    if scale == 1:
        return "conditional"
    if path_drop:
        return "path_drop"
    return "unconditional" if scale == 0 and not autoguidance else "both"


def draw_noise(config: DiTConfig, seeds: Sequence[int]) -> np.ndarray:
    """Draws (n, H, W, C) float32 unit normal noise, each image's from its own seed."""
    shape = (config.input_size, config.input_size, config.in_channels)
    return np.stack([np.asarray(jax.random.normal(jax.random.key(seed), shape)) for seed in seeds])


def batches(n: int, size: int) -> Iterator[np.ndarray]:
    """Yields the indices below n in batches of one size; the last one is filled up with repeats."""
    for start in range(0, n, size):
        yield np.arange(start, start + size) % n


def to_uint8(images: Any) -> np.ndarray:
    """Converts pixels from [-1, 1] float to [0, 255] uint8."""
    return np.asarray(jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8))
