"""Samples the same prompts with the same seeds again and again while a model trains, so that progress can be seen."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.data.captions import clean_captions
from micro_dit.data.shards import Manifest
from micro_dit.encoders.info import same_encoder
from micro_dit.errors import UserError
from micro_dit.evaluation.evaluator import Picture, Results, Schedule, Weights
from micro_dit.files import replacing
from micro_dit.images import caption_grid

# (parameters, captions (n, L, Y), n seeds) → images (n, H, W, 3) uint8.
SampleImages = Callable[[Any, np.ndarray, Sequence[int]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Previews:
    """Samples a captioned grid of images.

    Attributes:
        prompts: The prompts; image i has seed i.
        captions: (n, L, Y) embeddings of the prompts.
        sample: Samples images with the phase's network.
        schedule: When to run.
        run_name: Name of the run, for the PNG's metadata.
        metadata: Further fields of the PNG's metadata.
    """

    prompts: Sequence[str]
    captions: np.ndarray
    sample: SampleImages
    schedule: Schedule
    run_name: str
    metadata: Mapping[str, str]

    def due(self, step: int) -> bool:
        """Returns whether to run after a step."""
        return self.schedule.due(step)

    def run(self, weights: Weights, step: int) -> Results:
        """Returns the grid, as image 'samples'."""
        images = self.sample(weights.best, self.captions, range(len(self.prompts)))
        grid = caption_grid(images, self.prompts, title=f"step {step:,}")
        metadata = {
            "prompts": " | ".join(self.prompts),
            "seeds": f"0 to {len(self.prompts) - 1}",
            "checkpoint": f"step {step} of {self.run_name}",
        }
        return Results(images={"samples": Picture(np.asarray(grid), metadata | dict(self.metadata))})


def load_matching_image_encoder(vae: str, manifest: Manifest) -> Any:
    """Loads an image encoder.

    Raises:
        UserError: The shards were made with another one.
    """
    from micro_dit.encoders.image import load_image_encoder

    encoder = load_image_encoder(vae)
    if not same_encoder(encoder, manifest.vae):
        raise UserError(
            f"the shards were made with image encoder {manifest.vae.name} ({manifest.vae.fingerprint}), but {vae} "
            f"is {encoder.fingerprint}: make the shards again, or set --config.data.vae to theirs."
        )
    return encoder


def embed_prompts(prompts: Sequence[str], text_encoder: str, manifest: Manifest, cache: Path) -> np.ndarray:
    """Embeds prompts, cleaned as the shards' captions were.

    Args:
        prompts: The prompts.
        text_encoder: Name of the text encoder.
        manifest: Manifest of the shards.
        cache: File that keeps the embeddings, so that a restart needs no text encoder.

    Returns:
        Embeddings (n, L, Y).

    Raises:
        UserError: The shards were made with another text encoder.
    """
    from micro_dit.encoders.text import load_text_encoder

    about, prompts = manifest.text_encoder, clean_captions(prompts, manifest.caption_cleaning)
    key = json.dumps([prompts, about.name, about.fingerprint])
    if cache.exists():
        with np.load(cache) as saved:
            if str(saved["key"]) == key:
                return saved["captions"]
    encoder = load_text_encoder(text_encoder, about.tokens)
    if not same_encoder(encoder, about):
        raise UserError(
            f"the shards were made with text encoder {about.name} ({about.fingerprint}), but {text_encoder} is "
            f"{encoder.fingerprint}: make the shards again, or set --config.data.text_encoder to theirs."
        )
    captions = encoder.encode(prompts)
    if jax.process_index() == 0:
        with replacing(cache) as temporary, temporary.open("wb") as file:
            np.savez(file, key=key, captions=captions)
    return captions
