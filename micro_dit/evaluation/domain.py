"""Metrics for domains that public feature networks do not cover well, such as drawings.

The features are the latents of the run's own autoencoder. The prompts have to be captions of the shards.

Caption retrieval: real images are ranked by their similarity to a generated image. The metric is the fraction of
generated images for which the real image with the same caption is ranked first, or among the first five. Captions of
the training split measure memorization, captions of the held-out split measure generalization.

Latent Fréchet distance: the Fréchet distance between the latents of generated and real images, averaged to 4×4. It is
not comparable to FID, because latents represent shapes and colors but not their meaning. Use it to compare runs on the
same shards with the same autoencoder.
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

POOLED = 4  # rows and columns of the averaged latents for the Fréchet distance
MOST = 2000  # largest number of real images per split
BATCH_SIZE = 16
TOP = (1, 5)


def domain_measures(
    images: Images, real: Mapping[str, Any], image_encoder: Any, warn: Callable[[str], object] = lambda text: None
) -> list[Measure]:
    """Computes caption retrieval and the latent Fréchet distance of generated images.

    Args:
        images: Generated images with prompts.
        real: 'latent_mean' (m, h, w, C) and 'text' (m captions), as returned by `load_split`.
        image_encoder: The `ImageEncoder` that computed the real latents.
        warn: Called with a warning if there are too few images for the Fréchet distance.

    Raises:
        UserError: A prompt is not a caption of a real image.
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
            "ranking": "cosine similarity of latents minus the mean of the real latents",
            "captions": len(set(images.prompts)),
            "by chance": round(min(k / len(theirs), 1), 4),
            "standard error over captions": round(_error(ranks <= k, images.prompts), 4),
        }  # fmt: skip
        measures.append(Measure(f"caption_retrieval_top{k}", float((ranks <= k).mean()), "higher", pipeline))
    pooled = [pool(array) for array in (latents, theirs)]
    dimensions = pooled[0].shape[1]
    if min(len(latents), len(theirs)) <= dimensions:
        warn(
            f"The latent Fréchet distance is overestimated: it has {dimensions} features, but there are only "
            f"{len(latents)} generated and {len(theirs)} real images. Increase the number of images with --num_images "
            "or --config.evaluation.num_images."
        )
    distance = frechet_distance(*(statistics([array], {}) for array in pooled))
    pooling = f"mean to {POOLED}×{POOLED}, {dimensions} features"
    pipeline = features | {"pooling": pooling, "statistics": "float64, n - 1"}
    return [*measures, Measure("latent_frechet", distance, "lower", pipeline)]


def check_prompts(prompts: Sequence[str], captions: Sequence[str]) -> None:
    """Raises UserError if a prompt is not the caption of a real image."""
    if unknown := sorted(set(prompts) - set(captions)):
        raise UserError(
            f"The domain metric needs captions of the shards as prompts, but {unknown[0]!r} is not one of them. Set "
            "--prompts=heldout or --prompts=train, or remove domain from --metrics."
        )


def real_images(shards: str | Path, resolution: int) -> dict[str, Any]:
    """Loads the real images of all splits, at most MOST of each.

    Returns:
        'latent_mean' (m, h, w, C), latents, and 'text', m captions.
    """
    manifest = read_mix(shards).manifest()
    splits = [load_split(shards, split, resolution, MOST) for split in manifest.splits if manifest.records(split)]
    return {
        "latent_mean": np.concatenate([split["latent_mean"] for split in splits]),
        "text": [text for split in splits for text in split["text"]],
    }


def retrieval_ranks(
    latents: np.ndarray, prompts: Sequence[str], real: np.ndarray, captions: Sequence[str]
) -> np.ndarray:
    """Ranks the real images by their similarity to each generated image.

    Args:
        latents: (n, h, w, C), latents of the generated images.
        prompts: n prompts of the generated images.
        real: (m, h, w, C), latents of the real images.
        captions: m captions of the real images.

    Returns:
        (n,) int, rank of the real image whose caption is the prompt, where 1 is the most similar image. If several
        real images have this caption, the best rank.
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
    """Averages latents (n, h, w, C) to POOLED×POOLED and flattens them to (n, 4·4·C)."""
    rows = np.stack([part.mean(1) for part in np.array_split(latents, min(POOLED, latents.shape[1]), 1)], 1)
    both = np.stack([part.mean(2) for part in np.array_split(rows, min(POOLED, rows.shape[2]), 2)], 2)
    return both.reshape(len(latents), -1)


def _error(hits: np.ndarray, prompts: Sequence[str]) -> float:
    """Returns the standard error of the mean over captions, because images with the same caption are correlated."""
    by_caption = [np.mean([h for h, p in zip(hits, prompts, strict=True) if p == caption]) for caption in set(prompts)]
    return float(np.std(by_caption, ddof=1) / np.sqrt(len(by_caption))) if len(by_caption) > 1 else float("nan")
