import json
from pathlib import Path

import pytest

from micro_dit.data.sources import MISSING_FILE, NO_CAPTION, open_source
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


def write_annotations(folder: Path, name: str, captions: list[tuple[int, str]], images: list[int]) -> None:
    """Writes annotations/captions_NAME.json in the format of COCO."""
    content = {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "licenses": [{"id": 1}],
        "images": [
            {"license": 5, "file_name": f"COCO_{name}_{id:012d}.jpg", "height": 6, "width": 9, "id": id}
            for id in images
        ],
        "annotations": [{"image_id": id, "id": 90 - n, "caption": text} for n, (id, text) in enumerate(captions)],
    }
    write_files(folder, {f"annotations/captions_{name}.json": json.dumps(content).encode()})


@pytest.mark.parametrize("packed", [False, True])
def test_captions_are_grouped_by_image_and_sorted_by_name(tmp_path: Path, packed: bool) -> None:
    write_annotations(tmp_path, "val2014", [(42, "Two dogs. "), (7, "A bus."), (42, "Dogs.")], [42, 7, 9, 8])
    colors = {42: "red", 7: "blue", 9: "red"}
    images = {f"val2014/COCO_val2014_{id:012d}.jpg": image_file(color) for id, color in colors.items()}
    if packed:
        write_zip(tmp_path / "val2014.zip", images)
    else:
        write_files(tmp_path, images)
    assert open_source(f"coco:{tmp_path}", px=1).splits == ("validation",)
    items = read_source(f"coco:{tmp_path}", "validation")
    assert captions_of(items) == {
        "COCO_val2014_000000000007": ("A bus.",),
        "COCO_val2014_000000000042": ("Dogs.", "Two dogs."),  # sorted by annotation id
    }
    assert examples_of(items)[0].image == image_file("blue")
    assert rejects_of(items) == {"COCO_val2014_000000000008": MISSING_FILE, "COCO_val2014_000000000009": NO_CAPTION}


def test_train_split_exists_if_its_annotations_exist(tmp_path: Path) -> None:
    for name in ("train2014", "val2014"):
        write_annotations(tmp_path, name, [(1, name)], [1])
        write_files(tmp_path, {f"{name}/COCO_{name}_{1:012d}.jpg": image_file("red")})
    assert open_source(f"coco:{tmp_path}", px=1).splits == ("train", "validation")
    assert list(captions_of(read_source(f"coco:{tmp_path}")).values()) == [("train2014",)]


def test_invalid_sources_raise_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of COCO at"):
        open_source(f"coco:{tmp_path}/missing", px=1)
    with pytest.raises(UserError, match=r"no annotations/captions_val2014\.json"):
        open_source(f"coco:{tmp_path}", px=1)
    write_files(tmp_path, {"annotations/captions_val2014.json": b'{"images": []}'})
    with pytest.raises(UserError, match=r"has neither val2014/ nor val2014\.zip"):
        open_source(f"coco:{tmp_path}", px=1).parts("validation")
    (tmp_path / "val2014").mkdir()
    with pytest.raises(UserError, match="not in COCO format"):
        open_source(f"coco:{tmp_path}", px=1).parts("validation")
