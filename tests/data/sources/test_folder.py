import os
from pathlib import Path

import pytest

from micro_dit.data.sources import NO_CAPTION, NO_IMAGE, NOT_UTF8, UNREADABLE_FILE, open_source
from micro_dit.errors import UserError
from tests.helpers.source_files import captions_of, examples_of, image_file, read_source, rejects_of, write_files


def test_images_with_text_files(tmp_path: Path) -> None:
    files = {
        "b.jpg": image_file("red"), "b.txt": b"  A red card.\nSecond line.\n",
        "a/x.PNG": image_file("blue", "PNG"), "a/x.txt": "\ufeffblå".encode(),
        "a/x.webp": image_file("green", "WEBP"),
        "c.v2.jpeg": image_file("red"), "c.v2.txt": b"dots",
        "empty.jpg": b"", "empty.txt": b"",
        "notes.md": b"ignored", ".hidden.jpg": b"ignored", ".cache/y.jpg": b"ignored",
    }  # fmt: skip
    write_files(tmp_path, files)
    items = read_source(f"folder:{tmp_path}")
    assert captions_of(items) == {
        "a/x.PNG": ("blå",),
        "a/x.webp": ("blå",),  # two images with the same stem share the text file
        "b.jpg": ("A red card.\nSecond line.",),
        "c.v2.jpeg": ("dots",),
        "empty.jpg": ("",),
    }
    assert [item.id for item in items] == sorted(captions_of(items))
    assert examples_of(items)[2].image == image_file("red")
    assert examples_of(items)[-1].image == b""  # sources do not decode images
    assert not rejects_of(items)


def test_missing_and_damaged_items_are_rejects(tmp_path: Path) -> None:
    files = {
        "alone.jpg": image_file("red"),
        "latin.jpg": image_file("red"),
        "latin.txt": b"caf\xe9",
        "text.txt": b"no image",
    }
    write_files(tmp_path, files)
    (tmp_path / "locked.jpg").symlink_to("locked.jpg")  # a link to itself is unreadable
    (tmp_path / "locked.txt").write_text("locked")
    name = os.fsdecode(b"na\xefve")
    write_files(tmp_path, {f"{name}.jpg": image_file("red"), f"{name}.txt": b"naive"})
    items = read_source(f"folder:{tmp_path},split=dev", "dev")
    assert captions_of(items) == {"na\\udcefve.jpg": ("naive",)}
    reasons = {"alone.jpg": NO_CAPTION, "latin.jpg": NOT_UTF8, "text.txt": NO_IMAGE, "locked.jpg": UNREADABLE_FILE}
    assert rejects_of(items) == reasons


def test_invalid_sources_raise_a_user_error(tmp_path: Path) -> None:
    write_files(tmp_path, {"only.txt": b"x"})
    for spec, message in {
        f"folder:{tmp_path}/missing": "no folder of images at",
        f"folder:{tmp_path}/only.txt": "is not a folder",
        f"folder:{tmp_path}": "no images in",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(spec, px=1).parts("train")
