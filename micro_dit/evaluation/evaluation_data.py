"""The data for the evaluation of a model: shards and prompts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from micro_dit.cli import read_prompts
from micro_dit.data.mixture import read_mix
from micro_dit.data.pipeline import load_split
from micro_dit.errors import UserError
from micro_dit.evaluation.coco import read_coco_prompts
from micro_dit.training.phases import make_phases
from micro_dit.training.pretrained import read_run

if TYPE_CHECKING:
    from micro_dit.api import Model

MAX_CAPTIONS = 2000


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """Shards to evaluate on.

    Attributes:
        shards: Folder of shards, or a mix.
        heldout: Name of the held-out split. Empty if there is none.
        resolution: Side of the images in pixels.
        images: Number of held-out images for the loss.
    """

    shards: str
    heldout: str
    resolution: int
    images: int


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts to sample.

    Attributes:
        name: Name of the prompts, for reports.
        texts: The prompts.
        files: For COCO captions: file name of the image of each caption.
    """

    name: str
    texts: Sequence[str]
    files: Sequence[str] | None = None


def read_evaluation_data(workdir: Path, model: "Model", shards: str) -> EvaluationData | None:
    """Returns the data to evaluate a model on.

    Args:
        workdir: Work directory of a run, or a model folder.
        model: The model.
        shards: Shards to use instead of those of the run. Empty means the shards of the run.

    Returns:
        The data, or None for a model folder without `shards`.
    """
    side = model.config.input_size * model.image_encoder.downsample
    fields = read_run(workdir)
    if fields is None:
        return EvaluationData(shards, "validation", side, 64) if shards else None
    run = fields["config"]
    phases = make_phases(run["phases"])
    ends = np.cumsum([phase.steps for phase in phases])
    assert model.about.step is not None
    phase = phases[min(int(np.searchsorted(ends, model.about.step)), len(phases) - 1)]
    place = shards or phase.shards or run["data"]["shards"]
    return EvaluationData(place, run["data"]["heldout"], phase.resolution, run["data"]["heldout_images"])


def choose_prompts(name: str, data: EvaluationData | None) -> Prompts:
    """Reads prompts.

    Args:
        name: 'heldout' or 'train' for captions of the shards, a .json file of COCO captions, or a text file with one
            prompt per line.
        data: The shards, if there are any.

    Raises:
        UserError: The prompts do not exist or can't be read.
    """
    if name in ("heldout", "train"):
        split = "train" if name == "train" else (data.heldout if data else "")
        if data is None or not split:
            raise UserError(f"--prompts={name} needs shards with this split. Set --shards, or --prompts to a file.")
        if not read_mix(data.shards).manifest().records(split):
            raise UserError(
                f"The shards {data.shards} have no split {split!r} for --prompts={name}. Set --prompts to another "
                "split or to a file."
            )
        texts = load_split(data.shards, split, data.resolution, MAX_CAPTIONS)["text"]
        return Prompts(f"{'held-out' if name == 'heldout' else 'training'} captions", texts)
    if name.endswith(".json"):
        chosen = read_coco_prompts(name)
        return Prompts(f"COCO captions, {len(chosen)}", [c.prompt for c in chosen], [c.file_name for c in chosen])
    return Prompts(Path(name).name, read_prompts(name))
