import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from micro_dit.data.sources import NO_CAPTION, NOT_UTF8, open_source
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

CAPTIONS = {2: "The image shows a street.", 1: "The image shows a dog.", 5: "A boat."}
EXPECTED = {
    "sa_000000/sa_1": ("The image shows a dog.",),
    "sa_000000/sa_2": ("The image shows a street.",),
    "sa_000001/sa_5": ("A boat.",),
}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Writes two tars of images and masks. Image 3 has no caption."""
    masks = json.dumps({"image": {"image_id": 1}, "annotations": [{"segmentation": {"counts": "x"}}]}).encode()
    for tar, numbers in {"sa_000000": (1, 2, 3), "sa_000001": (5,)}.items():
        members: dict[str, bytes] = {}
        for number in numbers:
            members |= {f"./sa_{number}.jpg": image_file("red"), f"./sa_{number}.json": masks}
        write_tar(tmp_path / "sa1b" / f"{tar}.tar", members)
    return tmp_path / "sa1b"


def check(tars: Path, captions: Path, options: str = "") -> None:
    items = read_source(f"sa1b:{tars},captions={captions}{options}")
    assert captions_of(items) == EXPECTED
    assert rejects_of(items) == {"sa_000000/sa_3": NO_CAPTION}
    assert examples_of(items)[0].image == image_file("red")


def test_parquet_with_pixart_captions(tars: Path, tmp_path: Path) -> None:
    for half, numbers in enumerate(((2, 1), (5,))):
        table = {
            "image_path": [f"images/sa_{number}.jpg" for number in numbers],
            "caption": ["not this one"] * len(numbers),
            "caption_syn_pixart_llava15": [CAPTIONS[number] for number in numbers],
        }
        (tmp_path / "captions").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(table), tmp_path / "captions" / f"{half}.parquet")
    check(tars, tmp_path / "captions")
    assert (tmp_path / "captions.index.sqlite").exists()
    with pytest.raises(UserError, match=r"has no column id\..* columns are image_path, caption, caption_syn"):
        open_source(f"sa1b:{tars},captions={tmp_path / 'captions'},key=id", px=1).parts("train")


def test_json_and_text_captions_in_every_format(tars: Path, tmp_path: Path) -> None:
    rows = [{"image_id": number, "llava": caption} for number, caption in CAPTIONS.items()]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    check(tars, tmp_path / "a.json", ",caption=llava,key=image_id")
    named = [{"file_name": f"sa_{number}.jpg", "llava": caption} for number, caption in CAPTIONS.items()]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, named)))
    check(tars, tmp_path / "b.jsonl", ",caption=llava,key=file_name")
    (tmp_path / "c.json").write_text(json.dumps({f"sa_{number}": caption for number, caption in CAPTIONS.items()}))
    check(tars, tmp_path / "c.json")
    write_files(tmp_path / "d", {f"sub/sa_{number}.txt": caption.encode() for number, caption in CAPTIONS.items()})
    check(tars, tmp_path / "d")
    texts = {f"SA1B/sa_{number}.txt": caption.encode() + b"\n" for number, caption in CAPTIONS.items()}
    write_tar(tmp_path / "e.tar", texts)
    check(tars, tmp_path / "e.tar")
    keyed = {"__key__": [f"x/sa_{number}" for number in CAPTIONS], "txt": list(CAPTIONS.values())}
    parquet.write_table(pyarrow.table(keyed), tmp_path / "f.parquet")
    check(tars, tmp_path / "f.parquet")


def test_several_captions_per_image_and_invalid_utf8(tars: Path, tmp_path: Path) -> None:
    lines = b'{"id": 1, "caption": ["first", "second"]}\n{"id": 1, "caption": "third"}\n{"id": 2, "caption": "\xe9"}\n'
    (tmp_path / "captions.jsonl").write_bytes(lines)
    items = read_source(f"sa1b:{tars},captions={tmp_path / 'captions.jsonl'}")
    assert captions_of(items) == {"sa_000000/sa_1": ("first", "second", "third")}
    assert rejects_of(items)["sa_000000/sa_2"] == NOT_UTF8


def test_index_is_rewritten_only_when_the_captions_change(tars: Path, tmp_path: Path) -> None:
    captions, index = tmp_path / "captions.json", tmp_path / "elsewhere.sqlite"
    spec = f"sa1b:{tars},captions={captions},index={index}"
    captions.write_text('{"1": "old"}')
    assert captions_of(read_source(spec)) == {"sa_000000/sa_1": ("old",)}
    written = index.stat().st_mtime_ns
    read_source(spec)
    assert index.stat().st_mtime_ns == written
    captions.write_text('{"1": "newer"}')
    assert captions_of(read_source(spec)) == {"sa_000000/sa_1": ("newer",)}
    index.write_bytes(b"not a database")
    assert captions_of(read_source(spec)) == {"sa_000000/sa_1": ("newer",)}
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_invalid_sources_raise_a_user_error(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.jsonl").write_text('{"id": 1, "caption": "x"}\n{"id": 2, "cap')
    for spec, message in {
        f"sa1b:{tars}": "SA-1B does not include captions",
        f"sa1b:{tars},captions={tmp_path}/missing": "no file or folder of captions at",
        f"sa1b:{tmp_path}/empty,captions={tars}": "no .tar files at",
        f"sa1b:{tars},captions={tmp_path}/empty": "no captions at",
        f"sa1b:{tars},captions={tmp_path}/half.jsonl": "Line 2 of .* is not valid JSON",
        f"sa1b:{tars},captions={tars}/sa_000000.tar,index={tmp_path}/half.jsonl/index": "Cannot write",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(spec, px=1).parts("train")
