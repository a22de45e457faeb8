import json
from pathlib import Path

import pytest

from micro_dit.data.sources import DAMAGED, MISSING_FILE, NO_CAPTION, NOT_UTF8, REPEATED, open_source
from micro_dit.errors import UserError
from tests.helpers.source_files import (
    captions_of,
    examples_of,
    image_file,
    read_source,
    rejects_of,
    write_files,
    write_tar,
)


def annotation(path: str, prompt: str, caption: str | None = None) -> bytes:
    """Returns a line of train_anno_realease_repath.jsonl."""
    row = {
        "img_path": path, "prompt": prompt, "Task1": {"Content": [["a"]], "Style": {}},
        "Task2": {"Caption": caption} if caption else {}, "Task3": {"Content-relevant QA": []},
    }  # fmt: skip
    return json.dumps(row).encode() + b"\n"


def write_annotations(folder: Path, name: str = "train_anno_realease_repath.jsonl") -> None:
    lines = [
        annotation("./001/c.jpg", "city, 8k --ar 3:2", "A city at night."),
        annotation("./000/b.jpg", "boat", "A boat."),
        annotation("./000/a.jpg", "apple"),
        annotation("./000/gone.jpg", "gone", "Gone."),
        annotation("./000/latin.jpg", "x").replace(b'"x"', b'"\xe9"'),
        annotation("./007/never_downloaded.jpg", "x"),
    ]
    write_files(folder, {name: b"".join(lines)})


IMAGES = {f"{name}.jpg": image_file("red") for name in ("b", "a", "extra", "latin")}
EXPECTED = {"000/b": ("boat", "A boat."), "000/a": ("apple",), "001/c": ("city, 8k --ar 3:2", "A city at night.")}
REJECTS = {"000/extra.jpg": NO_CAPTION, "000/gone.jpg": MISSING_FILE, "000/latin.jpg": NOT_UTF8}


LAYOUTS = [("tgz", "w:gz", "./000/"), ("tar", "w", ""), ("tar.gz", "w:gz", "x/000/")]


@pytest.mark.parametrize(("ending", "mode", "prefix"), LAYOUTS)
def test_archives_are_read_in_stored_order(tmp_path: Path, ending: str, mode: str, prefix: str) -> None:
    train = tmp_path / "data" / "train"
    write_annotations(train)
    write_tar(train / "imgs" / f"000.{ending}", {f"{prefix}{name}": data for name, data in IMAGES.items()}, mode)
    write_tar(train / "imgs" / "001.tgz", {"001/c.jpg": image_file("blue")}, "w:gz")
    source = open_source(f"journeydb:{tmp_path}", px=1)
    assert source.splits == ("train",)
    assert [part.name for part in source.parts("train")] == ["000", "001"]
    items = read_source(f"journeydb:{tmp_path}", exact=False)  # not exact because of images without annotations
    assert captions_of(items) == {f"{id}.jpg": captions for id, captions in EXPECTED.items()}
    assert rejects_of(items) == REJECTS
    assert list(captions_of(items)) == ["000/b.jpg", "000/a.jpg", "001/c.jpg"]  # stored order of the archive
    assert examples_of(items)[-1].image == image_file("blue")


def test_unpacked_folders_and_the_validation_split(tmp_path: Path) -> None:
    write_annotations(tmp_path, "valid_anno_repath.jsonl")
    write_files(tmp_path, {f"000/{name}": data for name, data in IMAGES.items()} | {"001/c.jpg": image_file("blue")})
    items = read_source(f"journeydb:{tmp_path}", "validation", exact=False)
    assert captions_of(items) == {f"{id}.jpg": captions for id, captions in EXPECTED.items()}
    assert rejects_of(items) == REJECTS
    assert [len(part) for part in open_source(f"journeydb:{tmp_path}", px=1).parts("validation")] == [4, 1]


def test_truncated_archive_yields_its_complete_images(tmp_path: Path) -> None:
    write_annotations(tmp_path)
    noise = {f"000/{name}": IMAGES[name] + bytes(range(256)) * 40 for name in ("b.jpg", "a.jpg")}
    for ending, mode in (("tgz", "w:gz"), ("tar", "w")):
        path = tmp_path / f"000.{ending}"
        write_tar(path, noise | {"000/b.jpg": noise["000/b.jpg"]}, mode)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - (20 if ending == "tgz" else 11_000)])
        items = read_source(f"journeydb:{tmp_path}", exact=False)
        assert "000/b.jpg" in captions_of(items)
        assert rejects_of(items)["000"] == DAMAGED
        assert rejects_of(items)["000/gone.jpg"] == MISSING_FILE
        path.write_bytes(b"no archive")
        items = read_source(f"journeydb:{tmp_path}", exact=False)
        assert set(rejects_of(items).values()) == {DAMAGED, MISSING_FILE}
        assert len(items) == 5
        path.unlink()


def test_repeated_image_is_a_reject(tmp_path: Path) -> None:
    write_annotations(tmp_path)
    write_tar(tmp_path / "000.tgz", [("000/b.jpg", image_file("red")), ("000/b.jpg", image_file("blue"))], "w:gz")
    items = read_source(f"journeydb:{tmp_path}", exact=False)
    assert examples_of(items)[0].image == image_file("red")
    assert rejects_of(items)["000/b.jpg"] == REPEATED


def test_invalid_sources_raise_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train_anno\*\.jsonl"):
        open_source(f"journeydb:{tmp_path}", px=1)
    write_annotations(tmp_path)
    with pytest.raises(UserError, match=r"There are no images in .*000\.tgz"):
        open_source(f"journeydb:{tmp_path}", px=1).parts("train")
    (tmp_path / "000").mkdir()
    write_files(tmp_path, {"train_anno_realease_repath.jsonl": annotation("./000/a.jpg", "x") + b'{"prompt": "x"}\n'})
    with pytest.raises(UserError, match=r"Row 2 of .* has no img_path"):
        open_source(f"journeydb:{tmp_path}", px=1).parts("train")
