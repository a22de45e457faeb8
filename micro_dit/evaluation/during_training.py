"""Evaluation during training: held-out loss, previews, and metrics of generated images."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from micro_dit.data.mixture import read_mix
from micro_dit.data.pipeline import load_split
from micro_dit.data.shards import Manifest
from micro_dit.diffusion.generate import Generator, Sampling
from micro_dit.errors import UserError
from micro_dit.evaluation.domain import real_images
from micro_dit.evaluation.evaluator import Evaluator, Results, Schedule, Weights
from micro_dit.evaluation.image_sets import InMemory, numbered
from micro_dit.evaluation.previews import Previews, SampleImages, embed_prompts, load_matching_image_encoder
from micro_dit.evaluation.registry import MetricInputs, load_metrics
from micro_dit.evaluation.validation_loss import HeldoutLoss, make_heldout_loss
from micro_dit.models.config import DiTConfig
from micro_dit.training.phases import Phase


@dataclasses.dataclass(frozen=True)
class ImageMetrics:
    """Settings of the metrics of generated images.

    Attributes:
        metrics: Names from `registry.METRICS`.
        num_images: Number of images. Image i has seed i, and the captions of the split are repeated as needed.
        reference: Real images for FID and CMMD; see `registry.MetricInputs`.
        clip: CLIP checkpoint.
        inception: File of Inception weights.
    """

    metrics: Sequence[str]
    num_images: int
    reference: str = ""
    clip: str = ""
    inception: str = ""


class GeneratedImageMetrics:
    """Samples images for the captions of a split and measures them."""

    def __init__(
        self, settings: ImageMetrics, schedule: Schedule, sample: SampleImages, image_encoder: Any, *,
        shards: str | Path, split: str, resolution: int, warn: Callable[[str], object],
    ):  # fmt: skip
        """Loads captions, reference images and the networks of the metrics.

        Args:
            settings: Settings of the metrics.
            schedule: When to run.
            sample: Samples images with the network of the phase.
            image_encoder: Image encoder of the latents.
            shards: Folder of shards, or a mix, with the captions.
            split: Split of the captions.
            resolution: Side of the images in pixels.
            warn: Called once with each distinct warning.

        Raises:
            UserError: The number of images is below 1, or a metric is unknown or lacks an input.
        """
        if settings.num_images < 1:
            raise UserError(
                f"evaluation.num_images is {settings.num_images}. Set --config.evaluation.num_images to at least 1."
            )
        self.schedule, self._sample, self._main = schedule, sample, jax.process_index() == 0
        metrics = settings.metrics if self._main else ()
        self._measure = load_metrics(metrics, MetricInputs(
            side=resolution, reference=settings.reference, clip=settings.clip, inception=settings.inception,
            real=real_images(shards, resolution) if "domain" in metrics else None, image_encoder=image_encoder,
            warn=functools.cache(warn),  # the cache drops repeated warnings
        ))  # fmt: skip
        data, self._seeds = load_split(shards, split, resolution, settings.num_images), range(settings.num_images)
        self._captions = data["caption"][np.arange(settings.num_images) % len(data["text"])]
        self._texts = numbered(data["text"], settings.num_images)

    def due(self, step: int) -> bool:
        """Returns whether to run after a step."""
        return self.schedule.due(step)

    def run(self, weights: Weights, step: int) -> Results:
        """Samples and measures images.

        Returns:
            Scalars such as {'evaluation/fid': 12.7} in process 0; empty results in other processes.
        """
        images = self._sample(weights.best, self._captions, self._seeds)
        measures = self._measure(InMemory(images, self._texts)) if self._main else []
        return Results({f"evaluation/{measure.name}": measure.value for measure in measures})


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the evaluation during training. Every enabled evaluation also runs at the end of each phase.

    Attributes:
        loss_every: Steps between held-out losses. 0 evaluates only at the end of each phase.
        split: Split for the held-out loss and for the captions of the metrics. Empty disables the held-out loss.
        loss_images: Largest number of images for the held-out loss.
        previews_every: Steps between previews. 0 samples only at the end of each phase.
        prompts: Prompts of the previews. Empty disables previews.
        sampling: Sampler settings.
        metrics_every: Steps between metrics of generated images. 0 disables them.
        metrics: Settings of the metrics of generated images.
        vae: Name of the image encoder.
        text_encoder: Name of the text encoder.
        sigma_data: Standard deviation of the latents, as in training.
        dtype: Dtype of the matrix products.
    """

    loss_every: int
    split: str
    loss_images: int
    previews_every: int
    prompts: Sequence[str]
    sampling: Sampling
    metrics_every: int
    metrics: ImageMetrics
    vae: str
    text_encoder: str
    sigma_data: float
    dtype: str


class TrainingEvaluation:
    """Creates the evaluators of each phase. They share encoders, prompt embeddings and compiled samplers."""

    def __init__(
        self, settings: EvaluationSettings, manifest: Manifest, workdir: Path, sharding: Any,
        warn: Callable[[str], object],
    ):  # fmt: skip
        """Loads the image encoder and embeds the prompts if images are to be sampled.

        Args:
            settings: Settings of the evaluation.
            manifest: Manifest of the run's shards.
            workdir: Work directory of the run.
            sharding: Sharding of latents and losses, on all devices that hold the parameters.
            warn: Called once with each distinct warning.

        Raises:
            UserError: The shards were built with other encoders.
        """
        self._settings, self._manifest, self._run_name = settings, manifest, workdir.name
        self._sharding, self._warn = sharding, warn
        if settings.prompts or settings.metrics_every:
            self._image_encoder = load_matching_image_encoder(settings.vae, manifest)
        if settings.prompts:
            cache = workdir / "prompts.npz"
            self._captions = embed_prompts(settings.prompts, settings.text_encoder, manifest, cache)
        self._sampler = functools.cache(self._make_sampler)  # phases with the same network share compiled programs

    def evaluators(
        self, network: DiTConfig, phase: Phase, shards: str, last_step: int, stop_requested: Callable[[], bool]
    ) -> list[Evaluator]:
        """Returns the evaluators of a phase, in the order in which they run.

        Args:
            network: Network configuration of the phase.
            phase: The phase.
            shards: Folder of shards, or a mix, of the phase.
            last_step: Step at which the phase ends.
            stop_requested: Returns whether to interrupt an evaluation.

        Raises:
            UserError: A metric is unknown or lacks an input.
        """
        settings, evaluators = self._settings, list[Evaluator]()
        if settings.split and read_mix(shards).manifest().records(settings.split):
            loss = make_heldout_loss(
                network, load_split(shards, settings.split, phase.resolution, settings.loss_images),
                sigma_data=settings.sigma_data, dtype=jnp.dtype(settings.dtype), sharding=self._sharding,
            )  # fmt: skip
            evaluators.append(HeldoutLoss(loss, Schedule(settings.loss_every, last_step), stop_requested))
        if settings.prompts:
            schedule, metadata = Schedule(settings.previews_every, last_step), {
                "sampler": f"{settings.sampling.sampler}, {settings.sampling.steps} steps",
                "guidance": str(settings.sampling.guidance), "attribution": self._manifest.attribution,
            }  # fmt: skip
            evaluators.append(
                Previews(settings.prompts, self._captions, self._sampler(network), schedule, self._run_name, metadata)
            )
        if settings.metrics_every:
            evaluators.append(GeneratedImageMetrics(
                settings.metrics, Schedule(settings.metrics_every, last_step), self._sampler(network),
                self._image_encoder, shards=shards, split=settings.split or "train", resolution=phase.resolution,
                warn=self._warn,
            ))  # fmt: skip
        return evaluators

    def _make_sampler(self, network: DiTConfig) -> SampleImages:
        settings, decode = self._settings, self._image_encoder.decode
        generator = Generator(network, sigma_data=settings.sigma_data, dtype=settings.dtype, sharding=self._sharding)
        return lambda params, captions, seeds: generator.images(params, captions, seeds, settings.sampling, decode)
