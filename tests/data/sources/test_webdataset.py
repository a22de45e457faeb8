import json
import tarfile
from pathlib import Path

import pytest

from micro_dit.data.sources import DAMAGED, NO_CAPTION, NO_IMAGE, NOT_JSON, NOT_UTF8, REPEATED, Reject, open_source
from micro_dit.errors import UserError
from tests.helpers.source_files import captions_of, examples_of, image_file, read_source, rejects_of, write_tar


def sample(key: str, caption: str, color: str = "red") -> dict[str, bytes]:
    """Returns the three members of a sample in the format of CC12M and img2dataset."""
    record = {"caption": caption, "url": "http://example.org", "key": key, "status": "success", "width": 24}
    return {f"{key}.jpg": image_file(color), f"{key}.txt": caption.encode(), f"{key}.json": json.dumps(record).encode()}


def test_cc12m_tars_are_sorted_parts(tmp_path: Path) -> None:
    for number in (1, 0):
        members = sample(f"{number}00000007", "A cat") | sample(f"{number}00000003", "Zwei Hündchen\n", "blue")
        write_tar(tmp_path / f"cc12m-train-000{number}.tar", members)
    source = open_source(f"webdataset:{tmp_path}", px=1)
    assert source.splits == ("train",)
    assert "Conceptual 12M" in source.attribution
    assert [part.name for part in source.parts("train")] == ["cc12m-train-0000", "cc12m-train-0001"]
    items = read_source(f"webdataset:{tmp_path}")
    assert captions_of(items) == {
        "cc12m-train-0000/000000007": ("A cat",),
        "cc12m-train-0000/000000003": ("Zwei Hündchen",),
        "cc12m-train-0001/100000007": ("A cat",),
        "cc12m-train-0001/100000003": ("Zwei Hündchen",),
    }
    assert items[1].image == image_file("blue")


def test_pattern_over_folders_yields_unique_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "00000.tar", sample("000000000", folder))
    write_tar(tmp_path / "c" / "other.tar", sample("1", "c"))
    items = read_source(f"webdataset:{tmp_path}/*/0*.tar")
    assert captions_of(items) == {"a/00000/000000000": ("a",), "b/00000/000000000": ("b",)}


def test_images_and_captions_of_every_format(tmp_path: Path) -> None:
    members = {
        "./upper.JPG": image_file("red"),
        "./upper.txt": b"capitals",
        "dir/deep.webp": image_file("red", "WEBP"),
        "dir/deep.json": b'{"caption": "from json"}',
        "two.dots.png": image_file("red", "PNG"),
        "two.dots.txt": b"no caption: the key ends at the first dot",
        "dir.v2/dotted.jpeg": image_file("red"),
        "dir.v2/dotted.txt": "\ufeffwith a mark".encode(),
        "empty.png": image_file("red", "PNG"),
        "empty.txt": b"",
        "._upper.jpg": b"created by macOS",
        "stats.parquet": b"no sample",
    }
    write_tar(tmp_path / "0.tar", members)
    items = read_source(f"webdataset:{tmp_path}/0.tar,split=validation", "validation")
    assert captions_of(items) == {
        "0/upper": ("capitals",),
        "0/dir/deep": ("from json",),
        "0/dir.v2/dotted": ("with a mark",),
        "0/empty": ("",),
    }
    assert rejects_of(items) == {"0/two": NO_IMAGE}  # the key is 'two', with the members 'dots.png' and 'dots.txt'


def test_missing_and_damaged_items_are_rejects(tmp_path: Path) -> None:
    members = [
        ("nothing.jpg", image_file("red")),
        ("null.jpg", image_file("red")),
        ("null.json", b'{"caption": null}'),
        ("list.jpg", image_file("red")),
        ("list.json", b"[]"),
        ("alone.txt", b"a caption"),
        ("latin.jpg", image_file("red")),
        ("latin.txt", "é".encode("latin1")),
        ("half.jpg", image_file("red")),
        ("half.json", b'{"caption": "'),
        ("surrogate.jpg", image_file("red")),
        ("surrogate.json", b'{"caption": "\\ud83d"}'),
        ("good.jpg", image_file("green")),
        ("good.txt", b"good"),
        ("good.jpg", image_file("red")),
        ("na\udcefve.jpg", image_file("red")),
        ("na\udcefve.txt", b"a file name in Latin 1"),
    ]
    write_tar(tmp_path / "0.tar", members)
    items = read_source(f"webdataset:{tmp_path}")
    assert captions_of(items) == {"0/good": ("good",), "0/na\\udcefve": ("a file name in Latin 1",)}
    assert examples_of(items)[0].image == image_file("green")
    assert rejects_of(items) == {
        "0/nothing": NO_CAPTION,
        "0/null": NO_CAPTION,
        "0/list": NO_CAPTION,
        "0/alone": NO_IMAGE,
        "0/latin": NOT_UTF8,
        "0/half": NOT_JSON,
        "0/surrogate": NOT_UTF8,
        "0/good": REPEATED,
    }


def test_truncated_tar_yields_complete_samples_and_one_reject(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    members: dict[str, bytes] = {}
    for number in range(4):
        members |= {f"{number}.txt": f"caption {number}".encode(), f"{number}.jpg": image_file("red")}
    write_tar(whole, members)
    reference = read_source(f"webdataset:{whole}")
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-1]
        end = tar.offset
    assert len(reference) == 4
    for length in (last.offset_data + 100, last.offset_data, last.offset + 100, last.offset, end, 5, 0):
        cut = tmp_path / "cut" / "whole.tar"
        cut.parent.mkdir(exist_ok=True)
        cut.write_bytes(data[:length])
        items = read_source(f"webdataset:{cut}")
        assert items[-1] == Reject("whole", DAMAGED), length
        if length == end:  # only the end marker is missing
            assert items[:-1] == reference
        elif length > 5:
            assert items[:-2] == reference[:3]
            assert items[-2] == Reject("whole/3", NO_IMAGE)
        else:
            assert len(items) == 1


def test_damaged_or_invalid_tar_is_a_reject(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("a", "one") | sample("b", "two"))
    with tarfile.open(tmp_path / "0.tar") as tar:
        offset = tar.getmember("b.jpg").offset
    with open(tmp_path / "0.tar", "r+b") as file:
        file.seek(offset)
        file.write(b"garbage" * 70)
    (tmp_path / "1.tar").write_bytes(b"<html>404 not found</html>" * 100)
    (tmp_path / "2.tar").write_bytes(b"\x1f\x8b" + bytes(2000))  # compressed, despite its name
    items = read_source(f"webdataset:{tmp_path}")
    assert captions_of(items) == {"0/a": ("one",)}
    assert rejects_of(items) == {"0": DAMAGED, "1": DAMAGED, "2": DAMAGED}


def test_index_is_updated_when_the_file_changes(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("a", "one"))
    assert len(read_source(f"webdataset:{tmp_path}")) == 1
    write_tar(tmp_path / "0.tar", sample("a", "one") | sample("b", "two"))
    assert len(read_source(f"webdataset:{tmp_path}")) == 2


def test_opening_a_source_does_not_open_archives(tmp_path: Path) -> None:
    (tmp_path / "0.tar").mkdir()  # cannot be opened as a file
    assert [part.name for part in open_source(f"webdataset:{tmp_path}", px=1).parts("train")] == ["0"]


def test_invalid_sources_raise_a_user_error(tmp_path: Path) -> None:
    for spec, message in {
        f"webdataset:{tmp_path}": "no .tar files at",
        f"webdataset:{tmp_path}/missing": "no .tar files at",
        "webdataset:": "has no path",
        f"webdataset:{tmp_path},shuffle=1": "unknown option 'shuffle'. Valid options: split=",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(spec, px=1)
    write_tar(tmp_path / "0.tar", sample("a", "one"))
    with pytest.raises(UserError, match=r"has no split 'test'\. Its splits are train"):
        open_source(f"webdataset:{tmp_path}", px=1).parts("test")
    write_tar(tmp_path / "1.tar.gz", sample("a", "one"), "w:gz")
    with pytest.raises(UserError, match=r"1\.tar\.gz is compressed"):
        open_source(f"webdataset:{tmp_path}", px=1)
