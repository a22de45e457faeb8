"""The domain metric on correct, wrong and damaged images."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from micro_dit.errors import UserError
from micro_dit.evaluation.domain import domain_measures, pool, retrieval_ranks
from micro_dit.evaluation.image_sets import InMemory

# An encoder whose latents are the scaled pixels.
ENCODER: Any = SimpleNamespace(
    name="pixels", fingerprint="0123", encode=lambda images: (images.astype(np.float32) / 127.5 - 1, None)
)


def random_images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)


CAPTIONS = [f"image {number}" for number in range(300)]
REAL = {"latent_mean": ENCODER.encode(random_images(300))[0].astype(np.float16), "text": CAPTIONS}


def measured(images: np.ndarray, prompts: list[str]) -> dict[str, Any]:
    return {m.name: m for m in domain_measures(InMemory(images, prompts), REAL, ENCODER)}


def test_retrieval_finds_the_real_images_and_no_others() -> None:
    right = measured(random_images(300), CAPTIONS)
    assert right["caption_retrieval_top1"].value == right["caption_retrieval_top5"].value == 1
    assert abs(right["latent_frechet"].value) < 1e-3
    wrong = measured(random_images(300), CAPTIONS[1:] + CAPTIONS[:1])
    assert wrong["caption_retrieval_top1"].value == 0
    assert wrong["caption_retrieval_top5"].value <= 0.05
    assert wrong["caption_retrieval_top5"].pipeline["by chance"] == pytest.approx(5 / 300, abs=1e-4)
    assert abs(wrong["latent_frechet"].value) < 1e-3  # it does not depend on captions
    assert measured(random_images(300, seed=1) // 2, CAPTIONS)["latent_frechet"].value > 0.1


def test_retrieval_decreases_with_damage() -> None:
    noise = np.random.default_rng(2).normal(0, 1, (300, 8, 8, 3))
    ranks = []
    for amount in (0, 150, 400, 1000):
        damaged = np.clip(random_images(300) + amount * noise, 0, 255).astype(np.uint8)
        ranks.append(measured(damaged, CAPTIONS)["caption_retrieval_top1"].value)
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1] + 0.2


def test_retrieval_ranks_of_a_small_example() -> None:
    real = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]]).reshape(4, 1, 1, 2)
    generated = np.array([[2.0, 0.1], [2.0, 0.1], [0.1, 1.0]]).reshape(3, 1, 1, 2)
    captions = ["right", "up", "left", "up"]  # the better rank of the two images with the caption "up" is used
    assert retrieval_ranks(generated, ["right", "left", "up"], real, captions).tolist() == [1, 4, 1]


def test_pooling_averages_rows_and_columns() -> None:
    latents = np.arange(2 * 8 * 6 * 3, dtype=np.float32).reshape(2, 8, 6, 3)
    pooled = pool(latents)
    assert pooled.shape == (2, 4 * 4 * 3)
    np.testing.assert_allclose(pooled[1, :3], latents[1, :2, :2].mean((0, 1)))
    np.testing.assert_allclose(pooled[0, -3:], latents[0, -2:, -1:].mean((0, 1)))


def test_standard_error_is_over_captions_not_images() -> None:
    prompts = [caption for caption in CAPTIONS[:2] for _ in range(8)]
    images = random_images(300)[[0] * 8 + [2] * 8]  # always right, never right
    found = measured(images, prompts)["caption_retrieval_top1"]
    assert found.value == 0.5
    assert found.pipeline["standard error over captions"] == 0.5
    assert found.pipeline["captions"] == 2


def test_prompts_that_are_not_captions_are_rejected() -> None:
    with pytest.raises(UserError, match="needs captions of the shards as prompts, but 'a lighthouse' is not one"):
        measured(random_images(1), ["a lighthouse"])
