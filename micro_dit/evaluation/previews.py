"""Sample grids while training: the same prompts and seeds each time, so that progress can be seen."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.data.captions import clean_captions
from micro_dit.data.shards import Manifest
from micro_dit.diffusion.generate import Generator, Sampling
from micro_dit.encoders.info import same_encoder
from micro_dit.errors import UserError
from micro_dit.files import replacing
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import Params


class Previews:
    """Draws workdir/samples/step_00000500.png."""

    def __init__(
        self,
        workdir: Path,
        prompts: Sequence[str],
        manifest: Manifest,
        *,
        vae: str,
        text_encoder: str,
        sampling: Sampling,
        sigma_data: float,
        dtype: Any,
        sharding: Any = None,
    ):
        """Checks the encoders against the shards and embeds the prompts, once for a work directory.

        Args:
            workdir: of the run.
            prompts: what is drawn; none draws nothing.
            manifest: of the shards; its encoders must be the ones given here.
            vae: name of the image encoder.
            text_encoder: name of the text encoder.
            sampling: Sampler settings.
            sigma_data: as in training.
            dtype: as in training.
            sharding: of the latents, on all devices of the parameters; None with a single device.

        Raises:
            UserError: the shards were made with other encoders.
        """
        from micro_dit.encoders.image import load_image_encoder

        self.workdir, self.prompts, self.manifest = workdir, list(prompts), manifest
        self._sampling, self._sigma_data, self._dtype = sampling, sigma_data, dtype
        self._sharding = sharding
        self._generators: dict[DiTConfig, Generator] = {}
        if not self.prompts:
            return
        self._image_encoder = load_image_encoder(vae)
        if not same_encoder(self._image_encoder, manifest.vae):
            raise UserError(
                f"the shards were made with image encoder {manifest.vae.name} ({manifest.vae.fingerprint}), but {vae} "
                f"is {self._image_encoder.fingerprint}: make the shards again, or set --config.data.vae to theirs."
            )
        self._captions = self._embed(text_encoder)

    def _embed(self, name: str) -> np.ndarray:
        """Embeddings of the prompts (n, L, Y), cleaned as the shards' captions were.

        They are kept in the work directory, so that a restart needs no text encoder.
        """
        about, cache = self.manifest.text_encoder, self.workdir / "prompts.npz"
        prompts = clean_captions(self.prompts, self.manifest.caption_cleaning)
        key = json.dumps([prompts, about.name, about.fingerprint])
        if cache.exists():
            with np.load(cache) as saved:
                if str(saved["key"]) == key:
                    return saved["captions"]
        from micro_dit.encoders.text import load_text_encoder

        encoder = load_text_encoder(name, about.tokens)
        if not same_encoder(encoder, about):
            raise UserError(
                f"the shards were made with text encoder {about.name} ({about.fingerprint}), but {name} is "
                f"{encoder.fingerprint}: make the shards again, or set --config.data.text_encoder to theirs."
            )
        captions = encoder.encode(prompts)
        if jax.process_index() == 0:
            with replacing(cache) as temporary, temporary.open("wb") as file:
                np.savez(file, key=key, captions=captions)
        return captions

    def draw(self, network: DiTConfig, params: Params, step: int) -> np.ndarray | None:
        """Saves the grid of a step and returns it, uint8 (H, W, 3); None if there are no prompts."""
        if not self.prompts:
            return None
        from micro_dit.images import caption_grid, save_png

        if network not in self._generators:
            self._generators[network] = Generator(
                network, sigma_data=self._sigma_data, dtype=self._dtype, sharding=self._sharding
            )
        images = self._generators[network].images(
            params, self._captions, range(len(self.prompts)), self._sampling, self._image_encoder.decode
        )
        grid = caption_grid(images, self.prompts, title=f"step {step:,}")
        if jax.process_index() == 0:
            save_png(grid, self.workdir / "samples" / f"step_{step:08d}.png", self.metadata(step))
        return np.asarray(grid)

    def metadata(self, step: int) -> dict[str, str]:
        """What a PNG should tell of itself."""
        return {
            "prompts": " | ".join(self.prompts),
            "seeds": f"0 to {len(self.prompts) - 1}",
            "sampler": f"{self._sampling.sampler}, {self._sampling.steps} steps",
            "guidance": str(self._sampling.guidance),
            "checkpoint": f"step {step} of {self.workdir.name}",
            "attribution": self.manifest.attribution,
        }
