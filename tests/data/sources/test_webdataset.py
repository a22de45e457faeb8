import json
import tarfile
from pathlib import Path

import pytest

from micro_dit.data.sources import DAMAGED, NO_CAPTION, NO_IMAGE, NOT_JSON, NOT_UTF8, REPEATED, Reject, open_source
from micro_dit.errors import UserError
from tests.helpers.source_files import captions_of, examples_of, picture, read_source, rejects_of, write_tar


def sample(key: str, caption: str, color: str = "red") -> dict[str, bytes]:
    """The three members of a sample as CC12M's tars and img2dataset's have them."""
    record = {"caption": caption, "url": "http://example.org", "key": key, "status": "success", "width": 24}
    return {f"{key}.jpg": picture(color), f"{key}.txt": caption.encode(), f"{key}.json": json.dumps(record).encode()}


def test_cc12m_tars_are_parts_in_order(tmp_path: Path) -> None:
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
    assert items[1].image == picture("blue")


def test_a_pattern_over_folders_gives_unique_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "00000.tar", sample("000000000", folder))
    write_tar(tmp_path / "c" / "other.tar", sample("1", "c"))
    items = read_source(f"webdataset:{tmp_path}/*/0*.tar")
    assert captions_of(items) == {"a/00000/000000000": ("a",), "b/00000/000000000": ("b",)}


def test_images_and_captions_of_every_kind(tmp_path: Path) -> None:
    members = {
        "./upper.JPG": picture("red"),
        "./upper.txt": b"capitals",
        "dir/deep.webp": picture("red", "WEBP"),
        "dir/deep.json": b'{"caption": "from json"}',
        "two.dots.png": picture("red", "PNG"),
        "two.dots.txt": b"no caption: the key ends at the first dot",
        "dir.v2/dotted.jpeg": picture("red"),
        "dir.v2/dotted.txt": "\ufeffwith a mark".encode(),
        "empty.png": picture("red", "PNG"),
        "empty.txt": b"",
        "._upper.jpg": b"what macOS leaves behind",
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
    assert rejects_of(items) == {"0/two": NO_IMAGE}  # 'two' has 'dots.txt' only in name


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    members = [
        ("nothing.jpg", picture("red")),
        ("null.jpg", picture("red")),
        ("null.json", b'{"caption": null}'),
        ("list.jpg", picture("red")),
        ("list.json", b"[]"),
        ("alone.txt", b"a caption"),
        ("latin.jpg", picture("red")),
        ("latin.txt", "é".encode("latin1")),
        ("half.jpg", picture("red")),
        ("half.json", b'{"caption": "'),
        ("surrogate.jpg", picture("red")),
        ("surrogate.json", b'{"caption": "\\ud83d"}'),
        ("good.jpg", picture("green")),
        ("good.txt", b"good"),
        ("good.jpg", picture("red")),
        ("na\udcefve.jpg", picture("red")),
        ("na\udcefve.txt", b"a file name in Latin 1"),
    ]
    write_tar(tmp_path / "0.tar", members)
    items = read_source(f"webdataset:{tmp_path}")
    assert captions_of(items) == {"0/good": ("good",), "0/na\\udcefve": ("a file name in Latin 1",)}
    assert examples_of(items)[0].image == picture("green")
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


def test_a_truncated_tar_yields_what_is_whole_and_one_reject(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    members: dict[str, bytes] = {}
    for number in range(4):
        members |= {f"{number}.txt": f"caption {number}".encode(), f"{number}.jpg": picture("red")}
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
        if length == end:  # all is there but the end mark
            assert items[:-1] == reference
        elif length > 5:
            assert items[:-2] == reference[:3]
            assert items[-2] == Reject("whole/3", NO_IMAGE)
        else:
            assert len(items) == 1


def test_a_tar_that_is_damaged_in_the_middle_or_no_tar_at_all_is_a_reject(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("a", "one") | sample("b", "two"))
    with tarfile.open(tmp_path / "0.tar") as tar:
        offset = tar.getmember("b.jpg").offset
    with open(tmp_path / "0.tar", "r+b") as file:
        file.seek(offset)
        file.write(b"garbage" * 70)
    (tmp_path / "1.tar").write_bytes(b"<html>404 not found</html>" * 100)
    (tmp_path / "2.tar").write_bytes(b"\x1f\x8b" + bytes(2000))  # compressed, against its name
    items = read_source(f"webdataset:{tmp_path}")
    assert captions_of(items) == {"0/a": ("one",)}
    assert rejects_of(items) == {"0": DAMAGED, "1": DAMAGED, "2": DAMAGED}


def test_an_index_follows_its_file(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("a", "one"))
    assert len(read_source(f"webdataset:{tmp_path}")) == 1
    write_tar(tmp_path / "0.tar", sample("a", "one") | sample("b", "two"))
    assert len(read_source(f"webdataset:{tmp_path}")) == 2


def test_opening_reads_no_archive(tmp_path: Path) -> None:
    (tmp_path / "0.tar").mkdir()  # cannot be opened as a file
    assert [part.name for part in open_source(f"webdataset:{tmp_path}", px=1).parts("train")] == ["0"]


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    for spec, message in {
        f"webdataset:{tmp_path}": "no .tar files at",
        f"webdataset:{tmp_path}/missing": "no .tar files at",
        "webdataset:": "needs a path",
        f"webdataset:{tmp_path},shuffle=1": "no option 'shuffle'; known ones: split=",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(spec, px=1)
    write_tar(tmp_path / "0.tar", sample("a", "one"))
    with pytest.raises(UserError, match="has no split 'test'; known ones: train"):
        open_source(f"webdataset:{tmp_path}", px=1).parts("test")
    write_tar(tmp_path / "1.tar.gz", sample("a", "one"), "w:gz")
    with pytest.raises(UserError, match=r"1\.tar\.gz is compressed"):
        open_source(f"webdataset:{tmp_path}", px=1)
