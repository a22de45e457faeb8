import importlib.util
from pathlib import Path

import pytest

from micro_dit.data.sources import MISSING_FILE, NO_CAPTION, open_source
from micro_dit.errors import UserError
from tests.helpers.source_files import captions_of, examples_of, image_file, read_source, rejects_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes data sets with embedded, linked and missing images, and with several types of captions."""
    import datasets

    folder = tmp_path_factory.mktemp("hf")
    file = str(folder / "file.png")
    (folder / "file.png").write_bytes(image_file("green", "PNG"))
    columns = {
        "image": [
            {"bytes": image_file("red"), "path": None},
            {"bytes": None, "path": file},
            None,
            {"bytes": b"not an image", "path": "name.jpg"},
        ],
        "text": ["red", "green", "none", None],
        "other": [["one", "two"], ["three"], [], []],
        "file": [file, file + ".gone", None, file],
    }
    features = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value("string"),
        other=datasets.List(datasets.Value("string")),
        file=datasets.Value("string"),
    )
    data = datasets.Dataset.from_dict(columns, features=features)
    data.save_to_disk(folder / "plain")
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(folder / "splits")
    return folder


def test_saved_data_set_yields_the_stored_bytes(saved: Path) -> None:
    items = read_source(f"hf:{saved}/plain")
    assert captions_of(items) == {"000000000": ("red",), "000000001": ("green",)}
    assert [example.image for example in examples_of(items)] == [image_file("red"), image_file("green", "PNG")]
    assert rejects_of(items) == {"000000002": MISSING_FILE, "000000003": NO_CAPTION}
    items = read_source(f"hf:{saved}/plain,image=file")  # a column of paths
    assert captions_of(items) == {"000000000": ("red",)}
    assert rejects_of(items) == {"000000001": MISSING_FILE, "000000002": MISSING_FILE, "000000003": NO_CAPTION}


def test_splits_columns_and_lists_of_captions(saved: Path) -> None:
    assert captions_of(read_source(f"hf:{saved}/splits,split=test", "test")) == {"000000000": ("green",)}
    items = read_source(f"hf:{saved}/splits,caption=other")
    assert captions_of(items) == {"000000000": ("one", "two"), "000000001": ("three",)}


def test_slices_keep_row_numbers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("micro_dit.data.sources.slices.__defaults__", (2,))
    items = read_source(f"hf:{saved}/plain")
    assert [item.id for item in items] == [f"{number:09d}" for number in range(4)]


def test_invalid_sources_raise_a_user_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, message in {
        f"hf:{saved}/plain,caption=title": "no column 'title'.* image, text, other, file",
        f"hf:{saved}/splits,split=dev": "no split 'dev'.* one of train, test",
        f"hf:{saved}/missing": "Cannot open the data set",
    }.items():
        source = open_source(spec, px=1)
        with pytest.raises(UserError, match=message):
            source.parts(source.splits[0])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_source("hf:x", px=1)
