"""GenEval's prompts, the folders for its scorer, and the summary of the scorer's results."""

import json
from pathlib import Path
from typing import Any

import pytest

from micro_dit.errors import UserError
from micro_dit.evaluation.geneval import TASKS, prepare_geneval_files, read_prompts, summarize


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_are_read_and_folders_are_created(tmp_path: Path) -> None:
    line = {  # in the format of the public file
        "tag": "color_attr",
        "include": [{"class": "wine glass", "count": 1, "color": "purple"}],
        "prompt": "a glass",
    }
    prompts = read_prompts(write_lines(tmp_path / "evaluation_metadata.jsonl", [line] * 3))
    assert prompts == [line] * 3
    files, texts = prepare_geneval_files(tmp_path / "images", prompts)
    assert len(files) == len(texts) == 12
    assert files[4] == tmp_path / "images" / "00001" / "samples" / "0000.png"
    assert json.loads((tmp_path / "images" / "00002" / "metadata.jsonl").read_text()) == line
    assert files[4].parent.is_dir()


def result(tag: str, correct: Any) -> dict[str, Any]:
    """Returns a line of the scorer's results file."""
    return {
        "filename": "images/00000/samples/0000.png", "tag": tag, "prompt": "a photo", "correct": correct, "reason": "",
        "metadata": "{}", "details": "{}",
    }  # fmt: skip


def test_overall_score_is_the_mean_over_tasks(tmp_path: Path) -> None:
    results = [result(task, False) for task in TASKS] + [result("counting", True)] * 3 + [result("colors", True)]
    measures = {m.name: m for m in summarize(write_lines(tmp_path / "results.jsonl", results))}
    assert next(iter(measures)) == "geneval"
    assert len(measures) == 7
    assert measures["geneval_counting"].value == 0.75
    assert measures["geneval_colors"].value == 0.5
    assert measures["geneval"].value == pytest.approx(1.25 / 6)  # and not 4/10, the mean over images
    assert measures["geneval"].pipeline["images"] == 10
    assert measures["geneval_counting"].pipeline["images"] == 4


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([result(task, True) for task in TASKS[:4]], "has no images for the tasks position, color_attr"),
        ([result("dogs", True)], "was not written by GenEval's scorer: it has the task 'dogs'"),
        ([result("colors", "yes")], "it has the task 'colors' with the result 'yes'"),
        ([{"tag": "colors"}], "line 1 needs the fields 'tag' and 'correct'"),
        ([], "GenEval results file .* is empty"),
    ],
)
def test_wrong_results_are_rejected(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        summarize(write_lines(tmp_path / "results.jsonl", records))


def test_wrong_prompts_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GenEval prompts file .* can't be read"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "prompts.jsonl").write_text("a photo of a bench\n")
    with pytest.raises(UserError, match=r"prompts.jsonl, line 1 is not JSON"):
        read_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(UserError, match="has the unknown task 'dogs'"):
        read_prompts(write_lines(tmp_path / "prompts.jsonl", [{"tag": "dogs", "prompt": "a dog"}]))
