"""What can be said of drawings that no public network knows well, in the features of the autoencoder they came through.

Two numbers, for images whose prompts are captions of the shards:

Caption retrieval: of a generated image, the real ones are ranked by similarity; how often is the one whose caption it
was drawn from the first, or among the first five? What a network has seen shows with captions of the training split,
what it makes of new ones with those of the held-out split.

Latent Fréchet distance: Fréchet distance between generated and real images, in latents averaged to 4×4. It is no FID:
latents know shapes and colors, not what they mean; it compares runs on the same shards with the same autoencoder.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from micro_dit.data.mixture import read_mix
from micro_dit.data.pipeline import load_split
from micro_dit.errors import UserError
from micro_dit.evaluation.fid import frechet_distance, statistics
from micro_dit.evaluation.image_sets import Images, fill_batch
from micro_dit.evaluation.measures import Measure

POOLED = 4  # rows and columns that latents are averaged to for the Fréchet distance
MOST = 2000  # real images of a split
BATCH_SIZE = 16
TOP = (1, 5)


def domain_measures(
    images: Images, real: Mapping[str, Any], image_encoder: Any, warn: Callable[[str], object] = lambda text: None
) -> list[Measure]:
    """Computes caption retrieval and the latent Fréchet distance of images with prompts.

    Args:
        images: The images.
        real: 'latent_mean' (m, h, w, C) and 'text', m captions, as `load_split` returns them.
        image_encoder: The `ImageEncoder` of the real latents.
        warn: Prints a warning of too few images.

    Raises:
        UserError: The prompts are not captions of the real images.
    """
    check_prompts(images.prompts, real["text"])
    encoded = [(image_encoder.encode(fill_batch(b, BATCH_SIZE))[0], len(b)) for b in images.batches(BATCH_SIZE)]
    latents = np.concatenate([np.asarray(latents, np.float32)[:count] for latents, count in encoded])
    theirs = np.asarray(real["latent_mean"], np.float32)
    about_encoder = f"latents of {image_encoder.name} ({image_encoder.fingerprint})"
    features = {"features": about_encoder, "real images": len(theirs)}
    ranks = retrieval_ranks(latents, images.prompts, theirs, real["text"])
    measures = []
    for k in TOP:
        pipeline = features | {
            "ranking": "cosine similarity of latents, less the mean of the real ones",
            "captions": len(set(images.prompts)),
            "by chance": round(min(k / len(theirs), 1), 4),
            "standard error over captions": round(_error(ranks <= k, images.prompts), 4),
        }  # fmt: skip
        measures.append(Measure(f"caption_retrieval_top{k}", float((ranks <= k).mean()), "higher", pipeline))
    pooled = [pool(array) for array in (latents, theirs)]
    dimensions = pooled[0].shape[1]
    if min(len(latents), len(theirs)) <= dimensions:
        sizes = f"{len(latents)} generated and {len(theirs)} real images"
        warn(f"the latent Fréchet distance of {sizes} is too large, as their {dimensions} features need more images.")
    distance = frechet_distance(*(statistics([array], {}) for array in pooled))
    pooling = f"mean, to {POOLED}×{POOLED}, {dimensions} numbers"
    pipeline = features | {"pooling": pooling, "statistics": "float64, n - 1"}
    return [*measures, Measure("latent_frechet", distance, "lower", pipeline)]


def check_prompts(prompts: Sequence[str], captions: Sequence[str]) -> None:
    """Raises UserError if a prompt is not the caption of a real image."""
    if unknown := sorted(set(prompts) - set(captions)):
        raise UserError(
            f"the domain metric needs captions of the shards as prompts, and {unknown[0]!r} is none: use "
            "--prompts=heldout or --prompts=train, or leave out 'domain'."
        )


def real_images(shards: str | Path, resolution: int) -> dict[str, Any]:
    """Latents (m, h, w, C) and captions, 'latent_mean' and 'text', of both splits; at most 2,000 of each."""
    manifest = read_mix(shards).manifest()
    splits = [load_split(shards, split, resolution, MOST) for split in manifest.splits if manifest.records(split)]
    return {
        "latent_mean": np.concatenate([split["latent_mean"] for split in splits]),
        "text": [text for split in splits for text in split["text"]],
    }


def retrieval_ranks(
    latents: np.ndarray, prompts: Sequence[str], real: np.ndarray, captions: Sequence[str]
) -> np.ndarray:
    """The place (n,) of each prompt's real image among all, 1 the most similar to the generated one.

    `latents` are (n, h, w, C), `real` is (m, h, w, C). Of several images with the prompt as caption the best counts.
    """
    center = real.mean(0)

    def directions(array: np.ndarray) -> np.ndarray:
        flat = (array - center).reshape(len(array), -1).astype(np.float64)
        return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)

    similarity = directions(latents) @ directions(real).T
    truth = np.array([[caption == prompt for caption in captions] for prompt in prompts])
    best = np.where(truth, similarity, -np.inf).max(1, keepdims=True)
    return 1 + ((similarity > best) & ~truth).sum(1)


def pool(latents: np.ndarray) -> np.ndarray:
    """(n, h, w, C) → (n, 4·4·C): means over as many parts of rows and columns."""
    rows = np.stack([part.mean(1) for part in np.array_split(latents, min(POOLED, latents.shape[1]), 1)], 1)
    both = np.stack([part.mean(2) for part in np.array_split(rows, min(POOLED, rows.shape[2]), 2)], 2)
    return both.reshape(len(latents), -1)


def _error(hits: np.ndarray, prompts: Sequence[str]) -> float:
    """Standard error of the mean: images of one caption are alike, so captions count, not images."""
    by_caption = [np.mean([h for h, p in zip(hits, prompts, strict=True) if p == caption]) for caption in set(prompts)]
    return float(np.std(by_caption, ddof=1) / np.sqrt(len(by_caption))) if len(by_caption) > 1 else float("nan")
