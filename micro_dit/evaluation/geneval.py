"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): what is written for its scorer, and what is read from it.

The scorer needs an object detector and is a program of its own, https://github.com/djghosh13/geneval. It reads a
folder for each prompt, `00000/metadata.jsonl` and `00000/samples/0000.png` …, and writes a line for each image, whose
'correct' and 'tag' (the task) count here, as in its `summary_scores.py`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from micro_dit.errors import UserError
from micro_dit.evaluation.measures import Measure
from micro_dit.files import write_atomically

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
IMAGES_PER_PROMPT = 4
SCORER = "https://github.com/djghosh13/geneval"


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The lines of the public `evaluation_metadata.jsonl`: each has 'tag', 'prompt', and what the scorer looks for.

    Raises:
        UserError: the file can't be read, or a line is not of this format.
    """
    prompts = _read_lines(path, "prompts", ("tag", "prompt"))
    if odd := sorted({str(prompt["tag"]) for prompt in prompts} - set(TASKS)):
        raise UserError(f"{path}: the task {odd[0]!r} is not one of GenEval's ({', '.join(TASKS)}).")
    return prompts


def prepare_geneval_files(folder: Path, prompts: Sequence[Mapping[str, Any]]) -> tuple[list[Path], list[str]]:
    """Makes the scorer's folders; returns the files of all images, four for each prompt, and each one's prompt."""
    files, texts = [], []
    for number, metadata in enumerate(prompts):
        place = folder / f"{number:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        write_atomically(place / "metadata.jsonl", json.dumps(dict(metadata)))
        files += [place / "samples" / f"{sample:04d}.png" for sample in range(IMAGES_PER_PROMPT)]
        texts += [str(metadata["prompt"])] * IMAGES_PER_PROMPT
    return files, texts


def summarize(path: str | Path) -> list[Measure]:
    """The scores of the scorer's `results.jsonl`: correct images by task, and their mean, each task counting the same.

    Raises:
        UserError: the file can't be read, is not the scorer's, or lacks a task.
    """
    results = _read_lines(path, "results", ("tag", "correct"))
    correct: dict[str, list[bool]] = {task: [] for task in TASKS}
    for result in results:
        if result["tag"] not in correct or not isinstance(result["correct"], bool):
            raise UserError(f"{path} is not of GenEval's scorer: it has {result['tag']!r}: {result['correct']!r}.")
        correct[result["tag"]].append(result["correct"])
    if missing := [task for task, found in correct.items() if not found]:
        raise UserError(f"{path} has no images of the tasks {', '.join(missing)}: score all prompts first.")
    scores = {task: sum(found) / len(found) for task, found in correct.items()}
    pipeline = {"scorer": SCORER, "images": len(results)}
    measures = [
        Measure(f"geneval_{task}", score, "higher", pipeline | {"images": len(correct[task])})
        for task, score in scores.items()
    ]
    overall = Measure("geneval", sum(scores.values()) / len(scores), "higher", pipeline | {"mean over": "six tasks"})
    return [overall, *measures]


def _read_lines(path: str | Path, what: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """A JSON object a line, each with these fields."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"GenEval's {what} {path} can't be read ({error}).") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {number} of GenEval's {what} {path} is not JSON ({error}).") from error
        if not isinstance(record, dict) or any(field not in record for field in fields):
            raise UserError(f"line {number} of GenEval's {what} {path} lacks {' or '.join(map(repr, fields))}.")
        records.append(record)
    if not records:
        raise UserError(f"GenEval's {what} {path} are empty.")
    return records
