"""Samples latents and images from caption embeddings and seeds, on one device or many.

The commands, the API, previews, evaluation and the playground all use this module, so the same captions, seeds and
settings produce the same pixels everywhere.

Shapes: B images in a batch, n images in total, H×W latents with C channels, L caption tokens with Y channels.
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

MAX_BATCH = 32  # default batch size


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampler and guidance settings.

    Attributes:
        steps: Number of sampler steps.
        guidance: Guidance scale. 1 turns guidance off.
        sampler: One of SAMPLERS.
        interval: (low, high), noise levels between which guidance is applied. None applies it at all noise levels.
        strength: How much of a start image is resampled, from 0 (nothing) to 1 (everything, or no start image).
        path_drop: Whether to use path-drop guidance, which steers away from the network without its backbone.

    Raises:
        UserError: A setting is invalid.
    """

    steps: int
    guidance: float = 1.0
    sampler: str = "heun"
    interval: tuple[float, float] | None = None
    strength: float = 1.0
    path_drop: bool = False

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"Unknown sampler {self.sampler!r}. Choose one of {', '.join(SAMPLERS)}.")
        if self.steps < 1:
            raise UserError(f"The number of sampling steps is {self.steps}. Set steps to at least 1.")
        if self.sampler == "dpmpp_2m" and self.steps < 2:
            raise UserError("The sampler dpmpp_2m needs at least 2 steps. Increase steps or choose another sampler.")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            low, high = self.interval
            raise UserError(
                f"The guidance interval from {low:g} to {high:g} is empty. Set guidance_interval to two noise levels "
                "with 0 <= low < high."
            )
        if not 0 <= self.strength <= 1:
            raise UserError(f"The strength is {self.strength:g}. Set strength to a number from 0 to 1.")

    def check(self, config: DiTConfig) -> None:
        """Raises UserError if the network does not support these settings."""
        if self.path_drop and not config.fusion:
            raise UserError("Path-drop guidance needs a network with model.fusion=True. Remove --path_drop.")

    @property
    def sigmas(self) -> np.ndarray:
        """(steps + 1,) float64, noise levels that descend to 0. At strength 0 the only noise level is 0."""
        if self.strength in (0, 1):
            return noise_levels(self.steps) if self.strength else np.zeros(1)
        return partial_noise_levels(self.steps, self.strength)

    @property
    def calls(self) -> int:
        """Number of denoiser calls."""
        steps = len(self.sigmas) - 1
        return 2 * steps - 1 if self.sampler == "heun" and steps else steps


class Inputs(NamedTuple):
    """Inputs of the denoiser that are the same in all steps."""

    params: Params
    captions: Any  # (B, L, Y) float32
    negative: Any  # (L, Y) float32, embedding of the negative prompt; zeros without one
    weak: Params | None = None  # parameters of the weak network, for autoguidance


Branches = Literal["conditional", "unconditional", "both", "path_drop"]


class Generator:
    """Samples latents and images with a network.

    The guided denoiser is compiled once for each batch size and value of `Branches`. All other settings share the
    compiled program.
    """

    def __init__(
        self, config: DiTConfig, *, sigma_data: float, dtype: Any = jnp.float32, sharding: Sharding | None = None
    ):
        """Sets up the denoiser.

        Args:
            config: Network configuration.
            sigma_data: Standard deviation of the latents that the network was trained with.
            dtype: Dtype of the matrix products.
            sharding: Sharding of the latents; by default they are on one device. If the latents are replicated, the
                parameters may have any sharding. If they are split along the batch, the parameters have to be
                replicated.
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
        """Samples images. Each image depends only on its own caption and seed, not on the batch.

        Args:
            params: Network parameters, on the devices.
            captions: (n, L, Y) float, caption embeddings.
            seeds: n integers, one seed per image.
            sampling: Sampler settings.
            decode: Maps latents (B, H, W, C) to pixels in [-1, 1]; usually `ImageEncoder.decode`.
            batch_size: Largest batch size.

        Returns:
            (n, f·H, f·W, 3) uint8, images, where f is the upsampling factor of `decode`.
        """
        n = len(seeds)
        noise, captions = draw_noise(self.config, seeds), np.asarray(captions, np.float32)
        images = []
        for rows in batches(n, math.ceil(n / math.ceil(n / batch_size))):
            # `latents` returns the whole batch in every process, so each process decodes it on its own devices.
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
        """Samples latents.

        Args:
            params: Network parameters, on the devices.
            captions: (B, L, Y) float32, caption embeddings.
            noise: (B, H, W, C) float32, unit normal.
            sampling: Sampler settings.
            negative: (L, Y) float32, embedding of a negative prompt.
            weak: Configuration and parameters of a weak network. If given, autoguidance replaces classifier-free
                guidance.
            known: For inpainting: original latents and a boolean mask that is True where they are resampled.
            after_call: Called with the denoised latents (B, H, W, C) after each denoiser call. If None, each call is
                dispatched without waiting for the previous one.

        Returns:
            (B, H, W, C) float32, latents.
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
        """Computes D(x; sigma) with guidance. This method is not jitted, but can be traced.

        Args:
            inputs: Inputs that are the same in all steps.
            scale: () float32, guidance scale.
            x: (B, H, W, C) float32, noisy latents.
            sigma: (1,) float32, noise level.
            branches: Network outputs to compute. With a weak network, 'both' means this network and the weak one.
            weak_config: Configuration of the weak network, for autoguidance.

        Returns:
            (B, H, W, C) float32, denoised latents.
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
        """Returns the denoiser and its abstract arguments, so that it can be compiled without allocating arrays.

        Args:
            params: Abstract network parameters with shardings.
            images: Batch size.
            text_tokens: Number of caption tokens.
            sharding: Sharding of the captions and latents, the same as for `__init__`.
            guided: Whether to use classifier-free guidance.
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
    """Denoises the rows of the batch on the device that holds them, so that the devices do not communicate."""
    whole = PartitionSpec()
    specs = (Inputs(whole, rows, whole, whole), whole, rows, whole)  # type: ignore[arg-type]
    per_device = functools.partial(denoise, **static)
    return jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(inputs, *arrays)


def branches_of(scale: float, autoguidance: bool = False, path_drop: bool = False) -> Branches:
    """Returns the network outputs that a guidance scale needs."""
    if scale == 1:
        return "conditional"
    if path_drop:
        return "path_drop"
    return "unconditional" if scale == 0 and not autoguidance else "both"


def draw_noise(config: DiTConfig, seeds: Sequence[int]) -> np.ndarray:
    """Samples (n, H, W, C) float32 unit normal noise, with one seed per image."""
    shape = (config.input_size, config.input_size, config.in_channels)
    return np.stack([np.asarray(jax.random.normal(jax.random.key(seed), shape)) for seed in seeds])


def batches(n: int, size: int) -> Iterator[np.ndarray]:
    """Yields the indices 0 … n - 1 in batches of equal size; the last batch is filled up by starting again at 0."""
    for start in range(0, n, size):
        yield np.arange(start, start + size) % n


def to_uint8(images: Any) -> np.ndarray:
    """Converts pixels from [-1, 1] float to [0, 255] uint8."""
    return np.asarray(jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8))
