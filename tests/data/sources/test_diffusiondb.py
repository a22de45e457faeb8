import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from micro_dit.data.sources import DAMAGED, MISSING_FILE, NO_CAPTION, NOT_JSON, UNREADABLE_FILE, open_source
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


def prompts(**texts: str) -> bytes:
    """Returns the contents of part-000001.json with the prompt of each image."""
    entries = {f"{name}.png": {"p": text, "se": 38, "c": 7.0, "st": 50, "sa": "k_lms"} for name, text in texts.items()}
    return json.dumps(entries).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    red, blue = image_file("red", "PNG"), image_file("blue", "PNG")
    first = {"b.png": red, "a.png": blue, "extra.png": red, "part-000001.json": prompts(a="a castle", b="b", gone="x")}
    write_zip(tmp_path / "images" / "part-000001.zip", first)
    second = {"c.png": red, "part-000002.json": prompts(c="unpacked")}
    write_files(tmp_path / "images" / "part-000002", second)
    table = {
        "image_name": ["c.png", "a.png", "b.png", "gone.png"],
        "prompt": ["table c", "table a", None, "x"],
        "part_id": pyarrow.array([2, 1, 1, 1], pyarrow.uint16()),
        "seed": [1, 2, 3, 4],
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "metadata.parquet")
    return tmp_path


def test_prompts_from_the_archives(folder: Path) -> None:
    items = read_source(f"diffusiondb:{folder}")
    assert captions_of(items) == {
        "part-000001/a.png": ("a castle",),
        "part-000001/b.png": ("b",),
        "part-000002/c.png": ("unpacked",),
    }
    assert rejects_of(items) == {"part-000001/extra.png": NO_CAPTION, "part-000001/gone.png": MISSING_FILE}
    assert examples_of(items)[0].image == image_file("blue", "PNG")


def test_prompts_from_the_metadata(folder: Path) -> None:
    items = read_source(f"diffusiondb:{folder},metadata={folder / 'metadata.parquet'}")
    assert captions_of(items) == {"part-000001/a.png": ("table a",), "part-000002/c.png": ("table c",)}
    reasons = {"extra.png": NO_CAPTION, "b.png": NO_CAPTION, "gone.png": MISSING_FILE}
    assert rejects_of(items) == {f"part-000001/{name}": reason for name, reason in reasons.items()}


def test_damaged_archives_and_members_are_rejects(folder: Path) -> None:
    images = folder / "images"
    (images / "part-000003.zip").write_bytes(
        (images / "part-000001.zip").read_bytes()[:-30]
    )  # the zip directory is missing
    write_zip(images / "part-000004.zip", {"d.png": image_file("red", "PNG"), "part-000004.json": b"{"})
    write_zip(images / "part-000005.zip", {"e.png": b"\x89PNG" * 30, "part-000005.json": prompts(e="broken")})
    data = (images / "part-000005.zip").read_bytes()
    data = data.replace(b"\x89PNG\x89PNG", b"\x89PNG\x00PNG", 1)  # detected by the checksum
    (images / "part-000005.zip").write_bytes(data)
    rejects = rejects_of(read_source(f"diffusiondb:{folder}"))
    assert rejects["part-000003"] == DAMAGED
    assert rejects["part-000004"] == NOT_JSON
    assert rejects["part-000004/d.png"] == NO_CAPTION
    assert rejects["part-000005/e.png"] == UNREADABLE_FILE


def test_invalid_sources_raise_a_user_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no part-000001\.zip"):
        open_source(f"diffusiondb:{tmp_path / 'empty'}", px=1)
    with pytest.raises(UserError, match=r"no metadata\.parquet at"):
        open_source(f"diffusiondb:{folder},metadata=missing.parquet", px=1)
    (folder / "metadata.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"Cannot read .*metadata\.parquet"):
        open_source(f"diffusiondb:{folder},metadata={folder / 'metadata.parquet'}", px=1).parts("train")
