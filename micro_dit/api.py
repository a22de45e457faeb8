"""Samples with a trained model from Python.

>>> from micro_dit import load
>>> model = load("runs/mask75")
>>> images = model.generate(["red heart", "grinning cat"], seed=0)
"""

import dataclasses
import functools
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from micro_dit.data.captions import clean_captions
from micro_dit.diffusion.generate import Generator, Sampling, batches, draw_noise, to_uint8
from micro_dit.encoders.info import UNVERIFIED
from micro_dit.errors import UserError
from micro_dit.files import hash_text
from micro_dit.interop.model_folder import VAE, read_config
from micro_dit.models.config import DiTConfig
from micro_dit.training.pretrained import read_model

BATCH_SIZE = 4  # images at once


@dataclasses.dataclass(frozen=True)
class About:
    """Description of a model: origin, encoders and defaults."""

    name: str  # of the run or model folder
    config_hash: str  # twelve hexadecimal digits of config.json
    source: str  # attribution of the training images, or origin of the weights; may be empty
    sigma_data: float  # standard deviation of the latents, as in training
    vae: str
    text_encoder: str
    caption_tokens: int  # L
    caption_cleaning: str  # see data/captions.py
    step: int | None = None  # of the checkpoint; None if it is not known to be from a run
    vae_fingerprint: str = ""  # of the encoder it was trained with; empty if not known
    text_fingerprint: str = ""
    guidance: float = 5.0
    steps: int = 30
    path_drop: bool = False  # whether guidance skips the backbone by default
    vae_folder: str = ""  # of the VAE's files; empty if `vae` names them
    params: str = ""  # 'raw', or empty for the checkpoint's default: EMA weights where there are some

    @property
    def where(self) -> str:
        """Description of where the parameters come from."""
        raw = ", raw parameters" if self.params == "raw" else ""
        return self.name if self.step is None else f"step {self.step} of {self.name}{raw}"


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Everything besides model and prompts that images depend on.

    Attributes:
        num: Images per prompt.
        seed: Seed of a prompt's first image; the next ones have `seed` + 1 ….
        steps: Number of sampler steps; by default the model's.
        guidance: Guidance scale, by default the model's; 1 turns guidance off.
        sampler: 'heun' (two calls of the network per step), 'euler' (which is DDIM) or 'dpmpp_2m' (one call per step).
        guidance_interval: (low, high) noise levels between which guidance is applied; None applies it at all levels.
        path_drop: Whether guidance leads away from the network without its backbone (path-drop guidance), which costs
            little; by default the model's. Needs a network with `fusion`.
        negative_prompt: Prompt that guidance leads away from, instead of the empty one.
        autoguidance: Weaker model that guidance leads away from: an earlier checkpoint, or a smaller network.
        image: Image to start from instead of noise, of the model's size.
        strength: How much of the image is resampled, from 0 (nothing) to 1; by default 0.6, with a mask 1.
        mask: Mask of the image's size; the image is resampled where it is white (or True).

    Raises:
        UserError: A setting makes no sense.
    """

    num: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str = "heun"
    guidance_interval: tuple[float, float] | None = None
    path_drop: bool | None = None
    negative_prompt: str = ""
    autoguidance: "Model | None" = None
    image: Image.Image | None = None
    strength: float | None = None
    mask: Image.Image | np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"the number of images is {self.num}: use at least 1.")
        if not 0 <= self.seed <= 2**32 - self.num:
            raise UserError(f"the seed is {self.seed}: use a whole number from 0 to {2**32 - self.num}.")
        if self.image is None and (self.mask is not None or self.strength is not None):
            raise UserError("a mask or a strength needs an image to start from.")
        if self.autoguidance and self.negative_prompt.strip():
            raise UserError("autoguidance leads away from another model, not from a negative prompt: leave one out.")
        if self.autoguidance and self.path_drop:
            raise UserError("autoguidance leads away from another model, not from a dropped path: leave one out.")

    def sampling(self, about: About) -> Sampling:
        """Returns the settings of the sampler, with a model's defaults."""
        strength = 0.6 if self.image is not None and self.mask is None else 1.0
        return Sampling(
            steps=about.steps if self.steps is None else self.steps,
            guidance=about.guidance if self.guidance is None else self.guidance,
            sampler=self.sampler,
            interval=self.guidance_interval,
            strength=strength if self.strength is None else self.strength,
            path_drop=about.path_drop and not self.autoguidance if self.path_drop is None else self.path_drop,
        )


def load(path: str | Path, step: int | None = None, batch_size: int = BATCH_SIZE, params: str | None = None) -> "Model":
    """Loads a model; its encoders are loaded when they are needed.

    Args:
        path: Work directory of a run, or a model folder.
        step: Checkpoint of the run; by default the newest.
        batch_size: Number of images sampled at once; an image does not depend on it.
        params: 'ema' or 'raw' parameters of the checkpoint; by default the EMA weights where there are some.

    Raises:
        UserError: The model or checkpoint does not exist, or the checkpoint has no EMA weights.
    """
    path = Path(path)
    values, config, told = read_model(path, step, params)
    config_hash = hash_text(json.dumps(read_config(path / "config.json"), sort_keys=True))[:12]
    vae_folder = str(path / VAE) if told.pop("vae_included", False) else ""
    told["source"] = str(told["source"])
    about = About(name=path.resolve().name, config_hash=config_hash, vae_folder=vae_folder, **told)
    return Model(values, config, about, batch_size)


class Model:
    """A trained network with its encoders; `warn` is called with warnings, as of a prompt that is too long."""

    def __init__(self, params: dict[str, np.ndarray], config: DiTConfig, about: About, batch_size: int = BATCH_SIZE):
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} images: use at least 1.")
        self.config, self.about, self.batch_size = config, about, batch_size
        self.params = {name: jnp.asarray(value) for name, value in params.items()}
        self.warn: Callable[[str], object] = warnings.warn
        self._generator = Generator(config, sigma_data=about.sigma_data)
        self._encoders: dict[str, Any] = {}
        self._embeddings: dict[str, np.ndarray] = {}

    def share(self, other: "Model") -> None:
        """Uses the encoders and compiled programs of the other model if its network and encoders are the same."""
        own = ("name", "step", "config_hash", "source", "guidance", "steps", "path_drop", "params")
        about = dataclasses.replace(other.about, **{name: getattr(self.about, name) for name in own})
        if (self.config, self.about) == (other.config, about):
            self._generator, self._encoders, self._embeddings = other._generator, other._encoders, other._embeddings

    # ---- Images ------------------------------------------------------------------------------------------------------

    def generate(self, prompts: str | Sequence[str], *args: Any, **kwargs: Any) -> list[Image.Image]:
        """Generates images for prompts; takes the arguments of `latents`."""
        return self.decode(self.latents(prompts, *args, **kwargs))

    def latents(
        self,
        prompts: str | Sequence[str],
        settings: GenerationSettings | None = None,
        *,
        progress: bool = False,
        watch: Callable[[float, np.ndarray, np.ndarray], object] | None = None,
        **changes: Any,
    ) -> np.ndarray:
        """Samples latents (n, H, W, C) float32 for prompts.

        Args:
            prompts: One prompt or several; an empty one is unconditional.
            settings: Settings; by default those of the model.
            progress: Whether to show a progress bar.
            watch: Called after each call of the network with the fraction done, from 0 to 1, the indices (B,) of the
                images it was for, and their denoised latents (B, H, W, C).
            **changes: Fields of GenerationSettings, in place of those of `settings`.

        Raises:
            UserError: A setting makes no sense, or an encoder does not belong to the model.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("there are no prompts: use at least 1.")
        settings = dataclasses.replace(settings or GenerationSettings(), **changes)
        sampling, weak = settings.sampling(self.about), settings.autoguidance
        if weak:
            self._check_weak(weak)
        sampling.check(self.config)
        start = np.zeros((), np.float32) if settings.image is None else self.encode(settings.image)
        known = None if settings.mask is None else (start, self._latent_mask(settings.mask))
        n = len(prompts) * settings.num
        if sampling.strength == 0:
            return np.tile(start, (n, 1, 1, 1))

        captions = np.repeat(self.embed(prompts), settings.num, axis=0)
        negative = self.embed([settings.negative_prompt])[0]
        noise = draw_noise(self.config, [settings.seed + i for i in range(settings.num)])
        noise = np.tile(noise, (len(prompts), 1, 1, 1)) + start / np.float32(sampling.sigmas[0])
        total, latents = -(-n // self.batch_size) * sampling.calls, []
        with tqdm(total=total, unit="call", disable=not progress) as bar:
            done = itertools.count(1)

            def after_call(rows: np.ndarray, denoised: np.ndarray) -> None:
                bar.update()
                if watch:
                    watch(next(done) / total, rows, denoised)

            for rows in batches(n, self.batch_size):
                latents.append(self._generator.latents(
                    self.params, captions[rows], noise[rows], sampling, negative=negative, known=known,
                    weak=(weak.config, weak.params) if weak else None,
                    after_call=functools.partial(after_call, rows) if progress or watch else None,
                ))  # fmt: skip
        sampled = np.concatenate(latents)[:n]
        return sampled if known is None else np.where(known[1], sampled, known[0])

    def png_metadata(self, settings: GenerationSettings, image: str = "", mask: str = "") -> dict[str, str]:
        """Returns what an image's file records besides prompt and seed; `image` and `mask` are names of files."""
        about, sampling, interval = self.about, settings.sampling(self.about), settings.guidance_interval
        recorded = {
            "sampler": f"{sampling.sampler}, {sampling.steps} steps", "guidance": str(float(sampling.guidance)),
            "checkpoint": about.where, "config": about.config_hash, "attribution": about.source,
            "guidance_interval": ",".join(f"{level:g}" for level in interval) if interval else "",
            "path_drop": "yes" if sampling.path_drop else "", "negative_prompt": settings.negative_prompt,
            "autoguidance": settings.autoguidance.about.where if settings.autoguidance else "",
            "image": image, "mask": mask, "strength": "" if settings.strength is None else str(settings.strength),
        }  # fmt: skip
        return {name: value for name, value in recorded.items() if value}

    def decode(self, latents: np.ndarray) -> list[Image.Image]:
        """Decodes latents (n, H, W, C) to images."""
        n, decode = len(latents), self.image_encoder.decode
        images = (image for rows in batches(n, self.batch_size) for image in to_uint8(decode(latents[rows])))
        return list(map(Image.fromarray, itertools.islice(images, n)))

    def encode(self, image: Image.Image) -> np.ndarray:
        """Encodes an image of the model's size to latents (H, W, C), the mean of the encoder's posterior."""
        side = self.config.input_size * self.image_encoder.downsample
        if image.size != (side, side):
            width, height = image.size
            raise UserError(f"the image has {width}×{height} pixels, the model draws {side}×{side}: resize or crop it.")
        mean, _ = self.image_encoder.encode(np.asarray(image.convert("RGB"))[None])
        return np.asarray(mean[0], np.float32)

    # ---- Prompts -----------------------------------------------------------------------------------------------------

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeds prompts one by one, (n, L, Y) float32, and warns of those that are too long and are cut."""
        for prompt in dict.fromkeys(prompts):
            (caption,) = clean_captions([prompt], self.about.caption_cleaning)  # as those it was trained with
            if not caption.strip():
                shape = (self.about.caption_tokens, self.config.caption_channels)
                self._embeddings[prompt] = np.zeros(shape, np.float32)
                continue
            if cut := self._cut(caption):
                count, kept = cut
                self.warn(
                    f"the prompt has {count} tokens, the text encoder takes {self.about.caption_tokens}: it reads "
                    f"only {kept!r}, and not {caption[len(kept) :].strip()!r}."
                )
            if prompt not in self._embeddings:
                self._embeddings[prompt] = np.asarray(self.text_encoder.encode([caption])[0], np.float32)
        return np.stack([self._embeddings[prompt] for prompt in prompts])

    def _cut(self, caption: str) -> tuple[int, str] | None:
        """Returns the tokens of a too long caption and the part that is read, in whole words; None if it fits."""
        (count,) = self.text_encoder.count_tokens([caption])
        most = self.about.caption_tokens
        if count <= most:
            return None
        parts = (caption[:i] for i in reversed(range(len(caption))) if caption[i].isspace())
        return count, next((part for part in parts if self.text_encoder.count_tokens([part])[0] <= most), "")

    # ---- Encoders ----------------------------------------------------------------------------------------------------

    @property
    def image_encoder(self) -> Any:
        """The encoders.image.ImageEncoder; UserError if its latents are not the model's."""
        if "image" not in self._encoders:
            from micro_dit.encoders.image import load_image_encoder

            name, trained_with = self.about.vae, self.about.vae_fingerprint
            encoder = load_image_encoder(self.about.vae_folder or name)
            _check_encoder(encoder, name, "latents", self.config.in_channels, trained_with)
            self._encoders["image"] = encoder
        return self._encoders["image"]

    @property
    def text_encoder(self) -> Any:
        """The encoders.text.TextEncoder; UserError if its embeddings are not the model's."""
        if "text" not in self._encoders:
            from micro_dit.encoders.text import load_text_encoder

            name, trained_with = self.about.text_encoder, self.about.text_fingerprint
            encoder = load_text_encoder(name, self.about.caption_tokens)
            _check_encoder(encoder, name, "embeddings", self.config.caption_channels, trained_with)
            self._encoders["text"] = encoder
        return self._encoders["text"]

    # ---- Settings ----------------------------------------------------------------------------------------------------

    def _check_weak(self, weak: "Model") -> None:
        """Raises UserError if another model can't be the weak one of autoguidance."""
        pairs = [(self.config, weak.config, name) for name in ("input_size", "in_channels", "caption_channels")]
        names = ("sigma_data", "text_encoder", "caption_tokens", "caption_cleaning", "vae")
        for ours, theirs, name in pairs + [(self.about, weak.about, name) for name in names]:  # type: ignore[operator]
            if getattr(ours, name) != getattr(theirs, name):
                raise UserError(
                    f"autoguidance by {weak.about.name}: its {name} is {getattr(theirs, name)}, "
                    f"the model's is {getattr(ours, name)}."
                )

    def _latent_mask(self, mask: Image.Image | np.ndarray) -> np.ndarray:
        """Returns the mask of the latents, (H, W, 1) bool: True where any pixel of a latent is resampled."""
        pixels: np.ndarray
        pixels = np.asarray(mask.convert("L")) > 127 if isinstance(mask, Image.Image) else np.asarray(mask, bool)
        side, f = self.config.input_size, self.image_encoder.downsample
        if pixels.shape != (side * f, side * f):
            found = "×".join(map(str, pixels.shape[::-1]))
            raise UserError(f"the mask has {found} pixels, the model draws {side * f}×{side * f}: resize or crop it.")
        if not pixels.any():
            raise UserError("the mask is black everywhere: make it white where the image is to be drawn anew.")
        return np.any(pixels.reshape(side, f, side, f, 1), axis=(1, 3))


def _check_encoder(encoder: Any, name: str, output: str, channels: int, trained_with: str) -> None:
    if encoder.channels != channels:
        raise UserError(
            f"{name} has {output} of {encoder.channels} channels, the model of {channels}: "
            "name the encoder that it was trained with in its config.json."
        )
    if trained_with not in ("", UNVERIFIED, encoder.fingerprint):
        raise UserError(
            f"the model was trained with another {name} ({trained_with}) than is found now ({encoder.fingerprint}): "
            "bring back the files that it was trained with."
        )
