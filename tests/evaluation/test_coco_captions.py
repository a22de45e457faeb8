"""The selection of COCO captions."""

import json
from pathlib import Path

import pytest

from micro_dit.errors import UserError
from micro_dit.evaluation.coco import read_coco_prompts


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """50 images with 5 captions each, in the format of captions_val2014.json."""
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg", "height": 9, "width": 9} for n in range(50)]
    annotations = [
        {"image_id": n, "id": 5 * n + k, "caption": f"image {n},\ncaption {k} "} for n in range(50) for k in range(5)
    ]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return path


def test_each_image_has_one_caption_in_a_fixed_random_order(captions: Path) -> None:
    chosen = read_coco_prompts(captions)
    assert len(chosen) == len({c.file_name for c in chosen}) == 50
    for prompt, file_name in chosen:
        image, caption = prompt.removeprefix("image ").split(", caption ")
        assert file_name == f"COCO_val2014_{int(image):012}.jpg"
        assert caption in "01234"
    assert len({c.prompt[-1] for c in chosen}) == 5
    assert chosen != sorted(chosen, key=lambda c: c.file_name)
    # The order is part of the protocol and must never change.
    assert [c.prompt for c in chosen[:3]] == ["image 31, caption 0", "image 33, caption 0", "image 43, caption 3"]


def test_shorter_list_is_a_prefix_and_the_seed_changes_the_selection(captions: Path) -> None:
    content = json.loads(captions.read_text())
    content["annotations"].reverse()
    captions.with_name("reversed.json").write_text(json.dumps(content))
    chosen = read_coco_prompts(captions)
    assert read_coco_prompts(captions, limit=7) == chosen[:7]
    assert read_coco_prompts(captions.with_name("reversed.json")) == chosen
    assert read_coco_prompts(captions, seed=1) != chosen


def test_other_files_are_rejected(tmp_path: Path) -> None:
    for text, message in (
        ('{"images": []}', "is not a COCO captions file .*annotations.*Set --prompts to captions_val2014.json"),
        ("[", "is not a COCO captions file"),
        ('{"images": [], "annotations": []}', "has no image with a caption"),
    ):
        (tmp_path / "captions.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_coco_prompts(tmp_path / "captions.json")
