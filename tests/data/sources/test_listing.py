import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from micro_dit.data.sources import MISSING_FILE, NO_CAPTION, NOT_UTF8, UNREADABLE_FILE, open_source
from micro_dit.errors import UserError
from tests.helpers.source_files import captions_of, examples_of, image_file, read_source, rejects_of, write_files

ROWS = [("img/b.jpg", 'A "red", card'), ("a.png", "line one\nline two"), ("img/b.jpg", "red"), ("gone.jpg", "x")]
ROWS.append(("img", "a folder, not a file"))


def write_listing(path: Path, columns: tuple[str, ...] = ("path", "caption")) -> None:
    """Writes ROWS in the format of the path's suffix, with an additional column."""
    named = [dict(zip(columns, row, strict=True), width=3) for row in ROWS]
    match path.suffix:
        case ".csv" | ".tsv":
            mark = "," if path.suffix == ".csv" else "\t"
            quoted = [[cell.replace('"', '""') for cell in row] for row in ROWS]
            lines = [mark.join((*columns, "width")), *(f'"{path}"{mark}"{text}"{mark}3' for path, text in quoted)]
            path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, named)) + "\n\n")
        case ".json":
            path.write_text(json.dumps(named))
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(named), path, row_group_size=2)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_files(tmp_path / "data", {"img/b.jpg": image_file("red"), "a.png": image_file("blue", "PNG")})
    return tmp_path / "data"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_tables_of_every_format(images: Path, suffix: str) -> None:
    write_listing(images / f"rows{suffix}")
    items = read_source(f"listing:{images}/rows{suffix}")
    assert captions_of(items) == {"img/b.jpg": ('A "red", card', "red"), "a.png": ("line one\nline two",)}
    assert [example.image for example in examples_of(items)] == [image_file("red"), image_file("blue", "PNG")]
    assert rejects_of(items) == {"gone.jpg": MISSING_FILE, "img": UNREADABLE_FILE}
    write_listing(images / f"named{suffix}", ("file", "alt text"))
    named = read_source(f"listing:{images}/named{suffix},path=file,caption=alt text,split=dev", "dev")
    assert named == items


def test_lists_of_captions(images: Path) -> None:
    rows = [{"path": "a.png", "caption": ["one", "two", "one"]}, {"path": "img/b.jpg", "caption": []}]
    (images / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), images / "rows.parquet")
    for suffix in ("jsonl", "parquet"):
        items = read_source(f"listing:{images}/rows.{suffix}")
        assert captions_of(items) == {"a.png": ("one", "two")}
        assert rejects_of(items) == {"img/b.jpg": NO_CAPTION}


def test_outside_and_absolute_paths(images: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.jpg").write_bytes(image_file("green"))
    (images / "rows.csv").write_text(f"path,caption\n../outside.jpg,one\n{tmp_path}/outside.jpg,two\n")
    items = read_source(f"listing:{images}/rows.csv")
    assert captions_of(items) == {"../outside.jpg": ("one",), f"{tmp_path}/outside.jpg": ("two",)}


def test_missing_files_and_invalid_utf8_reject_only_their_items(images: Path) -> None:
    lines = b"path,caption\na.png,caf\xe9\nimg/b.jpg,fine\n,no path\nimg/b.jpg\na\x00.png,x\n"
    (images / "rows.csv").write_bytes(lines)
    json_lines = b'{"path":"a.png","caption":"caf\xe9"}\n{"path":"img/b.jpg","caption":"fine"}\n{"caption":"no path"}\n'
    (images / "rows.jsonl").write_bytes(json_lines + b'{"path":"a\\u0000.png","caption":"x"}')
    paths, captions = ["a.png", "img/b.jpg", None, "a\0.png"], [b"caf\xe9", b"fine", b"no path", b"x"]
    binary = pyarrow.array(captions, pyarrow.binary())
    strings = pyarrow.StringArray.from_buffers(4, *binary.buffers()[1:])  # strings with invalid UTF-8
    parquet.write_table(pyarrow.table({"path": paths, "caption": strings}), images / "rows.parquet")
    for suffix in ("csv", "jsonl", "parquet"):
        items = read_source(f"listing:{images}/rows.{suffix}")
        assert captions_of(items) == {"img/b.jpg": ("fine",)}
        rejects = {"a.png": NOT_UTF8, "row 3 without a path": MISSING_FILE, "a\0.png": UNREADABLE_FILE}
        assert rejects_of(items) == rejects


def test_invalid_sources_raise_a_user_error(images: Path) -> None:
    contents = {
        "columns.csv": (b"file,caption\na.png,x\n", r"columns\.csv has no column path\..* columns are file, caption"),
        "empty.csv": (b"path,caption\n", "has no rows"),
        "half.jsonl": (b'{"path": "a.png", "caption": "x"}\n{"path"', "Line 2 of .*half.jsonl is not valid JSON"),
        "list.jsonl": (b"[1]\n", "Line 1 of .*list.jsonl is not a JSON object"),
        "number.json": (b"1", "neither a JSON list nor a JSON object"),
        "no.parquet": (b"hello", r"Cannot read .*no\.parquet"),
        "table.xlsx": (b"", r"Supported formats are \.csv"),
    }
    for name, (content, message) in contents.items():
        (images / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_source(f"listing:{images}/{name}", px=1).parts("train")
    with pytest.raises(UserError, match="no listing at"):
        open_source(f"listing:{images}/missing.csv", px=1)
    write_listing(images / "rows.parquet")
    with pytest.raises(UserError, match=r"has no column alt\..* columns are path, caption"):
        open_source(f"listing:{images}/rows.parquet,caption=alt", px=1).parts("train")
