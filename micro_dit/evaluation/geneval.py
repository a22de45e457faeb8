"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): writes images for its scorer and summarizes the scorer's results.

The scorer is a separate program with an object detector, https://github.com/djghosh13/geneval. It reads one folder per
prompt, with `00000/metadata.jsonl`, `00000/samples/0000.png` …, and writes one line per image. The summary uses the
fields 'correct' and 'tag' (the task) of each line, like the scorer's `summary_scores.py`.
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
    """Reads the prompts from GenEval's `evaluation_metadata.jsonl`.

    Returns:
        A dictionary per line, with 'tag', 'prompt' and fields for the scorer.

    Raises:
        UserError: The file can't be read, or a line has another format.
    """
    prompts = _read_lines(path, "prompts", ("tag", "prompt"))
    if odd := sorted({str(prompt["tag"]) for prompt in prompts} - set(TASKS)):
        raise UserError(
            f"{path} has the unknown task {odd[0]!r}; GenEval's tasks are {', '.join(TASKS)}. Set --geneval_prompts to "
            f"evaluation_metadata.jsonl from {SCORER}."
        )
    return prompts


def prepare_geneval_files(folder: Path, prompts: Sequence[Mapping[str, Any]]) -> tuple[list[Path], list[str]]:
    """Creates the folders that the scorer reads.

    Returns:
        The paths of all images, IMAGES_PER_PROMPT for each prompt, and the prompt of each image.
    """
    files, texts = [], []
    for number, metadata in enumerate(prompts):
        place = folder / f"{number:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        write_atomically(place / "metadata.jsonl", json.dumps(dict(metadata)))
        files += [place / "samples" / f"{sample:04d}.png" for sample in range(IMAGES_PER_PROMPT)]
        texts += [str(metadata["prompt"])] * IMAGES_PER_PROMPT
    return files, texts


def summarize(path: str | Path) -> list[Measure]:
    """Computes scores from the scorer's `results.jsonl`: the fraction of correct images per task and the mean of tasks.

    Raises:
        UserError: The file can't be read, was not written by the scorer, or has no images for a task.
    """
    results = _read_lines(path, "results", ("tag", "correct"))
    correct: dict[str, list[bool]] = {task: [] for task in TASKS}
    for result in results:
        if result["tag"] not in correct or not isinstance(result["correct"], bool):
            raise UserError(
                f"{path} was not written by GenEval's scorer: it has the task {result['tag']!r} with the result "
                f"{result['correct']!r}. Set --geneval_results to the scorer's results.jsonl."
            )
        correct[result["tag"]].append(result["correct"])
    if missing := [task for task, found in correct.items() if not found]:
        raise UserError(f"{path} has no images for the tasks {', '.join(missing)}. Score all prompts first.")
    scores = {task: sum(found) / len(found) for task, found in correct.items()}
    pipeline = {"scorer": SCORER, "images": len(results)}
    measures = [
        Measure(f"geneval_{task}", score, "higher", pipeline | {"images": len(correct[task])})
        for task, score in scores.items()
    ]
    overall = Measure("geneval", sum(scores.values()) / len(scores), "higher", pipeline | {"mean over": "six tasks"})
    return [overall, *measures]


def _read_lines(path: str | Path, what: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Reads a file with one JSON object per line and checks that each has the fields."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The GenEval {what} file {path} can't be read ({error}). Check --geneval_{what}.") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}). Check --geneval_{what}.") from error
        if not isinstance(record, dict) or any(field not in record for field in fields):
            names = " and ".join(map(repr, fields))
            raise UserError(f"{path}, line {number} needs the fields {names}. Check --geneval_{what}.")
        records.append(record)
    if not records:
        raise UserError(f"The GenEval {what} file {path} is empty. Check --geneval_{what}.")
    return records
