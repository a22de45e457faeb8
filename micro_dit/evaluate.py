"""Measures a trained model: `python -m micro_dit.evaluate --workdir=runs/mask75 --metrics=heldout_loss,domain`.

Images are sampled into the folder evaluation/STEP of the work directory, together with metrics.json and report.html.
The same command resumes an interrupted evaluation. See docs/evaluation.md.
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
    """Evaluates the model of the flags."""
    distributed.start(**distributed_options())
    say: Callable[[str], None] = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda text: None
    given = {field.name: getattr(FLAGS, field.name) for field in dataclasses.fields(EvaluationRequest)}
    interval = parse_interval(FLAGS.guidance_interval)
    request = EvaluationRequest(**given | {"guidance": read_scales(FLAGS.guidance), "guidance_interval": interval})
    try:
        with Interrupt() as interrupt:
            ModelEvaluation(FLAGS.workdir, request, load, stops=lambda: interrupt.requested, say=say).run()
    except Stopped as stopped:
        say(f"stopped: {stopped}; the same command goes on from there.")


def read_scales(texts: Sequence[str]) -> tuple[float, ...]:
    """Parses guidance scales; raises UserError for text that is not a number, and for a number that occurs twice."""
    try:
        scales = tuple(float(text) for text in texts)
    except ValueError as error:
        raise UserError(f"--guidance={','.join(texts)}: give numbers, as in 1.5,3,5.") from error
    if len(set(scales)) < len(scales) or not all(map(math.isfinite, scales)):
        raise UserError(f"--guidance={','.join(texts)}: give each number once.")
    return scales


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Work directory of a run, or a model folder.", required=True)
    flags.DEFINE_list("metrics", ["heldout_loss", "domain"], f"Some of {', '.join(METRICS)}.")
    flags.DEFINE_integer("step", None, "Checkpoint to measure; by default the newest.")
    flags.DEFINE_enum("params", "ema", ["ema", "raw"], "The moving average, or what was trained.")
    flags.DEFINE_string("out", None, "Where everything goes; by default evaluation/STEP in the work directory.")
    flags.DEFINE_list("guidance", [], "Scales of guidance, a set of images for each; by default the model's.")
    flags.DEFINE_string("guidance_interval", "", "low,high: noise levels between which there is guidance.")
    flags.DEFINE_bool("path_drop", None, "Path-drop guidance, for models with fusion; by default the model's setting.")
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
