import pickle
from pathlib import Path
from typing import Any

import pytest

from micro_dit.data.sources import SLICE_SIZE, SOURCES, Example, Reject, make_item, open_source, parse_argument, slices
from micro_dit.errors import UserError


class Numbers:
    """A sequence of items whose slices contain only the selected numbers."""

    def __init__(self, numbers: Any) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, slice):
            return Numbers(self.numbers[index])
        return Example(str(self.numbers[index]), b"", ("x",))


def test_slices_cover_a_sequence_in_order() -> None:
    parts = slices(Numbers(list(range(10))), size=4)
    assert [(part.name, len(part)) for part in parts] == [("slice-00000", 4), ("slice-00001", 4), ("slice-00002", 2)]
    assert [int(item.id) for part in parts for item in part] == list(range(10))
    assert parts[2][-1].id == "9"
    with pytest.raises(IndexError):
        parts[1][4]
    assert slices(Numbers([])) == []
    assert len(slices(Numbers(range(SLICE_SIZE + 1)))) == 2


def test_pickled_slice_contains_only_its_range() -> None:
    part = slices(Numbers(list(range(100_000))), size=10)[-1]
    data = pickle.dumps(part)
    assert len(data) < 500
    assert list(pickle.loads(data)) == list(part)


def test_make_item_keeps_string_captions() -> None:
    assert make_item("1", b"x", "a") == Example("1", b"x", ("a",))
    assert make_item("1", b"x", "") == Example("1", b"x", ("",))
    assert make_item("1", b"x", ["a", None, "b", 3, "a"]) == Example("1", b"x", ("a", "b"))
    nothing: Any
    for nothing in (None, [], 5, float("nan"), [None], {}):
        assert make_item("1", b"x", nothing) == Reject("1", "no caption")
    assert make_item("\udce9", b"x", ["fine", "\ud83d"]) == Reject("\\udce9", "caption is not valid UTF-8")


def test_parse_argument() -> None:
    assert parse_argument("s", "/a,b/c", ("x",)) == ("/a,b/c", {})
    assert parse_argument("s", "/a,b,x=1,y=p=q,r", ("x", "y")) == ("/a,b", {"x": "1", "y": "p=q,r"})
    with pytest.raises(UserError, match=r"unknown option 'z'\. Valid options: x=\.\.\., y=\.\.\."):
        parse_argument("s", "/a,z=1", ("x", "y"))
    with pytest.raises(UserError, match="has no path"):
        parse_argument("s", "", ("x",))


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_raises_a_user_error_for_a_missing_path(name: str, tmp_path: Path) -> None:
    def read() -> None:
        source = open_source(f"{name}:{tmp_path}/missing", px=8)
        source.parts(source.splits[0])

    with pytest.raises(UserError, match=r"^[^\n]+$"):
        read()


def test_unknown_source_raises_an_error_with_known_names() -> None:
    with pytest.raises(UserError, match=r"Unknown data source 'imagenet'.*webdataset.*listing"):
        open_source("imagenet", px=8)
