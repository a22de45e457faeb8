"""Measures a trained model: `python -m micro_dit.evaluate --workdir=runs/mask75 --metrics=heldout_loss,domain`.

Writes images, metrics.json and report.html to the folder evaluation/STEP of the work directory. Run the same command
again to resume an interrupted evaluation. See docs/evaluation.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
from absl import flags

from micro_dit.api import load
from micro_dit.cli import define_distributed_flags, distributed_options, parse_interval, run_command
from micro_dit.errors import UserError
from micro_dit.evaluation.evaluate_model import METRICS, EvaluationRequest, ModelEvaluation, Stopped
from micro_dit.parallel import distributed
from micro_dit.training.save_schedule import Interrupt


def main() -> None:
    """Evaluates the model in the flags."""
    distributed.start(**distributed_options())
    say: Callable[[str], None] = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda text: None
    given = {field.name: getattr(FLAGS, field.name) for field in dataclasses.fields(EvaluationRequest)}
    interval = parse_interval(FLAGS.guidance_interval)
    request = EvaluationRequest(**given | {"guidance": read_scales(FLAGS.guidance), "guidance_interval": interval})
    try:
        with Interrupt() as interrupt:
            ModelEvaluation(FLAGS.workdir, request, load, stops=lambda: interrupt.requested, say=say).run()
    except Stopped as stopped:
        say(f"Stopped: {stopped}. Run the same command again to resume.")


def read_scales(texts: Sequence[str]) -> tuple[float, ...]:
    """Parses guidance scales; raises UserError if one is not a finite number or occurs twice."""
    try:
        scales = tuple(float(text) for text in texts)
    except ValueError as error:
        raise UserError(
            f"--guidance={','.join(texts)} has a value that is not a number. Use a list such as --guidance=1.5,3,5."
        ) from error
    if len(set(scales)) < len(scales) or not all(map(math.isfinite, scales)):
        raise UserError(
            f"--guidance={','.join(texts)} has repeated or infinite values. Use a list such as --guidance=1.5,3,5."
        )
    return scales


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Work directory of a run, or a model folder.", required=True)
    flags.DEFINE_list("metrics", ["heldout_loss", "domain"], f"Metrics, from {', '.join(METRICS)}.")
    flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest.")
    flags.DEFINE_enum("params", "ema", ["ema", "raw"], "Weights to measure: EMA or raw.")
    flags.DEFINE_string("out", None, "Output folder; by default evaluation/STEP in the work directory.")
    flags.DEFINE_list("guidance", [], "Guidance scales, with one set of images each; by default the model's scale.")
    flags.DEFINE_string("guidance_interval", "", "low,high: noise levels between which guidance is applied.")
    flags.DEFINE_bool("path_drop", None, "Path-drop guidance, for models with fusion; by default the model's setting.")
    flags.DEFINE_integer("steps", None, "Number of sampler steps; by default the model's.")
    flags.DEFINE_integer("seed", 0, "Seed of image 0. Image i has the seed SEED + i.")
    flags.DEFINE_integer(
        "num_images", None, "Number of images for each guidance scale; by default 30,000 for COCO captions, else 256."
    )
    flags.DEFINE_string(
        "prompts",
        "heldout",
        "Prompts: heldout, train, a captions_val2014.json, or a text file with one prompt per line.",
    )
    flags.DEFINE_integer("batch_size", 8, "Images per batch on each device. Images do not depend on it.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the network's matrix products.")
    flags.DEFINE_string("shards", "", "Shards with the captions and held-out images; by default those of the run.")
    flags.DEFINE_string("reference", "", "For fid and cmmd: folder of real images, or a file of their features (.npz).")
    flags.DEFINE_string(
        "clip_reference", "", "For cmmd: folder of real images, or a file of embeddings; by default --reference."
    )
    flags.DEFINE_string("clip", "", "For clip_score and cmmd: CLIP checkpoint, a folder or owner/repository.")
    flags.DEFINE_string("inception", "", "For fid: weights file; by default the one in PyTorch's hub cache.")
    flags.DEFINE_string("geneval_prompts", "", "For geneval: evaluation_metadata.jsonl, to sample images.")
    flags.DEFINE_string("geneval_results", "", "For geneval: the scorer's results.jsonl, to summarize.")
    define_distributed_flags()


if __name__ == "__main__":
    run_command(main, define_flags)
