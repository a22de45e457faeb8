"""Measures a trained model: `python -m micro_dit.evaluate --workdir=runs/mask75 --metrics=heldout_loss,domain`.

Images are drawn into the folder evaluation/STEP of the work directory, together with metrics.json and report.html. An
interrupted evaluation goes on with the images that are there. See docs/evaluation.md.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from micro_dit.api import Model, load
from micro_dit.cli import define_distributed_flags, distributed_options, read_prompts, run_command
from micro_dit.data.captions import clean_captions
from micro_dit.data.mixture import read_mix
from micro_dit.data.pipeline import load_split
from micro_dit.diffusion.generate import Generator, Sampling
from micro_dit.encoders.image import load_image_encoder
from micro_dit.errors import UserError
from micro_dit.evaluation import geneval, registry
from micro_dit.evaluation.coco import IMAGES as COCO_IMAGES
from micro_dit.evaluation.coco import read_coco_prompts
from micro_dit.evaluation.domain import check_prompts, real_images
from micro_dit.evaluation.image_sets import (
    FromFiles,
    Settings,
    draw_missing,
    hash_of,
    hash_of_weights,
    numbered,
    plan_files,
)
from micro_dit.evaluation.measures import Measure, Measures
from micro_dit.evaluation.registry import MetricInputs, check_names, load_metrics
from micro_dit.evaluation.report_page import write_report
from micro_dit.evaluation.validation_loss import make_heldout_loss
from micro_dit.interop.model_folder import is_model_folder, read_config
from micro_dit.parallel import distributed
from micro_dit.parallel.mesh import batch_sharding, make_mesh, replicated
from micro_dit.training.phases import Phase, make_phases
from micro_dit.training.progress import Progress
from micro_dit.training.save_schedule import Interrupt

METRICS = ("heldout_loss", *registry.METRICS, "geneval")


class Stopped(Exception):
    """The user has asked to stop; what is drawn and measured is on the disk."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run was trained on, as far as an evaluation needs it.

    Attributes:
        shards: a folder or a mix.
        heldout: the split that was held out; empty if there is none.
        resolution: side of the images in pixels.
        images: how many of the held-out ones the loss is measured on.
        phase: that the checkpoint is of.
    """

    shards: str
    heldout: str
    resolution: int
    images: int
    phase: Phase


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is drawn: their name, the texts, and for COCO the files of their images."""

    name: str
    texts: Sequence[str]
    files: Sequence[str] | None = None


def main() -> None:
    distributed.start(**distributed_options())
    say: Callable[[str], None] = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda text: None
    try:
        with Interrupt() as interrupt:
            evaluate(
                FLAGS.workdir, tuple(FLAGS.metrics), step=FLAGS.step, params=FLAGS.params, out=FLAGS.out,
                guidance=read_scales(FLAGS.guidance), steps=FLAGS.steps, seed=FLAGS.seed, num_images=FLAGS.num_images,
                prompts=FLAGS.prompts, batch_size=FLAGS.batch_size, dtype=FLAGS.dtype, shards=FLAGS.shards,
                reference=FLAGS.reference, clip_reference=FLAGS.clip_reference, clip=FLAGS.clip,
                inception=FLAGS.inception, geneval_prompts=FLAGS.geneval_prompts,
                geneval_results=FLAGS.geneval_results, stops=lambda: interrupt.requested, say=say,
            )  # fmt: skip
    except Stopped as stopped:
        say(f"stopped: {stopped}; the same command goes on from there.")


def evaluate(
    workdir: str | Path,
    metrics: Sequence[str],
    *,
    step: int | None = None,
    params: str = "ema",
    out: str | Path | None = None,
    guidance: Sequence[float] = (),
    steps: int | None = None,
    seed: int = 0,
    num_images: int | None = None,
    prompts: str = "heldout",
    batch_size: int = 8,
    dtype: str = "float32",
    shards: str = "",
    reference: str = "",
    clip_reference: str = "",
    clip: str = "",
    inception: str = "",
    geneval_prompts: str = "",
    geneval_results: str = "",
    stops: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> list[Measure]:
    """Measures a checkpoint, and writes images, metrics.json and report.html.

    Args:
        workdir: of a run, or a model folder.
        metrics: some of METRICS.
        step: of the checkpoint; the newest if None.
        params: 'ema' or 'raw'.
        out: where everything goes; by default evaluation/STEP in the work directory.
        guidance: scales that images are drawn with; by default the model's.
        steps: of the sampler; by default the model's.
        seed: of image 0.
        num_images: of each scale; by default 30,000 for COCO's captions, else 256.
        prompts: 'heldout' or 'train', captions of the shards; a .json file of COCO captions; or a file of lines.
        batch_size: images at once on each device. No image depends on it.
        dtype: of the network's matrix products.
        shards: by default those of the run.
        reference, clip_reference, clip, inception: see `MetricInputs`.
        geneval_prompts, geneval_results: files of GenEval.
        stops: is asked after each batch.
        say: is told what is going on.

    Returns:
        What was measured.

    Raises:
        UserError: something is missing or makes no sense; it is raised before the first image is drawn.
        Stopped: `stops` said so.
    """
    check_names(metrics, METRICS)
    if batch_size < 1 or (num_images is not None and num_images < 1) or seed < 0:
        raise UserError("--batch_size and --num_images must be at least 1, and --seed at least 0.")
    workdir, main_process = Path(workdir), jax.process_index() == 0
    of_run = not is_model_folder(workdir)
    model = load(workdir, step, params=params if of_run else None)
    about, data = model.about, _data_of(workdir, model, shards)
    steps = about.steps if steps is None else steps
    guidance = tuple(guidance) or (about.guidance,)
    folder = Path(out) if out else workdir / "evaluation" / ("model" if about.step is None else str(about.step))
    images_of = [name for name in metrics if name in registry.METRICS]
    warned = lambda text: say(f"warning: {text}")  # noqa: E731
    mesh = make_mesh(None, jax.local_devices())

    # 1. Whatever can be refused is refused before the first image.
    measures = Measures(folder, {
        "model": about.name, "step": about.step, "attribution": about.source,
        "parameters": sum(array.size for array in model.params.values()),
    })  # fmt: skip
    if "heldout_loss" in metrics and (data is None or not data.heldout):
        raise UserError(f"{workdir} has no held-out split to measure a loss on: leave out 'heldout_loss'.")
    chosen = _prompts(prompts, data) if images_of else Prompts("", ())
    count = num_images or (COCO_IMAGES if chosen.files else 256)
    side = model.config.input_size * model.image_encoder.downsample
    real = real_images(data.shards, data.resolution) if data and "domain" in images_of and main_process else None
    if real is not None:
        check_prompts(chosen.texts, real["text"])
    measure_images = distributed.main_first(lambda: load_metrics(images_of if main_process else (), MetricInputs(
        side=side, reference=reference, clip_reference=clip_reference,
        only=chosen.files, clip=clip, inception=inception, image_encoder=model.image_encoder, real=real,
        cache=folder.parent / "references", sharding=batch_sharding(mesh), say=say, warn=warned,
    )))  # fmt: skip
    tasks = _geneval(metrics, geneval_prompts, geneval_results)
    if geneval_results:
        measures.add(*geneval.summarize(geneval_results))

    # 2. The loss needs no images.
    if "heldout_loss" in metrics and main_process:
        assert data is not None
        measures.add(*_heldout_losses(workdir, model, data, params, mesh, say, stops))

    # 3. Draw, a set for each scale of guidance, and measure.
    weights = hash_of_weights(model.params)
    generate = functools.cache(lambda: _generator(model, mesh, dtype))
    for scale in guidance:
        sampling = Sampling(steps, scale)
        settings = Settings(weights, params, scale, steps, seed, dtype, chosen.name, hash_of(chosen.texts))
        if images_of:
            files = plan_files(folder / settings.folder, settings, count)
            texts = numbered(chosen.texts, count)
            _draw(files, texts, sampling, generate, seed, batch_size * mesh.size, stops, say)
            if main_process:
                told = dataclasses.asdict(settings) | {"folder": settings.folder, "count": count}
                for measure in measure_images(FromFiles(files, prompts=texts)):
                    measures.add(dataclasses.replace(measure, images=told))
        if tasks:
            place = folder / settings.folder.replace("images", "geneval")
            files, texts = geneval.plan_files(place, tasks)
            _draw(files, texts, sampling, generate, seed, batch_size * mesh.size, stops, say)
            say(f"GenEval's images are in {place}: score them by {geneval.SCORER}, then give --geneval_results.")

    # 4. Tell.
    if main_process:
        for line in table(measures.all):
            say(line)
        say(f"{write_report(folder, measures, about.guidance)} shows them")
    return measures.all


def table(measures: Sequence[Measure]) -> list[str]:
    """A line for each measure."""
    rows = [
        (
            m.name,
            f"{m.value:.4f}",
            " ".join(f"{k}={m.images[k]}" for k in ("params", "guidance", "count") if k in m.images),
        )
        for m in measures
    ]
    width = max((len(row[0]) for row in rows), default=0)
    return [f"{name:{width}}  {value:>10}  {images}".rstrip() for name, value, images in rows]


# ---- Parts -----------------------------------------------------------------------------------------------------------


def _data_of(workdir: Path, model: Model, shards: str) -> Data | None:
    """What a run was trained on; of a model folder only what --shards says."""
    side = model.config.input_size * model.image_encoder.downsample
    if is_model_folder(workdir):
        phase = Phase("", side, 1, 1, 1.0, 0.0)
        return Data(shards, "validation", side, 64, phase) if shards else None
    run = read_config(workdir / "config.json")["config"]
    phases = make_phases(run["phases"])
    ends = np.cumsum([phase.steps for phase in phases])
    assert model.about.step is not None
    phase = phases[min(int(np.searchsorted(ends, model.about.step)), len(phases) - 1)]
    place = shards or phase.shards or run["data"]["shards"]
    split = run["data"]["heldout"]
    return Data(place, split, phase.resolution, run["data"]["heldout_images"], phase)


def _prompts(name: str, data: Data | None) -> Prompts:
    if name in ("heldout", "train"):
        split = "train" if name == "train" else (data.heldout if data else "")
        if data is None or not split:
            raise UserError(f"there are no shards to take --prompts={name} from: give --shards, or a file of prompts.")
        if not read_mix(data.shards).manifest().records(split):
            raise UserError(f"the shards {data.shards} have no split {split!r}: give other --prompts.")
        texts = load_split(data.shards, split, data.resolution, 2000)["text"]
        return Prompts(f"{'held-out' if name == 'heldout' else 'training'} captions", texts)
    if name.endswith(".json"):
        chosen = read_coco_prompts(name)
        return Prompts(f"COCO captions, {len(chosen)}", [c.prompt for c in chosen], [c.file_name for c in chosen])
    return Prompts(Path(name).name, read_prompts(name))


def _geneval(metrics: Sequence[str], prompts: str, results: str) -> list[dict[str, Any]]:
    if "geneval" not in metrics:
        return []
    if not prompts and not results:
        raise UserError(
            "GenEval needs --geneval_prompts, the file evaluation_metadata.jsonl of its repository, to draw images, or "
            "--geneval_results, its scorer's results.jsonl, to summarize."
        )
    return geneval.read_prompts(prompts) if prompts else []


def _heldout_losses(
    workdir: Path, model: Model, data: Data, params: str, mesh: jax.sharding.Mesh, say: Callable[[str], None],
    stops: Callable[[], bool],
) -> list[Measure]:  # fmt: skip
    """EDM's loss by noise level, of the moving average and of the raw parameters."""
    heldout = load_split(data.shards, data.heldout, data.resolution, data.images)
    loss = make_heldout_loss(
        model.config, heldout, P_mean=data.phase.P_mean, P_std=data.phase.P_std, sigma_data=model.about.sigma_data,
        dtype="float32", sharding=replicated(mesh),
    )  # fmt: skip
    kinds: Mapping[str, Any] = {params: model.params}
    if not is_model_folder(workdir):
        try:
            other = "raw" if params == "ema" else "ema"
            kinds = {params: model.params, other: load(workdir, model.about.step, params=other).params}
        except UserError:
            say("the checkpoint has no moving average: the held-out loss is that of the raw parameters alone.")
    measures = []
    for kind, values in kinds.items():
        losses = loss(jax.device_put(dict(values), replicated(mesh)), stops)
        if not losses:
            raise Stopped("no held-out loss yet")
        pipeline = {
            "loss": "EDM, weighted, unmasked; fixed noise; midpoints of 11 equally likely slices of the noise levels "
            f"that training draws (P_mean {data.phase.P_mean:g}, P_std {data.phase.P_std:g})",
            "held-out images": len(heldout["text"]), "shards": data.shards,
        }  # fmt: skip
        measures += [Measure(name, value, "lower", pipeline, {"params": kind}) for name, value in losses.items()]
    return measures


def _generator(model: Model, mesh: jax.sharding.Mesh, dtype: str) -> Callable[..., np.ndarray]:
    """Returns the function (prompts, seeds, sampling) → images that splits a batch over the devices."""
    about, rows = model.about, batch_sharding(mesh)
    encoder = model.image_encoder  # which checks that it is the model's
    if mesh.size > 1:
        encoder = load_image_encoder(about.vae_folder or about.vae, sharding=rows)
    params = jax.device_put(model.params, replicated(mesh))
    generator = Generator(model.config, sigma_data=about.sigma_data, dtype=dtype, sharding=rows)

    def generate(prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> np.ndarray:
        captions = model.text_encoder.encode(clean_captions(list(prompts), about.caption_cleaning))
        return generator.images(params, captions, seeds, sampling, encoder.decode, batch_size=len(prompts))

    return generate


def _draw(
    files: Sequence[Path], texts: Sequence[str], sampling: Sampling,
    generate: Callable[[], Callable[..., np.ndarray]],
    seed: int, batch_size: int, stops: Callable[[], bool], say: Callable[[str], None],
) -> None:  # fmt: skip
    """Draws what is missing, and waits until all processes have.

    Raises:
        Stopped: images are missing still.
    """
    n, there = len(files), sum(file.exists() for file in files)
    if there:
        say(f"guidance {sampling.guidance:g}: {there:,} of {n:,} images are there already")
    processes = jax.process_count()
    if there < n:
        progress = Progress(f"guidance {sampling.guidance:g}", n, there, 1, enabled=jax.process_index() == 0)
        done = there

        def after_batch(drawn: int) -> bool:
            nonlocal done
            done = min(n, done + drawn * processes)
            progress.update(done)
            return stops()

        draw_missing(
            files, texts, range(seed, seed + n), lambda p, s: generate()(p, s, sampling), batch_size=batch_size,
            share=(jax.process_index(), processes), after_batch=after_batch,
        )  # fmt: skip
        progress.close()
    if processes > 1:
        multihost_utils.sync_global_devices(f"images {sampling.guidance}")
        time.sleep(0 if jax.process_index() else 1)  # a shared disk may show the others' files late
    missing = sum(not file.exists() for file in files)
    if missing:
        raise Stopped(f"{n - missing:,} of {n:,} images are in {files[0].parent}")


def read_scales(texts: Sequence[str]) -> tuple[float, ...]:
    """Scales of guidance from text; raises UserError for what is no number, or is there twice."""
    try:
        scales = tuple(float(text) for text in texts)
    except ValueError as error:
        raise UserError(f"--guidance={','.join(texts)}: give numbers, as in 1.5,3,5.") from error
    if len(set(scales)) < len(scales) or not all(np.isfinite(scales)):
        raise UserError(f"--guidance={','.join(texts)}: give each number once.")
    return scales


FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Work directory of a run, or a model folder.", required=True)
    flags.DEFINE_list("metrics", ["heldout_loss", "domain"], f"Some of {', '.join(METRICS)}.")
    flags.DEFINE_integer("step", None, "Checkpoint to measure; by default the newest.")
    flags.DEFINE_enum("params", "ema", ["ema", "raw"], "The moving average, or what was trained.")
    flags.DEFINE_string("out", None, "Where everything goes; by default evaluation/STEP in the work directory.")
    flags.DEFINE_list("guidance", [], "Scales of guidance, a set of images for each; by default the model's.")
    flags.DEFINE_integer("steps", None, "Sampling steps; by default the model's.")
    flags.DEFINE_integer("seed", 0, "Of image 0; image i has this plus i.")
    flags.DEFINE_integer("num_images", None, "For each scale; by default 30,000 for COCO's captions, else 256.")
    flags.DEFINE_string(
        "prompts", "heldout", "heldout, train, a captions_val2014.json, or a file with a prompt a line."
    )
    flags.DEFINE_integer("batch_size", 8, "Images at once on each device; an image does not depend on it.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the network's matrix products.")
    flags.DEFINE_string("shards", "", "Shards to take captions and held-out images from; by default the run's.")
    flags.DEFINE_string("reference", "", "For fid: a folder of real images, or a statistics file (.npz).")
    flags.DEFINE_string("clip_reference", "", "For cmmd: a folder or a file of embeddings; by default --reference.")
    flags.DEFINE_string("clip", "", "For clip_score and cmmd: a CLIP checkpoint, a folder or owner/repository.")
    flags.DEFINE_string(
        "inception", "", "For fid: the network's weights; by default looked for in PyTorch's hub cache."
    )
    flags.DEFINE_string("geneval_prompts", "", "GenEval's evaluation_metadata.jsonl: draws its images.")
    flags.DEFINE_string("geneval_results", "", "Its scorer's results.jsonl: summarizes them.")
    define_distributed_flags()


if __name__ == "__main__":
    run_command(main, define_flags)
