"""A trained model in three lines:

>>> from micro_dit.api import load
>>> model = load("runs/mask75")
>>> images = model.generate(["red heart", "grinning cat"], seed=0)
"""

import dataclasses
import functools
import hashlib
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
from micro_dit.diffusion.generate import Denoising, Inputs, check_steps, draw_noise, to_uint8, turns
from micro_dit.diffusion.samplers import SAMPLERS, noise_levels, partial_noise_levels
from micro_dit.encoders.info import UNVERIFIED
from micro_dit.errors import UserError
from micro_dit.interop.model_folder import VAE, config_from, is_model_folder, load_model_folder, read_config
from micro_dit.models.config import DiTConfig
from micro_dit.training.pretrained import run_params

BATCH_SIZE = 4  # images at once


@dataclasses.dataclass(frozen=True)
class About:
    """What a model is, besides its parameters.

    Attributes:
        name: of the folder it came from.
        step: of the checkpoint; None if it is not known to be from a run.
        config_hash: twelve hexadecimal digits, the same for the same config.json.
        source: attribution of the images it was trained with, or where the weights come from; may be empty.
        sigma_data: standard deviation of the latents, as in training.
        vae, text_encoder: names of its encoders.
        vae_fingerprint, text_fingerprint: of the encoders it was trained with; empty if not known.
        caption_tokens: L.
        caption_cleaning: what was done to captions (data/captions.py).
        guidance, steps: what is sampled with by default.
        vae_folder: where the VAE's files are; empty if its name tells.
        params: 'raw' if they are not the checkpoint's default, which is the moving average where there is one.
    """

    name: str
    step: int | None
    config_hash: str
    source: str
    sigma_data: float
    vae: str
    text_encoder: str
    vae_fingerprint: str
    text_fingerprint: str
    caption_tokens: int
    caption_cleaning: str
    guidance: float = 5.0
    steps: int = 30
    vae_folder: str = ""
    params: str = ""

    @property
    def where(self) -> str:
        """Where the parameters come from, in words."""
        raw = ", raw parameters" if self.params == "raw" else ""
        return self.name if self.step is None else f"step {self.step} of {self.name}{raw}"


def load(path: str | Path, step: int | None = None, batch_size: int = BATCH_SIZE, params: str | None = None) -> "Model":
    """Loads a model; its encoders follow when they are needed.

    Args:
        path: the work directory of a run, or a model folder (micro_dit/interop/model_folder.py).
        step: the run's checkpoint; the newest if None.
        batch_size: images at once. More are done in turns, fewer are filled up: an image does not depend on how many
            there are.
        params: of the run's checkpoint: 'ema', the moving average, or 'raw', what was trained; by default the average
            where there is one.

    Raises:
        UserError: there is no model, no such checkpoint, or no average in it.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no work directory of a run and no model folder (it has no config.json).")
    fields = read_config(path / "config.json")
    config_hash = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
    name = path.resolve().name
    if is_model_folder(path):
        if step is not None or params is not None:
            raise UserError(f"{path} is a model folder, which has no checkpoints: leave out the step and ema or raw.")
        values, config, told = load_model_folder(path)
        told = {"step": None, "vae_fingerprint": "", "text_fingerprint": ""} | told | {"source": str(told["source"])}
        included = told.pop("vae_included", False)
        about = About(name=name, config_hash=config_hash, vae_folder=str(path / VAE) if included else "", **told)
        return Model(values, config, about, batch_size)
    if "config" not in fields or "shards" not in fields:
        raise UserError(f"{path / 'config.json'} is neither that of a run nor of a model folder.")
    run, shards = fields["config"], fields["shards"]
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path} has no checkpoints yet: train for some steps first.")
    values, meta = run_params(path, step, params)
    about = About(
        name, meta["step"], config_hash, shards.get("attribution", ""),
        sigma_data=run["diffusion"]["sigma_data"], vae=run["data"]["vae"], text_encoder=run["data"]["text_encoder"],
        vae_fingerprint=shards["vae"], text_fingerprint=shards["text_encoder"],
        caption_tokens=shards["caption_tokens"], caption_cleaning=shards.get("caption_cleaning", "none"),
        guidance=run["sampling"]["guidance"], steps=run["sampling"]["steps"], params="raw" if params == "raw" else "",
    )  # fmt: skip
    return Model(values, config_from(meta["model"], f"the checkpoint of step {meta['step']}"), about, batch_size)


class Model:
    """A trained network with its encoders.

    Attributes:
        config: the network's.
        about: what it is and where it comes from.
        batch_size: images at once.
        warn: is told what a user should know, such as a prompt that is too long.
    """

    def __init__(self, params: dict[str, np.ndarray], config: DiTConfig, about: About, batch_size: int = BATCH_SIZE):
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} images: use at least 1.")
        self.config, self.about, self.batch_size = config, about, batch_size
        self.params = {name: jnp.asarray(value) for name, value in params.items()}
        self.warn: Callable[[str], object] = warnings.warn
        self._denoising = Denoising(config, sigma_data=about.sigma_data)
        self._encoders: dict[str, Any] = {}
        self._embeddings: dict[str, np.ndarray] = {}

    def share(self, other: "Model") -> None:
        """Uses the encoders and compiled programs of the other model if its network and encoders are the same."""

        def kind(model: "Model") -> tuple[DiTConfig, About]:
            of_these_params: dict[str, Any]
            of_these_params = dict(name="", step=None, config_hash="", source="", guidance=0, steps=0, params="")
            return model.config, dataclasses.replace(model.about, **of_these_params)

        if kind(self) == kind(other):
            self._denoising, self._encoders, self._embeddings = other._denoising, other._encoders, other._embeddings

    # ---- Images ------------------------------------------------------------------------------------------------------

    def generate(self, prompts: str | Sequence[str], **settings: Any) -> list[Image.Image]:
        """Pictures for prompts; the settings are those of `latents`."""
        return self.decode(self.latents(prompts, **settings))

    def latents(
        self,
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str = "heun",
        guidance_interval: tuple[float, float] | None = None,
        negative_prompt: str = "",
        autoguidance: "Model | None" = None,
        image: Image.Image | None = None,
        strength: float | None = None,
        mask: Image.Image | np.ndarray | None = None,
        progress: bool = False,
        watch: Callable[[float, np.ndarray, np.ndarray], object] | None = None,
    ) -> np.ndarray:
        """Latents (n, H, W, C) float32 for prompts; `decode` makes pictures of them.

        Args:
            prompts: what to draw; an empty one draws anything.
            num: images for each, with the seeds `seed`, `seed` + 1 ….
            seed: of a prompt's first image.
            steps: of the sampler; by default the model's.
            guidance: scale of guidance, by default the model's; 1 is none.
            sampler: 'heun' (two calls of the network a step), 'euler' (which is DDIM) or 'dpmpp_2m' (one call a step).
            guidance_interval: (low, high) noise levels; there is guidance only between them.
            negative_prompt: what guidance leads away from, instead of from what is drawn without a prompt.
            autoguidance: a weaker model to lead away from: an earlier checkpoint, or a smaller network.
            image: to start from instead of noise, of the model's size.
            strength: how much of the image is drawn anew, from 0 (nothing) to 1; by default 0.6, with a mask 1.
            mask: of the image's size; only where it is white (or True) the image is drawn anew.
            progress: shows a bar that counts calls of the network.
            watch: is told after each call of the network how much is done, from 0 to 1, which images it was for, as
                indices (B,), and their latents (B, H, W, C) as it guesses them.

        Raises:
            UserError: a setting makes no sense, or an encoder does not belong to the model.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        steps = self.about.steps if steps is None else steps
        guidance = self.about.guidance if guidance is None else guidance
        self._check(prompts, num, seed, steps, sampler, guidance_interval, negative_prompt, autoguidance)
        start, known, sigmas = self._beginning(image, mask, strength, steps)
        shape = (self.config.input_size, self.config.input_size, self.config.in_channels)
        n = len(prompts) * num
        if sigmas is None:
            return np.broadcast_to(start, (n, *shape)).copy()

        captions = np.repeat(self.embed(prompts), num, axis=0)
        negative = self.embed([negative_prompt])[0]
        noise = draw_noise(self.config, [seed + i for i in range(num)])
        noise = np.tile(noise, (len(prompts), 1, 1, 1)) + start / np.float32(sigmas[0])
        total = -(-n // self.batch_size) * len(SAMPLERS[sampler].columns(sigmas)[0])
        done = itertools.count(1)
        latents = []
        with tqdm(total=total, unit="call", disable=not progress) as bar:

            def after_call(rows: np.ndarray, guess: np.ndarray) -> None:
                bar.update()
                if watch:
                    watch(next(done) / total, rows, guess)

            for rows in turns(n, self.batch_size):
                weak = autoguidance.params if autoguidance else None
                latents.append(self._denoising(
                    Inputs(self.params, captions[rows], negative, weak, known), noise[rows], sigmas,
                    sampler=sampler, guidance=guidance, interval=guidance_interval,
                    weak_config=autoguidance.config if autoguidance else None,
                    after_call=functools.partial(after_call, rows) if progress or watch else None,
                ))  # fmt: skip
        drawn = np.concatenate(latents)[:n]
        return drawn if known is None else np.where(known[1], drawn, known[0])

    def decode(self, latents: np.ndarray) -> list[Image.Image]:
        """Pictures of latents (n, H, W, C)."""
        pictures: list[np.ndarray] = []
        for rows in turns(len(latents), self.batch_size):
            pictures.extend(to_uint8(self.image_encoder.decode(latents[rows])))
        return [Image.fromarray(picture) for picture in pictures[: len(latents)]]

    def encode(self, image: Image.Image) -> np.ndarray:
        """Latents (H, W, C) of a picture, the mean of the encoder's posterior.

        Raises:
            UserError: the picture is not of the model's size.
        """
        side = self.config.input_size * self.image_encoder.downsample
        if image.size != (side, side):
            width, height = image.size
            raise UserError(f"the image has {width}×{height} pixels, the model draws {side}×{side}: resize or crop it.")
        mean, _ = self.image_encoder.encode(np.asarray(image.convert("RGB"))[None])
        return np.asarray(mean[0], np.float32)

    # ---- Prompts -----------------------------------------------------------------------------------------------------

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """Caption embeddings (n, L, Y) float32, each made alone, so that it does not depend on the others.

        Prompts that are too long are cut, and the cut is told to `warn`.
        """
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
        """The tokens of a caption that is too long, and the beginning that is read, in whole words; None if it fits."""
        (count,) = self.text_encoder.count_tokens([caption])
        if count <= self.about.caption_tokens:
            return None
        ends = [i for i, letter in enumerate(caption) if letter.isspace()]
        fitting = (caption[:i] for i in reversed(ends))
        kept = next((k for k in fitting if self.text_encoder.count_tokens([k])[0] <= self.about.caption_tokens), "")
        return count, kept

    # ---- Encoders ----------------------------------------------------------------------------------------------------

    @property
    def image_encoder(self) -> Any:
        """The encoders.image.ImageEncoder; UserError if its latents are not the model's."""
        if "image" not in self._encoders:
            from micro_dit.encoders.image import load_image_encoder

            encoder = load_image_encoder(self.about.vae_folder or self.about.vae)
            if encoder.channels != self.config.in_channels:
                raise UserError(
                    f"{self.about.vae} has latents of {encoder.channels} channels, the model of "
                    f"{self.config.in_channels}: name the VAE that it was trained with in its config.json."
                )
            _check_fingerprint(encoder, self.about.vae, self.about.vae_fingerprint)
            self._encoders["image"] = encoder
        return self._encoders["image"]

    @property
    def text_encoder(self) -> Any:
        """The encoders.text.TextEncoder; UserError if its embeddings are not the model's."""
        if "text" not in self._encoders:
            from micro_dit.encoders.text import load_text_encoder

            encoder = load_text_encoder(self.about.text_encoder, self.about.caption_tokens)
            if encoder.channels != self.config.caption_channels:
                raise UserError(
                    f"{self.about.text_encoder} has embeddings of {encoder.channels} channels, the model takes "
                    f"{self.config.caption_channels}: name the encoder that it was trained with in its config.json."
                )
            _check_fingerprint(encoder, self.about.text_encoder, self.about.text_fingerprint)
            self._encoders["text"] = encoder
        return self._encoders["text"]

    # ---- Settings ----------------------------------------------------------------------------------------------------

    def _check(
        self, prompts: list[str], num: int, seed: int, steps: int, sampler: str,
        interval: tuple[float, float] | None, negative_prompt: str, weak: "Model | None",
    ) -> None:  # fmt: skip
        check_steps(steps, sampler)
        if not prompts or num < 1:
            raise UserError(f"{len(prompts)} prompts and {num} images of each: use at least 1.")
        if not 0 <= seed <= 2**32 - num:
            raise UserError(f"seed {seed}: use a whole number from 0 to {2**32 - num}.")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise UserError(f"the guidance interval {interval[0]:g} to {interval[1]:g} is empty; use 0 <= low < high.")
        if weak is None:
            return
        if negative_prompt.strip():
            raise UserError("autoguidance leads away from another model, not from a negative prompt: leave one out.")
        for field in ("input_size", "in_channels", "caption_channels"):
            ours, theirs = getattr(self.config, field), getattr(weak.config, field)
            if ours != theirs:
                raise UserError(f"autoguidance by {weak.about.name}: its {field} is {theirs}, the model's is {ours}.")
        for field in ("sigma_data", "text_encoder", "caption_tokens", "caption_cleaning", "vae"):
            ours, theirs = getattr(self.about, field), getattr(weak.about, field)
            if ours != theirs:
                raise UserError(f"autoguidance by {weak.about.name}: its {field} is {theirs}, the model's is {ours}.")

    def _beginning(
        self, image: Image.Image | None, mask: Image.Image | np.ndarray | None, strength: float | None, steps: int
    ) -> tuple[Any, tuple[np.ndarray, np.ndarray] | None, np.ndarray | None]:
        """Latents under the noise; with a mask, the known latents and where to redraw; the noise levels, if any."""
        if image is None:
            if mask is not None or strength is not None:
                raise UserError("a mask or a strength needs an image to start from.")
            return np.float32(0), None, noise_levels(steps)
        strength = (0.6 if mask is None else 1.0) if strength is None else strength
        if not 0 <= strength <= 1:
            raise UserError(f"strength {strength:g}: use a number from 0 (the image as it is) to 1.")
        latents = self.encode(image)
        sigmas = partial_noise_levels(steps, strength) if strength > 0 else None
        return latents, None if mask is None else (latents, self._latent_mask(mask)), sigmas

    def _latent_mask(self, mask: Image.Image | np.ndarray) -> np.ndarray:
        """(H, W, 1) bool: True where any pixel of a latent is to be redrawn."""
        pixels: np.ndarray
        pixels = np.asarray(mask.convert("L")) > 127 if isinstance(mask, Image.Image) else np.asarray(mask, bool)
        side, f = self.config.input_size, self.image_encoder.downsample
        if pixels.shape != (side * f, side * f):
            found = "×".join(map(str, pixels.shape[::-1]))
            raise UserError(f"the mask has {found} pixels, the model draws {side * f}×{side * f}: resize or crop it.")
        if not pixels.any():
            raise UserError("the mask is black everywhere: make it white where the image is to be drawn anew.")
        return np.any(pixels.reshape(side, f, side, f, 1), axis=(1, 3))


def _check_fingerprint(encoder: Any, name: str, trained_with: str) -> None:
    if trained_with not in ("", UNVERIFIED, encoder.fingerprint):
        raise UserError(
            f"the model was trained with another {name} ({trained_with}) than is found now ({encoder.fingerprint}): "
            "bring back the files that it was trained with."
        )
