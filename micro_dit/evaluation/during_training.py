"""The same metrics while a run trains, on a small set of images that is drawn anew each time, with the same seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.data.pipeline import load_split
from micro_dit.diffusion.generate import Generator, Sampling
from micro_dit.errors import UserError
from micro_dit.evaluation.domain import real_images
from micro_dit.evaluation.image_sets import InMemory, numbered
from micro_dit.evaluation.registry import MetricInputs, load_metrics
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import Params


def make_training_evaluation(
    network: DiTConfig,
    *,
    every: int,
    metrics: Sequence[str],
    num_images: int,
    shards: str | Path,
    split: str,
    resolution: int,
    vae: str,
    sampling: Sampling,
    sigma_data: float,
    dtype: Any,
    sharding: Any = None,
    reference: str = "",
    clip: str = "",
    inception: str = "",
    warn: Callable[[str], object] = lambda text: None,
) -> Callable[[Params], dict[str, float]] | None:
    """A function from parameters to numbers, by the name of the metric.

    Args:
        network: that is trained.
        every: after how many steps it will be called; if that is 0, never: there is none.
        metrics: some of registry.METRICS.
        num_images: how many are drawn; image i has seed i, and the captions of the split in turn.
        shards: folder of shards whose captions are sampled.
        split: split of the shards.
        resolution: side of the images in pixels.
        vae: name of the image encoder.
        sampling: Sampler settings.
        sigma_data: as for `micro_dit.diffusion.generate.Generator`.
        dtype: likewise.
        sharding: likewise.
        reference: as of `registry.MetricInputs`.
        clip: likewise.
        inception: likewise.
        warn: is told what should be known of the numbers, the first time.

    Returns:
        parameters → {'evaluation/fid': 12.7, …}; {} on all processes but the first, which draw along.

    Raises:
        UserError: something that a metric needs is missing.
    """
    from micro_dit.encoders.image import load_image_encoder

    if not every:
        return None
    if num_images < 1:
        raise UserError(f"evaluation.num_images is {num_images}: use at least 1.")
    image_encoder = load_image_encoder(vae)
    told: set[str] = set()

    def once(text: str) -> None:
        if text not in told:
            warn(text)
        told.add(text)

    main = jax.process_index() == 0
    measure_images = load_metrics(metrics if main else (), MetricInputs(
        side=resolution, reference=reference, clip=clip, inception=inception, warn=once,
        real=real_images(shards, resolution) if main and "domain" in metrics else None, image_encoder=image_encoder,
    ))  # fmt: skip
    data = load_split(shards, split, resolution, num_images)
    captions = data["caption"][np.arange(num_images) % len(data["text"])]
    generator = Generator(network, sigma_data=sigma_data, dtype=dtype, sharding=sharding)

    def evaluation(params: Params) -> dict[str, float]:
        images = generator.images(params, captions, range(num_images), sampling, image_encoder.decode)
        measures = measure_images(InMemory(images, numbered(data["text"], num_images))) if main else []
        return {f"evaluation/{measure.name}": measure.value for measure in measures}

    return evaluation
