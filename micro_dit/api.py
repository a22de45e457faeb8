"""Python API: loads a trained model and generates images with it.

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

BATCH_SIZE = 4  # default number of images per batch


@dataclasses.dataclass(frozen=True)
class About:
    """Description of a model: origin, encoders and default settings."""

    name: str  # name of the run or model folder
    config_hash: str  # first 12 hexadecimal digits of the hash of config.json
    source: str  # attribution of the training images, or origin of the weights; may be empty
    sigma_data: float  # standard deviation of the latents, as in training
    vae: str  # name of the image encoder
    text_encoder: str  # name of the text encoder
    caption_tokens: int  # L
    caption_cleaning: str  # see data/captions.py
    step: int | None = None  # step of the checkpoint; None for a model folder without a known step
    vae_fingerprint: str = ""  # fingerprint of the image encoder in training; empty if unknown
    text_fingerprint: str = ""  # fingerprint of the text encoder in training; empty if unknown
    guidance: float = 5.0  # default guidance scale
    steps: int = 30  # default number of sampler steps
    path_drop: bool = False  # whether path-drop guidance is the default
    vae_folder: str = ""  # folder of the VAE's files; if empty, `vae` is loaded by name
    params: str = ""  # 'raw', or empty for the default: the EMA weights if the checkpoint has them

    @property
    def where(self) -> str:
        """Description of the origin of the parameters, such as 'step 1200 of mask75'."""
        raw = ", raw parameters" if self.params == "raw" else ""
        return self.name if self.step is None else f"step {self.step} of {self.name}{raw}"


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings that, together with the model and the prompts, determine the images.

    Attributes:
        num: Number of images per prompt.
        seed: Seed of the first image of each prompt. The next images have `seed` + 1, `seed` + 2 ….
        steps: Number of sampler steps; by default the model's.
        guidance: Guidance scale; by default the model's. 1 turns guidance off.
        sampler: 'heun' (two network calls per step), 'euler' (equivalent to DDIM) or 'dpmpp_2m' (one call per step).
        guidance_interval: (low, high), noise levels between which guidance is applied. None applies it at all levels.
        path_drop: Whether to use path-drop guidance, which steers away from the network without its backbone and
            costs less than classifier-free guidance; by default the model's setting. Needs a model with `fusion`.
        negative_prompt: Prompt that guidance steers away from, instead of the empty prompt.
        autoguidance: Weaker model that guidance steers away from: an earlier checkpoint or a smaller network.
        image: Start image of the model's size.
        strength: How much of the start image is resampled, from 0 (nothing) to 1 (everything); by default 0.6, or 1
            with a mask.
        mask: Mask of the same size as the image. The image is resampled where the mask is white or True.

    Raises:
        UserError: A setting is invalid.
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
            raise UserError(f"The number of images is {self.num}. Set num to at least 1.")
        if not 0 <= self.seed <= 2**32 - self.num:
            raise UserError(f"The seed is {self.seed}. Set seed to an integer from 0 to {2**32 - self.num}.")
        if self.image is None and (self.mask is not None or self.strength is not None):
            raise UserError("A mask or strength needs a start image. Set image, or remove mask and strength.")
        if self.autoguidance and self.negative_prompt.strip():
            raise UserError("Autoguidance can't be combined with a negative prompt. Remove one of the two.")
        if self.autoguidance and self.path_drop:
            raise UserError("Autoguidance can't be combined with path-drop guidance. Remove one of the two.")

    def sampling(self, about: About) -> Sampling:
        """Returns the sampler settings, with the model's defaults for those that are None."""
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
    """Loads a model. Its encoders are loaded on first use.

    Args:
        path: Work directory of a run, or a model folder.
        step: Step of the checkpoint; by default the newest.
        batch_size: Number of images per batch. Images do not depend on it.
        params: Weights to load, 'ema' or 'raw'; by default the EMA weights if the checkpoint has them.

    Raises:
        UserError: The model or checkpoint does not exist, or the checkpoint has no EMA weights.
    """
    path = Path(path)
    values, config, fields = read_model(path, step, params)
    config_hash = hash_text(json.dumps(read_config(path / "config.json"), sort_keys=True))[:12]
    vae_folder = str(path / VAE) if fields.pop("vae_included", False) else ""
    fields["source"] = str(fields["source"])
    about = About(name=path.resolve().name, config_hash=config_hash, vae_folder=vae_folder, **fields)
    return Model(values, config, about, batch_size)


class Model:
    """A trained network with its encoders.

    Attributes:
        config: Network configuration.
        about: Origin, encoders and default settings.
        params: Network parameters by name.
        batch_size: Number of images per batch.
        warn: Called with the text of each warning, for example if a prompt is too long.
    """

    def __init__(self, params: dict[str, np.ndarray], config: DiTConfig, about: About, batch_size: int = BATCH_SIZE):
        if batch_size < 1:
            raise UserError(f"The batch size is {batch_size}. Set batch_size to at least 1.")
        self.config, self.about, self.batch_size = config, about, batch_size
        self.params = {name: jnp.asarray(value) for name, value in params.items()}
        self.warn: Callable[[str], object] = warnings.warn
        self._generator = Generator(config, sigma_data=about.sigma_data)
        self._encoders: dict[str, Any] = {}
        self._embeddings: dict[str, np.ndarray] = {}

    def share(self, other: "Model") -> None:
        """Shares the encoders and compiled programs of another model if it has the same network and encoders."""
        own = ("name", "step", "config_hash", "source", "guidance", "steps", "path_drop", "params")
        about = dataclasses.replace(other.about, **{name: getattr(self.about, name) for name in own})
        if (self.config, self.about) == (other.config, about):
            self._generator, self._encoders, self._embeddings = other._generator, other._encoders, other._embeddings

    # ---- Images ------------------------------------------------------------------------------------------------------

    def generate(self, prompts: str | Sequence[str], *args: Any, **kwargs: Any) -> list[Image.Image]:
        """Generates images for prompts. The arguments are the same as for `latents`."""
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
        """Samples latents for prompts.

        Args:
            prompts: One prompt or several. An empty prompt is unconditional.
            settings: Settings; by default those of the model.
            progress: Whether to show a progress bar.
            watch: Called after each denoiser call with the fraction done, from 0 to 1, the indices (B,) of the images
                in the batch, and their denoised latents (B, H, W, C).
            **changes: Fields of GenerationSettings that replace those of `settings`.

        Returns:
            (n, H, W, C) float32, latents of `num` images per prompt, in the order of the prompts.

        Raises:
            UserError: A setting is invalid, or an encoder does not match the model.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("The list of prompts is empty. Add at least one prompt.")
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
        """Returns the PNG metadata other than prompt and seed. `image` and `mask` are the names of the input files."""
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
        """Decodes latents (n, H, W, C) to n images."""
        n, decode = len(latents), self.image_encoder.decode
        images = (image for rows in batches(n, self.batch_size) for image in to_uint8(decode(latents[rows])))
        return list(map(Image.fromarray, itertools.islice(images, n)))

    def encode(self, image: Image.Image) -> np.ndarray:
        """Encodes an image of the model's size to latents (H, W, C) float32, the mean of the encoder's posterior."""
        side = self.config.input_size * self.image_encoder.downsample
        if image.size != (side, side):
            width, height = image.size
            raise UserError(
                f"The image has {width}×{height} pixels, but the model needs {side}×{side}. Resize or crop the image."
            )
        mean, _ = self.image_encoder.encode(np.asarray(image.convert("RGB"))[None])
        return np.asarray(mean[0], np.float32)

    # ---- Prompts -----------------------------------------------------------------------------------------------------

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeds prompts as (n, L, Y) float32, and warns if a prompt is too long and will be truncated.

        Each prompt is encoded separately, so its embedding does not depend on the other prompts.
        """
        for prompt in dict.fromkeys(prompts):
            (caption,) = clean_captions([prompt], self.about.caption_cleaning)  # as in training
            if not caption.strip():
                shape = (self.about.caption_tokens, self.config.caption_channels)
                self._embeddings[prompt] = np.zeros(shape, np.float32)
                continue
            if cut := self._cut(caption):
                count, kept = cut
                self.warn(
                    f"The prompt has {count} tokens, but the limit of the text encoder is {self.about.caption_tokens}. "
                    f"It is truncated to {kept!r}, without {caption[len(kept) :].strip()!r}."
                )
            if prompt not in self._embeddings:
                self._embeddings[prompt] = np.asarray(self.text_encoder.encode([caption])[0], np.float32)
        return np.stack([self._embeddings[prompt] for prompt in prompts])

    def _cut(self, caption: str) -> tuple[int, str] | None:
        """Returns the token count of a caption that is too long and the words that fit; None if all of it fits."""
        (count,) = self.text_encoder.count_tokens([caption])
        most = self.about.caption_tokens
        if count <= most:
            return None
        parts = (caption[:i] for i in reversed(range(len(caption))) if caption[i].isspace())
        return count, next((part for part in parts if self.text_encoder.count_tokens([part])[0] <= most), "")

    # ---- Encoders ----------------------------------------------------------------------------------------------------

    @property
    def image_encoder(self) -> Any:
        """The `encoders.image.ImageEncoder`. Raises UserError if it does not match the model."""
        if "image" not in self._encoders:
            from micro_dit.encoders.image import load_image_encoder

            name, trained_with = self.about.vae, self.about.vae_fingerprint
            encoder = load_image_encoder(self.about.vae_folder or name)
            _check_encoder(encoder, name, "latents", self.config.in_channels, trained_with)
            self._encoders["image"] = encoder
        return self._encoders["image"]

    @property
    def text_encoder(self) -> Any:
        """The `encoders.text.TextEncoder`. Raises UserError if it does not match the model."""
        if "text" not in self._encoders:
            from micro_dit.encoders.text import load_text_encoder

            name, trained_with = self.about.text_encoder, self.about.text_fingerprint
            encoder = load_text_encoder(name, self.about.caption_tokens)
            _check_encoder(encoder, name, "embeddings", self.config.caption_channels, trained_with)
            self._encoders["text"] = encoder
        return self._encoders["text"]

    # ---- Settings ----------------------------------------------------------------------------------------------------

    def _check_weak(self, weak: "Model") -> None:
        """Raises UserError if another model can't be used for autoguidance of this one."""
        pairs = [(self.config, weak.config, name) for name in ("input_size", "in_channels", "caption_channels")]
        names = ("sigma_data", "text_encoder", "caption_tokens", "caption_cleaning", "vae")
        for ours, theirs, name in pairs + [(self.about, weak.about, name) for name in names]:  # type: ignore[operator]
            if getattr(ours, name) != getattr(theirs, name):
                raise UserError(
                    f"Autoguidance needs a model with {name} {getattr(ours, name)}, but {weak.about.name} has "
                    f"{getattr(theirs, name)}. Set autoguidance to another model."
                )

    def _latent_mask(self, mask: Image.Image | np.ndarray) -> np.ndarray:
        """Returns the mask of the latents, (H, W, 1) bool, which is True if any pixel of a latent is resampled."""
        pixels: np.ndarray
        pixels = np.asarray(mask.convert("L")) > 127 if isinstance(mask, Image.Image) else np.asarray(mask, bool)
        side, f = self.config.input_size, self.image_encoder.downsample
        if pixels.shape != (side * f, side * f):
            found = "×".join(map(str, pixels.shape[::-1]))
            raise UserError(
                f"The mask has {found} pixels, but the model needs {side * f}×{side * f}. Resize or crop the mask."
            )
        if not pixels.any():
            raise UserError("The mask is completely black. Make it white where the image is to be resampled.")
        return np.any(pixels.reshape(side, f, side, f, 1), axis=(1, 3))


def _check_encoder(encoder: Any, name: str, output: str, channels: int, trained_with: str) -> None:
    """Raises UserError if an encoder has the wrong number of channels or is not the one from training."""
    if encoder.channels != channels:
        raise UserError(
            f"{name} has {output} with {encoder.channels} channels, but the model needs {channels}. Set the encoder in "
            "the model's config.json to the one that it was trained with."
        )
    if trained_with not in ("", UNVERIFIED, encoder.fingerprint):
        raise UserError(
            f"The model was trained with another version of {name} (fingerprint {trained_with}, found "
            f"{encoder.fingerprint}). Restore the encoder files from training."
        )
