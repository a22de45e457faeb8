"""Previews: image grids sampled during training with fixed prompts and seeds, so that progress is visible."""

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
    """Evaluator that samples a captioned grid of images.

    Attributes:
        prompts: The prompts. Image i has seed i.
        captions: (n, L, Y), embeddings of the prompts.
        sample: Samples images with the network of the phase.
        schedule: When to run.
        run_name: Name of the run, for the PNG metadata.
        metadata: Further fields of the PNG metadata.
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
        """Samples the images and returns the grid under the name 'samples'."""
        images = self.sample(weights.best, self.captions, range(len(self.prompts)))
        grid = caption_grid(images, self.prompts, title=f"step {step:,}")
        metadata = {
            "prompts": " | ".join(self.prompts),
            "seeds": f"0 to {len(self.prompts) - 1}",
            "checkpoint": f"step {step} of {self.run_name}",
        }
        return Results(images={"samples": Picture(np.asarray(grid), metadata | dict(self.metadata))})


def load_matching_image_encoder(vae: str, manifest: Manifest) -> Any:
    """Loads the image encoder and checks that the shards were built with it.

    Args:
        vae: Name of the image encoder.
        manifest: Manifest of the shards.

    Raises:
        UserError: The shards were built with another image encoder.
    """
    from micro_dit.encoders.image import load_image_encoder

    encoder = load_image_encoder(vae)
    if not same_encoder(encoder, manifest.vae):
        raise UserError(
            f"The shards were built with the image encoder {manifest.vae.name} ({manifest.vae.fingerprint}), but {vae} "
            f"has the fingerprint {encoder.fingerprint}. Set --config.data.vae to the encoder of the shards, or "
            "rebuild the shards."
        )
    return encoder


def embed_prompts(prompts: Sequence[str], text_encoder: str, manifest: Manifest, cache: Path) -> np.ndarray:
    """Embeds prompts after the same cleaning as the captions of the shards.

    Args:
        prompts: The prompts.
        text_encoder: Name of the text encoder.
        manifest: Manifest of the shards.
        cache: File for the embeddings, so that a resumed run does not have to load the text encoder.

    Returns:
        (n, L, Y), embeddings.

    Raises:
        UserError: The shards were built with another text encoder.
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
            f"The shards were built with the text encoder {about.name} ({about.fingerprint}), but {text_encoder} has "
            f"the fingerprint {encoder.fingerprint}. Set --config.data.text_encoder to the encoder of the shards, or "
            "rebuild the shards."
        )
    captions = encoder.encode(prompts)
    if jax.process_index() == 0:
        with replacing(cache) as temporary, temporary.open("wb") as file:
            np.savez(file, key=key, captions=captions)
    return captions
