"""From captions and seeds to images: the network under guidance, a sampler, and the decoder.

B images at once · H W latent rows, columns · C latent channels · L caption tokens · Y caption channels.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from micro_dit.diffusion import edm
from micro_dit.diffusion.guidance import autoguide, extrapolate, guide, scale_at
from micro_dit.diffusion.samplers import SAMPLERS, Carry, keep_known, noise_levels
from micro_dit.errors import UserError
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import Params, bind

MAX_BATCH = 32  # images at once; more are done in turns


class Inputs(NamedTuple):
    """What a call of the network takes besides x; what is None is not compiled in."""

    params: Params
    captions: Any  # (B, L, Y) float32
    negative: Any  # (L, Y) float32, zeros if there is no negative prompt
    weak: Params | None = None  # of autoguidance's weak network
    known: tuple[Any, Any] | None = None  # for inpainting: latents (H, W, C), and where to redraw (H, W, 1) bool


class Denoising:
    """Goes down the noise levels call by call, with one compiled program a batch size, sampler and kind of guidance.

    Numbers of steps, noise levels and scales of guidance are its inputs: changing them compiles nothing.
    """

    def __init__(self, config: DiTConfig, *, sigma_data: float, dtype: Any = jnp.float32, sharding: Any = None):
        """Sets up the network; `sharding` is where latents live if parameters are spread over several devices."""
        self.config, self.sigma_data, self.dtype = config, sigma_data, dtype
        place = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        static = ("sampler", "branches", "weak_config")
        self._call = jax.jit(self._trace_call, static_argnames=static, out_shardings=place)
        self._place: Callable[[Any], Any] = jax.jit(lambda arrays: arrays, out_shardings=place)

    def __call__(
        self,
        inputs: Inputs,
        noise: np.ndarray,
        sigmas: np.ndarray,
        *,
        sampler: str = "heun",
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        weak_config: DiTConfig | None = None,
        after_call: Callable[[np.ndarray], object] | None = None,
    ) -> np.ndarray:
        """Latents (B, H, W, C) float32.

        Args:
            inputs: parameters on the devices, and the rest.
            noise: (B, H, W, C), unit normal.
            sigmas: (steps + 1,) noise levels that end with 0.
            sampler: one of SAMPLERS.
            guidance: scale of classifier-free guidance, or of autoguidance if there are weak parameters.
            interval: (low, high) noise levels between which there is guidance; everywhere if None.
            weak_config: of the weak network.
            after_call: is told what each call of the network made of x, the denoised latents (B, H, W, C), when it is
                done; without it, calls are not waited for.
        """
        method = SAMPLERS[sampler]
        columns = method.columns(sigmas)
        carry = self._place(method.start(jnp.asarray(noise, jnp.float32) * np.float32(sigmas[0])))
        placed = self._place({"captions": inputs.captions, "negative": inputs.negative, "known": inputs.known})
        inputs = inputs._replace(**placed)
        for row in zip(*columns, strict=True):
            scale = scale_at(float(row[0]), guidance, interval)
            if scale == 1:
                branches = "conditional"
            else:
                branches = "unconditional" if scale == 0 and inputs.weak is None else "both"
            before = carry
            carry = self._call(
                inputs, np.float32(scale), carry, row, sampler=sampler, branches=branches, weak_config=weak_config
            )
            if after_call:
                after_call(np.asarray(method.denoised(before, row, carry)))
        return np.asarray(carry[0])

    def abstract_call(
        self, params: Params, images: int, text_tokens: int, sharding: Any, sampler: str = "heun", guided: bool = True
    ) -> tuple[Callable[..., Carry], tuple[Any, ...]]:
        """What compiles a call without making an array: the call, and its abstract arguments.

        Args:
            params: abstract parameters, with shardings.
            images: B.
            text_tokens: L.
            sharding: of all else; what `__call__` makes of the sharding of `__init__`.
            sampler, guided: which of the programs of `__call__`.
        """
        side, channels, width = self.config.input_size, self.config.in_channels, self.config.caption_channels

        def placed(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

        method = SAMPLERS[sampler]
        carry = jax.eval_shape(method.start, placed(images, side, side, channels))
        carry = tuple(placed(*x.shape) for x in carry)
        row = tuple(jax.ShapeDtypeStruct((), column.dtype) for column in method.columns(noise_levels(2)))
        inputs = Inputs(params, placed(images, text_tokens, width), placed(text_tokens, width))
        branches, scale = "both" if guided else "conditional", jax.ShapeDtypeStruct((), jnp.float32)
        call = functools.partial(self._trace_call, sampler=sampler, branches=branches, weak_config=None)
        return call, (inputs, scale, carry, row)

    def _trace_call(
        self, inputs: Inputs, scale: Any, carry: Carry, row: Any, *, sampler: str, branches: str,
        weak_config: DiTConfig | None,
    ) -> Carry:  # fmt: skip
        """The carry after one more call of the sampler."""
        F: edm.Network = bind(self.config, inputs.params, self.dtype)
        if branches == "both" and inputs.weak is not None:
            assert weak_config is not None
            F = autoguide(F, bind(weak_config, inputs.weak, self.dtype), scale)
        elif branches == "both":
            F = extrapolate(F, scale, inputs.negative)
        elif branches == "unconditional":
            F = guide(F, 0, inputs.negative)

        def D(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return edm.denoise(F, x, sigma, inputs.captions, self.sigma_data)

        denoiser = D if inputs.known is None else keep_known(D, *inputs.known)
        return SAMPLERS[sampler].call(denoiser, carry, row)


class Generator:
    """Images for captions with settings that stay: what a training run draws with."""

    def __init__(
        self,
        config: DiTConfig,
        image_encoder: Any,
        *,
        guidance: float,
        steps: int,
        sigma_data: float,
        dtype: Any = jnp.float32,
        sharding: Any = None,
    ):
        """Sets up a generator; `image_encoder` is an encoders.image.ImageEncoder, the rest as in training.

        `sharding` is where latents live if the parameters are spread over several devices: on all of them.
        """
        check_steps(steps)
        self.config, self.image_encoder, self.guidance = config, image_encoder, guidance
        self._sigmas = noise_levels(steps)
        self._denoising = Denoising(config, sigma_data=sigma_data, dtype=dtype, sharding=sharding)

    def __call__(self, params: Params, captions: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        """Images for caption embeddings; each depends on its own caption and seed, whatever the batch.

        Args:
            params: the network's.
            captions: (n, L, Y) float.
            seeds: n whole numbers.

        Returns:
            (n, H, W, 3) uint8.
        """
        n = len(seeds)
        noise = draw_noise(self.config, seeds)
        captions = np.asarray(captions, np.float32)
        images = []
        for rows in turns(n, math.ceil(n / math.ceil(n / MAX_BATCH))):
            inputs = Inputs(params, captions[rows], np.zeros_like(captions[0]))
            latents = self._denoising(inputs, noise[rows], self._sigmas, guidance=self.guidance)
            # Every process has all latents, and decodes them on a device of its own.
            images.append(to_uint8(self.image_encoder.decode(latents)))
        return np.concatenate(images)[:n]


def check_steps(steps: int, sampler: str = "heun") -> None:
    """Raises UserError if there is no such sampler, or if it can't do with so few steps."""
    if sampler not in SAMPLERS:
        raise UserError(f"there is no sampler {sampler!r}; choose {', '.join(SAMPLERS)}.")
    if steps < 1:
        raise UserError(f"{steps} sampling steps: use at least 1.")
    if sampler == "dpmpp_2m" and steps < 2:
        raise UserError("dpmpp_2m looks back at the step before: use at least 2 sampling steps, or another sampler.")


def draw_noise(config: DiTConfig, seeds: Sequence[int]) -> np.ndarray:
    """(n, H, W, C) float32, unit normal: each image's from its own seed."""
    shape = (config.input_size, config.input_size, config.in_channels)
    return np.stack([np.asarray(jax.random.normal(jax.random.key(seed), shape)) for seed in seeds])


def turns(n: int, size: int) -> Iterator[np.ndarray]:
    """Indices below n in arrays of one size; the last is filled up with repeats, which come after the first n."""
    for start in range(0, n, size):
        yield np.arange(start, start + size) % n


def to_uint8(images: Any) -> np.ndarray:
    """[-1, 1] float → [0, 255] uint8."""
    return np.asarray(jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8))
