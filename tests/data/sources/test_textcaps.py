import json
from pathlib import Path

import pytest

from micro_dit.data.sources import MISSING_FILE, open_source
from micro_dit.errors import UserError
from tests.helpers.source_files import (
    captions_of,
    examples_of,
    image_file,
    read_source,
    rejects_of,
    write_files,
    write_zip,
)

REFERENCES = ["a sign that says stop", "stop sign"]


def entry(image: str, caption: str, references: list[str], split: str = "train") -> dict:
    """Returns an entry of TextCaps_0.1_train.json, which has one entry per caption."""
    return {
        "question": "", "image_id": image, "image_classes": ["Sign"], "flickr_original_url": "http://example.org",
        "flickr_300k_url": "http://example.org", "image_width": 1024, "image_height": 683, "set_name": split,
        "image_name": image, "image_path": f"{split}/{image}.jpg", "caption_id": 1, "caption_tokens": caption.split(),
        "caption_str": caption, "reference_strs": references, "reference_tokens": [],
    }  # fmt: skip


def write_annotations(folder: Path, name: str = "train") -> None:
    data = [entry("b7", text, REFERENCES, name) for text in REFERENCES] + [entry("a3", "a shop", ["a shop"], name)]
    content = {"dataset_type": name, "dataset_name": "textcaps", "dataset_version": "0.1", "data": data}
    write_files(folder, {f"TextCaps_0.1_{name}.json": json.dumps(content).encode()})


@pytest.mark.parametrize("packed", [False, True])
def test_captions_are_grouped_by_image(tmp_path: Path, packed: bool) -> None:
    images = {"train_images/b7.jpg": image_file("red"), "train_images/a3.jpg": image_file("blue")}
    write_annotations(tmp_path)
    if packed:
        write_zip(tmp_path / "train_val_images.zip", images)
    else:
        write_files(tmp_path, images)
    items = read_source(f"textcaps:{tmp_path}")
    assert captions_of(items) == {"a3": ("a shop",), "b7": tuple(REFERENCES)}
    assert examples_of(items)[1].image == image_file("red")


def test_missing_image_and_validation_split(tmp_path: Path) -> None:
    write_files(tmp_path, {"train_images/b7.jpg": image_file("red")})
    write_annotations(tmp_path, "val")
    assert open_source(f"textcaps:{tmp_path}", px=1).splits == ("validation",)
    items = read_source(f"textcaps:{tmp_path}", "validation")
    assert list(captions_of(items)) == ["b7"]
    assert rejects_of(items) == {"a3": MISSING_FILE}


def test_invalid_sources_raise_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither TextCaps_0\.1_train\.json nor"):
        open_source(f"textcaps:{tmp_path}", px=1)
    write_annotations(tmp_path)
    with pytest.raises(UserError, match=r"has neither train_images/ nor train_val_images\.zip"):
        open_source(f"textcaps:{tmp_path}", px=1).parts("train")
    (tmp_path / "train_val_images.zip").write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"train_val_images\.zip is damaged"):
        open_source(f"textcaps:{tmp_path}", px=1).parts("train")
    (tmp_path / "train_images").mkdir()
    contents = {"[1]": "not in TextCaps format", '{"data": [{}]}': "not in TextCaps format", "{": "not valid JSON"}
    for content, message in contents.items():
        (tmp_path / "TextCaps_0.1_train.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_source(f"textcaps:{tmp_path}", px=1).parts("train")
