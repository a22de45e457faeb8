import dataclasses
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micro_dit.data.mixture import deal, parse_mix, read_mix
from micro_dit.data.pipeline import load_split, make_train_iterator
from micro_dit.data.shards import Record, read_manifest
from micro_dit.encoders.info import ImageEncoderInfo, TextEncoderInfo
from micro_dit.errors import UserError
from tests.helpers import tiny

VAE = ImageEncoderInfo("tiny", "0123", channels=8, downsample=8)
TEXT = TextEncoderInfo("letters", "4567", tokens=4, channels=6)
EXAMPLES = 23


def write_numbers(
    out: Path, first: int = 0, counts: dict[str, int] | None = None, captions: int = 1, **others: Any
) -> Path:
    """Writes shards where record n is filled with first + n, and its caption k with first + n + k / 10."""
    manifest = tiny.make_manifest((16, 32), **dict(vae=VAE, text=TEXT) | others)

    def record(split: str, number: int) -> Record:
        arrays = {field.name: np.full(field.shape_in(captions), first + number) for field in manifest.fields}
        arrays["caption_embedding"] = arrays["caption_embedding"] + np.arange(captions)[:, None, None] / 10
        texts = tuple(f"number {first + number}" + "!" * k for k in range(captions))
        return Record(f"{split}-{first + number}", texts, arrays)

    counts = counts or {"train": EXAMPLES, "validation": 3}
    splits = {split: [record(split, number) for number in range(count)] for split, count in counts.items()}
    return tiny.write_folder(out, manifest, splits, records_per_file=10)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbers(tmp_path_factory.mktemp("mean_std") / "shards")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Writes two folders: one with training examples 0-22 and one with 100-108, and a few validation examples."""
    folder = tmp_path_factory.mktemp("two")
    return write_numbers(folder / "large"), write_numbers(folder / "small", 100, {"train": 9, "validation": 2})


def numbers(iterator: Any, batches: int) -> list[int]:
    """Returns the numbers of the examples in the next batches."""
    return np.concatenate([next(iterator)["latent_mean"][:, 0, 0, 0] for _ in range(batches)]).astype(int).tolist()


# ---- One folder ------------------------------------------------------------------------------------------------------


def test_batch_has_float16_arrays_of_the_requested_resolution(shards: Path) -> None:
    batch = next(make_train_iterator(shards, "train", 32, batch_size=5, seed=0))
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "latent_mean": ((5, 4, 4, 8), "float16"),
        "latent_std": ((5, 4, 4, 8), "float16"),
        "caption": ((5, 4, 6), "float16"),
    }
    # All arrays of a row belong to the same record.
    assert len({array[0].ravel()[0] for array in batch.values()}) == 1
    assert next(make_train_iterator(shards, "train", 16, 5, 0))["latent_mean"].shape == (5, 2, 2, 8)


def test_posterior_samples_have_no_std(tmp_path: Path) -> None:
    folder = write_numbers(tmp_path / "shards", posterior="sample")
    batch = next(make_train_iterator(folder, "train", 32, batch_size=5, seed=0))
    assert {name: array.shape for name, array in batch.items()} == {"latent_mean": (5, 4, 4, 8), "caption": (5, 4, 6)}
    assert set(load_split(folder, "validation", 16)) == {"latent_mean", "caption", "text", "id"}


def test_every_epoch_has_every_example_once_in_a_new_order(shards: Path) -> None:
    iterator = make_train_iterator(shards, "train", 16, batch_size=4, seed=0)
    seen = numbers(iterator, EXAMPLES)  # four epochs that end inside batches
    epochs = [seen[start : start + EXAMPLES] for start in range(0, len(seen), EXAMPLES)]
    assert len(epochs) == 4
    assert all(sorted(epoch) == list(range(EXAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seed_determines_the_order(shards: Path) -> None:
    def order(seed: int) -> list[int]:
        return numbers(make_train_iterator(shards, "train", 16, 4, seed), 5)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_batch_size_does_not_change_the_order(shards: Path) -> None:
    assert numbers(make_train_iterator(shards, "train", 16, 4, 0), 15) == numbers(
        make_train_iterator(shards, "train", 16, 10, 0), 6
    )


def test_batch_may_be_larger_than_the_split(shards: Path) -> None:
    seen = numbers(make_train_iterator(shards, "train", 16, batch_size=50, seed=0), 1)
    assert sorted(seen[:EXAMPLES]) == sorted(seen[EXAMPLES : 2 * EXAMPLES]) == list(range(EXAMPLES))


@pytest.mark.parametrize("batches", [0, 2, 9, 31])
def test_state_resumes_exactly(shards: Path, batches: int) -> None:
    iterator = make_train_iterator(shards, "train", 16, batch_size=4, seed=3)
    numbers(iterator, batches + 1)
    state = iterator.get_state()
    expected = numbers(iterator, 8)
    fresh = make_train_iterator(shards, "train", 16, batch_size=4, seed=3)
    fresh.set_state(state)
    assert numbers(fresh, 8) == expected
    iterator.set_state(state)  # also works backward, on an iterator that has advanced
    assert numbers(iterator, 8) == expected


def test_each_epoch_uses_the_next_caption(tmp_path: Path) -> None:
    folder = write_numbers(tmp_path / "shards", counts={"train": 8}, captions=3)

    def captions(seed: int, epochs: int) -> list[set[tuple[int, int]]]:
        """Returns the pairs of example number and caption number in each epoch."""
        iterator = make_train_iterator(folder, "train", 16, batch_size=8, seed=seed)
        batches = [next(iterator) for _ in range(epochs)]
        pairs = [zip(b["latent_mean"][:, 0, 0, 0], b["caption"][:, 0, 0], strict=True) for b in batches]
        return [{(int(number), round(10 * (float(caption) - number))) for number, caption in of} for of in pairs]

    epochs = captions(0, 6)
    assert epochs == captions(0, 6)
    assert all(len(epoch) == 8 for epoch in epochs)
    everything = set(itertools.product(range(8), range(3)))
    assert set.union(*epochs[:3]) == set.union(*epochs[3:]) == everything  # each caption once in three epochs
    assert all(len({caption for _, caption in epoch}) == 3 for epoch in epochs)  # captions are mixed within an epoch
    assert captions(1, 1) != captions(0, 1)
    assert load_split(folder, "train", 16, 2)["text"] == ["number 0", "number 1"]


# ---- Processes -------------------------------------------------------------------------------------------------------


def global_batches(mix: str, count: int, batches: int, state: Any = None) -> tuple[list[dict[str, np.ndarray]], Any]:
    """Returns the global batches of `count` processes, and the final state."""
    iterators = [make_train_iterator(mix, "train", 16, 8, 5, index, count) for index in range(count)]
    for iterator in iterators:
        if state is not None:
            iterator.set_state(state)
    joined = []
    for _ in range(batches):
        rows = [next(iterator) for iterator in iterators]
        joined.append({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    (state,) = {str(iterator.get_state()): iterator.get_state() for iterator in iterators}.values()
    return joined, state


def assert_equal(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("mixed", [False, True])
def test_order_and_position_do_not_depend_on_the_number_of_processes(two: tuple[Path, Path], mixed: bool) -> None:
    mix = f"{two[0]}=0.7,{two[1]}=0.3" if mixed else str(two[0])
    expected, _ = global_batches(mix, 1, 12)
    first, state = global_batches(mix, 1, 5)
    assert_equal(first, expected[:5])
    for count in (2, 4):
        second, later = global_batches(mix, count, 3, state)
        assert_equal(second, expected[5:8])
        third, _ = global_batches(mix, 8 // count, 4, later)
        assert_equal(third, expected[8:])


# ---- Mixes -----------------------------------------------------------------------------------------------------------


def test_mix_has_exact_weights_and_covers_each_folder_once_per_epoch(two: tuple[Path, Path]) -> None:
    iterator = make_train_iterator(f"{two[0]}=0.7,{two[1]}=0.3", "train", 16, batch_size=10, seed=0)
    seen = [numbers(iterator, 1) for _ in range(30)]
    assert [sum(number >= 100 for number in batch) for batch in seen] == [3] * 30  # exact in each batch of ten
    for first, count in ((0, EXAMPLES), (100, 9)):
        of_folder = [number for batch in seen for number in batch if first <= number < first + 100]
        epochs = [of_folder[start : start + count] for start in range(0, len(of_folder) - count + 1, count)]
        assert len(epochs) == 9 if first == 0 else 10
        assert all(sorted(epoch) == list(range(first, first + count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_mix_without_weights_has_every_record_once_per_epoch(two: tuple[Path, Path]) -> None:
    iterator = make_train_iterator(f"{two[0]}, {two[1]}", "train", 16, batch_size=32, seed=0)
    epochs = [numbers(iterator, 1) for _ in range(3)]
    everything = [*range(EXAMPLES), *range(100, 109)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_folders_of_a_mix_are_shuffled_differently(tmp_path: Path) -> None:
    one, other = (write_numbers(tmp_path / name, first, {"train": 20}) for name, first in (("a", 0), ("b", 100)))
    seen = numbers(make_train_iterator(f"{one},{other}", "train", 16, 40, 0), 1)
    assert [n for n in seen if n < 100] != [n - 100 for n in seen if n >= 100]


@pytest.mark.parametrize("weights", [(1,), (7, 3), (1, 1, 1), (1, 1_000_003), (5, 0, 2), (3, 10, 2, 999)])
def test_deal_is_exact_even_and_consecutive(weights: tuple[int, ...]) -> None:
    total = sum(weights)
    counts = [0] * len(weights)
    for position in range(min(3 * total, 5000)):
        folder, before = deal(weights, position)
        assert before == counts[folder]  # consecutive numbers
        counts[folder] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (position + 1) * weight / total) < len(weights)
        if (position + 1) % total == 0:
            assert counts == [weight * (position + 1) // total for weight in weights]
    if total <= 5000:  # also at very large positions
        far = Counter(deal(weights, 10**15 * total + position)[0] for position in range(total))
        assert [far[folder] for folder in range(len(weights))] == list(weights)


def test_weights_need_not_add_up_to_one(two: tuple[Path, Path]) -> None:
    mix = read_mix(f"{two[0]}=1.4,{two[1]}=0.6")
    assert mix.weights("train") == [7, 3]
    assert read_mix(f"{two[0]}=1e-9,{two[1]}=1").weights("train") == [1, 10**9]
    assert read_mix(f"{two[0]},{two[1]}").weights("train") == [23, 9]


def test_parse_mix() -> None:
    assert parse_mix("data/a") == [("data/a", None)]
    assert parse_mix("data/a, data/b") == [("data/a", None), ("data/b", None)]
    assert parse_mix("a=0.7,b=3e-1") == [("a", 0.7), ("b", 0.3)]
    assert parse_mix("run=1/a=2") == [("run=1/a", 2.0)]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("", "an empty or repeated folder name"),
        ("a,", "an empty or repeated folder name"),
        ("=0.5", "an empty or repeated folder name"),
        ("a,a", "an empty or repeated folder name"),
        ("a=0.5,b", "weights for only some folders"),
        ("a=x,b=1", "the weight 'x' of a is not a number"),
        ("a=0,b=1", "a weight that is not positive"),
        ("a=-1,b=1", "a weight that is not positive"),
        ("a=nan,b=1", "a weight that is not positive"),
    ],
)
def test_invalid_mix_raises_a_user_error(mix: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_mix(mix)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("others", "what"),
    [
        (dict(vae=dataclasses.replace(VAE, fingerprint="89ab")), r"image encoders differ \(tiny 0123 and tiny 89ab\)"),
        (
            dict(vae=dataclasses.replace(VAE, name="big", fingerprint="unverified")),
            r"image encoders differ \(tiny 0123 and big unverified\)",
        ),
        (dict(vae=dataclasses.replace(VAE, channels=4)), r"latent channels differ \(8 and 4\)"),
        (dict(text=dataclasses.replace(TEXT, fingerprint="89ab")), r"text encoders differ \(letters 4567 and .*89ab\)"),
        (dict(text=dataclasses.replace(TEXT, tokens=5)), r"caption tokens differ \(4 and 5\)"),
        (dict(text=dataclasses.replace(TEXT, channels=7)), r"caption channels differ \(6 and 7\)"),
        (dict(posterior="sample"), r"posteriors differ \(mean_std and sample\)"),
        (dict(caption_cleaning="deepfloyd-2"), r"caption cleanings differ \(none and deepfloyd-2\)"),
    ],
)
def test_incompatible_folders_are_named_in_the_error(shards: Path, tmp_path: Path, others: dict, what: str) -> None:
    other = write_numbers(tmp_path / "other", **others)
    with pytest.raises(UserError, match=rf"^{shards} and {other} cannot be used together because their {what}\. "):
        make_train_iterator(f"{shards},{other}", "train", 16, 4, 0)


def test_unknown_fingerprints_are_compared_by_name(shards: Path, tmp_path: Path) -> None:
    other = write_numbers(tmp_path / "other", 100, vae=dataclasses.replace(VAE, fingerprint="unverified"))
    next(make_train_iterator(f"{shards},{other}", "train", 16, 4, 0))


def test_mix_has_a_combined_manifest(two: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = read_mix(f"{two[0]}=0.7,{two[1]}=0.3").manifest()
    assert (manifest.records("train"), manifest.records("validation")) == (32, 5)
    assert manifest.bytes == sum(read_manifest(folder).bytes for folder in two)
    assert manifest.fingerprint not in {read_manifest(folder).fingerprint for folder in two}
    # Constant latents n with standard deviation n: E[x²] = 2 n².
    shares = np.concatenate([np.full(23, 0.7 / 23), np.full(9, 0.3 / 9)])
    n = np.concatenate([np.arange(23), np.arange(100, 109)]).astype(np.float64)
    train_only = [write_numbers(tmp_path / str(first), first, {"train": k}) for first, k in ((0, 23), (100, 9))]
    manifest = read_mix(f"{train_only[0]}=0.7,{train_only[1]}=0.3").manifest()
    assert manifest.latent_std(16) == pytest.approx(np.sqrt(np.sum(shares * 2 * n**2)))
    assert manifest.statistics["16"]["mean"][0] == pytest.approx(np.sum(shares * n))
    # A mix of one folder has the manifest of the folder.
    assert read_mix(str(two[0])).manifest() == read_manifest(two[0])


# ---- Splits in memory ------------------------------------------------------------------------------------------------


def test_split_is_loaded_in_order(shards: Path) -> None:
    loaded = load_split(shards, "validation", 32)
    assert loaded["text"] == ["number 0", "number 1", "number 2"]
    assert loaded["id"] == ["validation-0", "validation-1", "validation-2"]
    assert loaded["latent_std"].shape == (3, 4, 4, 8)
    assert loaded["caption"].dtype == np.float16
    assert loaded["caption"][:, 0, 0].tolist() == [0, 1, 2]
    assert load_split(shards, "validation", 32, limit=2)["id"] == loaded["id"][:2]
    assert len(load_split(shards, "validation", 32, limit=9)["id"]) == 3


def test_split_of_a_mix_alternates_and_is_loaded_completely(two: tuple[Path, Path], tmp_path: Path) -> None:
    loaded = load_split(f"{two[0]}=0.5,{two[1]}=0.5", "validation", 32)
    assert sorted(loaded["id"]) == [f"validation-{number}" for number in (0, 1, 100, 101, 2)]
    first = load_split(f"{two[0]}=0.5,{two[1]}=0.5", "validation", 32, limit=4)["id"]
    assert first == loaded["id"][:4]
    assert sorted(first) == [f"validation-{number}" for number in (0, 1, 100, 101)]
    # Folders without the split are skipped.
    third = write_numbers(tmp_path / "third", 200, {"train": 5})
    assert load_split(f"{two[0]},{third}", "validation", 32)["id"] == ["validation-0", "validation-1", "validation-2"]
    with pytest.raises(UserError, match="no examples in split 'test'"):
        load_split(f"{two[0]},{third}", "test", 32)


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "train", 16, 4, 0), "No shards at nowhere"),
        ((None, "test", 16, 4, 0), "no examples in split 'test'"),
        ((None, "train", 64, 4, 0), "64 px is requested"),
        ((None, "train", 16, 10, 0, 0, 4), "batch of 10 images cannot be split over 4 processes"),
        ((None, "train", 16, 0, 0), "at least 1"),
        ((None, "train", 16, 4, -1), "at least 0"),
    ],
)
def test_invalid_arguments_raise_a_user_error(shards: Path, arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_train_iterator(arguments[0] or shards, *arguments[1:])


def test_damaged_record_is_named_in_the_error(tmp_path: Path) -> None:
    folder = write_numbers(tmp_path / "shards")
    path = folder / "validation-00000-of-00001.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(b"number 1")] ^= 1
    path.write_bytes(data)
    iterator = make_train_iterator(folder, "validation", 16, batch_size=3, seed=0)
    with pytest.raises(UserError, match=r"Cannot read record 1 of .*validation-00000-of-00001\.array_record"):
        next(iterator)


def test_reading_imports_neither_torch_nor_tensorflow(shards: Path) -> None:
    code = (
        "import sys; from micro_dit.data.pipeline import make_train_iterator;"
        f"next(make_train_iterator({str(shards)!r}, 'train', 16, 4, 0));"
        "assert not {'torch', 'transformers', 'diffusers', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent.parent)
