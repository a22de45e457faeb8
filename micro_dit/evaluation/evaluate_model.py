"""Evaluates a checkpoint or model folder: computes the held-out loss, and samples and measures sets of images.

Results are written to disk as soon as they are computed, so that an interrupted evaluation can be resumed. See
docs/evaluation.md.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from micro_dit.data.captions import clean_captions
from micro_dit.data.pipeline import load_split
from micro_dit.diffusion.generate import Generator, Sampling
from micro_dit.encoders.image import load_image_encoder
from micro_dit.errors import UserError
from micro_dit.evaluation import geneval
from micro_dit.evaluation.coco import IMAGES as COCO_IMAGES
from micro_dit.evaluation.domain import check_prompts, real_images
from micro_dit.evaluation.evaluation_data import EvaluationData, Prompts, choose_prompts, read_evaluation_data
from micro_dit.evaluation.image_sets import FromFiles, ImageSetSettings, numbered, prepare_image_files, sample_missing
from micro_dit.evaluation.measures import Measure, Measures
from micro_dit.evaluation.registry import METRICS as IMAGE_METRICS
from micro_dit.evaluation.registry import MeasureImages, MetricInputs, check_names, load_metrics
from micro_dit.evaluation.report_page import write_report
from micro_dit.evaluation.validation_loss import P_MEAN, P_STD, make_heldout_loss
from micro_dit.files import hash_arrays, hash_text
from micro_dit.interop.model_folder import is_model_folder
from micro_dit.parallel.distributed import main_first
from micro_dit.parallel.mesh import batch_sharding, make_mesh, replicated
from micro_dit.training.progress import Progress

if TYPE_CHECKING:
    from micro_dit.api import Model

METRICS = ("heldout_loss", *IMAGE_METRICS, "geneval")


class Stopped(Exception):
    """The user requested a stop. All images and metrics so far are on disk."""


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """Settings of an evaluation.

    Attributes:
        metrics: Names from METRICS.
        step: Step of the checkpoint; by default the newest.
        params: Weights to measure, 'ema' or 'raw'.
        out: Output folder; by default evaluation/STEP in the work directory.
        guidance: Guidance scales, with one set of images each; by default the model's guidance scale.
        guidance_interval: (low, high), noise levels between which guidance is applied. None applies it at all levels.
        path_drop: Whether to use path-drop guidance; by default the model's setting.
        steps: Number of sampler steps; by default the model's.
        seed: Seed of image 0.
        num_images: Number of images for each guidance scale; by default 30,000 for COCO captions and 256 otherwise.
        prompts: Name of the prompts; see `choose_prompts`.
        batch_size: Images per batch on each device. Images do not depend on it.
        dtype: Dtype of the network's matrix products.
        shards: Shards to evaluate on; by default those of the run.
        reference, clip_reference, clip, inception: Inputs of metrics; see `MetricInputs`.
        geneval_prompts: GenEval's evaluation_metadata.jsonl.
        geneval_results: The results.jsonl of GenEval's scorer.
    """

    metrics: Sequence[str]
    step: int | None = None
    params: str = "ema"
    out: str | Path | None = None
    guidance: Sequence[float] = ()
    guidance_interval: tuple[float, float] | None = None
    path_drop: bool | None = None
    steps: int | None = None
    seed: int = 0
    num_images: int | None = None
    prompts: str = "heldout"
    batch_size: int = 8
    dtype: str = "float32"
    shards: str = ""
    reference: str = ""
    clip_reference: str = ""
    clip: str = ""
    inception: str = ""
    geneval_prompts: str = ""
    geneval_results: str = ""

    def __post_init__(self) -> None:
        check_names(self.metrics, METRICS)
        if self.batch_size < 1 or (self.num_images is not None and self.num_images < 1) or self.seed < 0:
            raise UserError("--batch_size and --num_images must be at least 1, and --seed must be at least 0.")
        if "geneval" in self.metrics and not (self.geneval_prompts or self.geneval_results):
            raise UserError(
                "The metric geneval needs prompts or results. Set --geneval_prompts to evaluation_metadata.jsonl from "
                "GenEval's repository to sample images, or --geneval_results to the scorer's results.jsonl."
            )


class ModelEvaluation:
    """The evaluation of one model."""

    def __init__(
        self, workdir: str | Path, request: EvaluationRequest, load: "Callable[..., Model]", stops: Callable[[], bool],
        say: Callable[[str], None],
    ):  # fmt: skip
        """Loads the model and the metrics, and validates all inputs before the first image is sampled.

        Args:
            workdir: Work directory of a run, or a model folder.
            request: Settings of the evaluation.
            load: The function `micro_dit.api.load`.
            stops: Called after each batch; returns whether to stop.
            say: Prints a progress line.

        Raises:
            UserError: The model or an input of a metric is missing or invalid.
        """
        self.workdir, self.request, self._load, self._stops, self._say = Path(workdir), request, load, stops, say
        self.main_process = jax.process_index() == 0
        self.of_run = not is_model_folder(self.workdir)
        model = load(workdir, request.step, params=request.params if self.of_run else None)
        self.model, self.data = model, read_evaluation_data(self.workdir, model, request.shards)
        step = "model" if model.about.step is None else str(model.about.step)
        self.folder = Path(request.out) if request.out else self.workdir / "evaluation" / step
        self.mesh = make_mesh(None, jax.local_devices())
        about = {"model": model.about.name, "step": model.about.step, "attribution": model.about.source}
        parameters = sum(array.size for array in model.params.values())
        self.measures = Measures(self.folder, about | {"parameters": parameters})
        if "heldout_loss" in request.metrics and (self.data is None or not self.data.heldout):
            raise UserError(
                f"There is no held-out split for the loss of {workdir}. Set --shards to shards with a held-out split, "
                "or remove heldout_loss from --metrics."
            )
        self._image_metrics = [name for name in request.metrics if name in IMAGE_METRICS]
        self.prompts = choose_prompts(request.prompts, self.data) if self._image_metrics else Prompts("", ())
        self._measure_images = self._load_metrics()
        use_geneval = "geneval" in request.metrics and request.geneval_prompts
        self._geneval_tasks = geneval.read_prompts(request.geneval_prompts) if use_geneval else []
        self._generate = functools.cache(self._make_generate)

    def _load_metrics(self) -> MeasureImages:
        """Loads the metrics of image sets, in the main process only."""
        request, model, data = self.request, self.model, self.data
        names = self._image_metrics if self.main_process else []
        real = real_images(data.shards, data.resolution) if data and "domain" in names else None
        if real is not None:
            check_prompts(self.prompts.texts, real["text"])
        inputs = MetricInputs(
            side=model.config.input_size * model.image_encoder.downsample, reference=request.reference,
            clip_reference=request.clip_reference, only=self.prompts.files, clip=request.clip,
            inception=request.inception, image_encoder=model.image_encoder, real=real,
            cache=self.folder.parent / "references", sharding=batch_sharding(self.mesh), say=self._say,
            warn=lambda text: self._say(f"warning: {text}"),
        )  # fmt: skip
        return main_first(lambda: load_metrics(names, inputs))

    def run(self) -> list[Measure]:
        """Measures the model and writes images, metrics.json and report.html.

        Returns:
            All metric values in metrics.json, including those of earlier evaluations.

        Raises:
            Stopped: The user requested a stop.
        """
        request, about = self.request, self.model.about
        if request.geneval_results:
            self.measures.add(*geneval.summarize(request.geneval_results))
        if "heldout_loss" in request.metrics and self.main_process:
            assert self.data is not None
            self.measures.add(*self._heldout_losses(self.data))
        weights = hash_arrays(sorted(self.model.params.items()))[:12]
        prompts = hash_text(json.dumps(list(self.prompts.texts)))[:12]
        steps = about.steps if request.steps is None else request.steps
        path_drop = about.path_drop if request.path_drop is None else request.path_drop
        Sampling(steps, path_drop=path_drop).check(self.model.config)
        for scale in request.guidance or (about.guidance,):
            settings = ImageSetSettings(
                weights, request.params, scale, steps, request.seed, request.dtype, self.prompts.name, prompts,
                request.guidance_interval, path_drop,
            )  # fmt: skip
            if self._image_metrics:
                self._measure_image_set(settings)
            if self._geneval_tasks:
                self._sample_geneval(settings)
        if self.main_process:
            width = max((len(measure.name) for measure in self.measures.all), default=0)
            for m in self.measures.all:
                about_images = " ".join(f"{k}={m.images[k]}" for k in ("params", "guidance", "count") if k in m.images)
                self._say(f"{m.name:{width}}  {f'{m.value:.4f}':>10}  {about_images}".rstrip())
            self._say(f"Report: {write_report(self.folder, self.measures, about.guidance)}")
        return self.measures.all

    def _measure_image_set(self, settings: ImageSetSettings) -> None:
        count = self.request.num_images or (COCO_IMAGES if self.prompts.files else 256)
        files = prepare_image_files(self.folder / settings.folder, settings, count)
        texts = numbered(self.prompts.texts, count)
        self._sample_missing(files, texts, settings)
        if self.main_process:
            about_images = dataclasses.asdict(settings) | {"folder": settings.folder, "count": count}
            for measure in self._measure_images(FromFiles(files, prompts=texts)):
                self.measures.add(dataclasses.replace(measure, images=about_images))

    def _sample_geneval(self, settings: ImageSetSettings) -> None:
        folder = self.folder / settings.folder.replace("images", "geneval")
        files, texts = geneval.prepare_geneval_files(folder, self._geneval_tasks)
        self._sample_missing(files, texts, settings)
        self._say(
            f"GenEval images are in {folder}. Score them with {geneval.SCORER}, then run this command with "
            "--geneval_results=results.jsonl."
        )

    def _heldout_losses(self, data: EvaluationData) -> list[Measure]:
        """Returns the mean EDM loss and the loss at each noise level, for the EMA and the raw weights."""
        heldout = load_split(data.shards, data.heldout, data.resolution, data.images)
        loss = make_heldout_loss(
            self.model.config, heldout, sigma_data=self.model.about.sigma_data, dtype="float32",
            sharding=replicated(self.mesh),
        )  # fmt: skip
        pipeline = {
            "loss": "EDM, weighted, unmasked; fixed noise; noise levels at the midpoints of 11 equally likely "
            f"intervals of the distribution with P_mean {P_MEAN}, P_std {P_STD}",
            "held-out images": len(heldout["text"]), "shards": data.shards,
        }  # fmt: skip
        params, other = ("ema", "raw") if self.request.params == "ema" else ("raw", "ema")
        weights: dict[str, Any] = {params: self.model.params}
        if self.of_run:
            try:
                weights[other] = self._load(self.workdir, self.model.about.step, params=other).params
            except UserError:
                self._say("The checkpoint has no EMA weights. The held-out loss is measured for the raw weights only.")
        measures = []
        for kind, values in weights.items():
            losses = loss(jax.device_put(dict(values), replicated(self.mesh)), self._stops)
            if not losses:
                raise Stopped("the held-out loss is not complete")
            measures += [Measure(name, value, "lower", pipeline, {"params": kind}) for name, value in losses.items()]
        return measures

    def _make_generate(self) -> Callable[..., np.ndarray]:
        """Returns a function (prompts, seeds, sampling) → images that splits the batch over the devices."""
        model, rows = self.model, batch_sharding(self.mesh)
        about, encoder = model.about, model.image_encoder  # this property checks that the encoder matches the model
        if self.mesh.size > 1:
            encoder = load_image_encoder(about.vae_folder or about.vae, sharding=rows)
        params = jax.device_put(model.params, replicated(self.mesh))
        generator = Generator(model.config, sigma_data=about.sigma_data, dtype=self.request.dtype, sharding=rows)

        def generate(prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> np.ndarray:
            captions = model.text_encoder.encode(clean_captions(list(prompts), about.caption_cleaning))
            return generator.images(params, captions, seeds, sampling, encoder.decode, batch_size=len(prompts))

        return generate

    def _sample_missing(self, files: Sequence[Path], texts: Sequence[str], settings: ImageSetSettings) -> None:
        """Samples the missing images, and waits for the images of all processes.

        Raises:
            Stopped: Images are still missing, because the user requested a stop.
        """
        n, existing, processes = len(files), sum(file.exists() for file in files), jax.process_count()
        sampling = Sampling(settings.steps, settings.guidance, interval=settings.interval, path_drop=settings.path_drop)
        title = f"guidance {settings.guidance:g}"
        if existing:
            self._say(f"{title}: {existing:,} of {n:,} images already exist")
        if existing < n:
            progress, done = Progress(title, n, existing, 1, enabled=self.main_process), existing

            def after_batch(sampled: int) -> bool:
                nonlocal done
                done = min(n, done + sampled * processes)
                progress.update(done)
                return self._stops()

            sample_missing(
                files, texts, range(settings.seed, settings.seed + n),
                lambda prompts, seeds: self._generate()(prompts, seeds, sampling),
                batch_size=self.request.batch_size * self.mesh.size, share=(jax.process_index(), processes),
                after_batch=after_batch,
            )  # fmt: skip
            progress.close()
        if processes > 1:
            multihost_utils.sync_global_devices(f"images {settings.guidance}")
            time.sleep(0 if self.main_process else 1)  # files of other processes may appear late on a shared disk
        if missing := sum(not file.exists() for file in files):
            raise Stopped(f"{n - missing:,} of {n:,} images are in {files[0].parent}")
