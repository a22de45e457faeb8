import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from micro_dit.data.pipeline import load_split, make_train_iterator
from micro_dit.data.shards import ImageEncoderInfo, Manifest, Record, ShardWriter, TextEncoderInfo, record_fields
from micro_dit.errors import UserError

VAE = ImageEncoderInfo("tiny", "0123", channels=8, downsample=8)
TEXT = TextEncoderInfo("letters", "4567", tokens=4, channels=6)
EXAMPLES = 23


def write_numbers(out: Path, posterior: str) -> Path:
    """Shards whose record number n is filled with n."""
    fields = record_fields((16, 32), posterior, VAE, TEXT)
    with ShardWriter(out, ("train", "validation"), fields, examples_per_shard=10) as writer:
        for split, count in (("train", EXAMPLES), ("validation", 3)):
            for number in range(count):
                arrays = {field.name: np.full(field.shape, number) for field in fields}
                writer.write(split, Record(f"{split}-{number}", f"number {number}", arrays))
        writer.publish(Manifest("numbers", "nobody", (16, 32), posterior, VAE, TEXT, fields, {}, {}))
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbers(tmp_path_factory.mktemp("mean_std") / "shards", "mean_std")


def numbers(iterator, batches: int) -> list[int]:
    """Numbers of the examples in the next batches."""
    return np.concatenate([next(iterator)["latent_mean"][:, 0, 0, 0] for _ in range(batches)]).astype(int).tolist()


def test_a_batch_has_float16_arrays_of_the_asked_resolution(shards: Path):
    batch = next(make_train_iterator(shards, "train", 32, batch_size=5, seed=0))
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "latent_mean": ((5, 4, 4, 8), "float16"),
        "latent_std": ((5, 4, 4, 8), "float16"),
        "caption": ((5, 4, 6), "float16"),
    }
    # The arrays of a row come from one record.
    assert len({array[0].ravel()[0] for array in batch.values()}) == 1
    assert next(make_train_iterator(shards, "train", 16, 5, 0))["latent_mean"].shape == (5, 2, 2, 8)


def test_samples_are_the_mean_and_have_no_std(tmp_path: Path):
    folder = write_numbers(tmp_path / "shards", "sample")
    batch = next(make_train_iterator(folder, "train", 32, batch_size=5, seed=0))
    assert {name: array.shape for name, array in batch.items()} == {"latent_mean": (5, 4, 4, 8), "caption": (5, 4, 6)}
    assert set(load_split(folder, "validation", 16)) == {"latent_mean", "caption", "text", "id"}


def test_every_epoch_has_every_example_once_in_another_order(shards: Path):
    iterator = make_train_iterator(shards, "train", 16, batch_size=4, seed=0)
    seen = numbers(iterator, EXAMPLES)  # four epochs, whose ends lie inside batches
    epochs = [seen[start : start + EXAMPLES] for start in range(0, len(seen), EXAMPLES)]
    assert len(epochs) == 4
    assert all(sorted(epoch) == list(range(EXAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order(shards: Path):
    def order(seed: int) -> list[int]:
        return numbers(make_train_iterator(shards, "train", 16, 4, seed), 5)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_batch_may_be_larger_than_the_split(shards: Path):
    seen = numbers(make_train_iterator(shards, "train", 16, batch_size=50, seed=0), 1)
    assert sorted(seen[:EXAMPLES]) == sorted(seen[EXAMPLES : 2 * EXAMPLES]) == list(range(EXAMPLES))


@pytest.mark.parametrize("batches", [0, 2, 9, 31])
def test_the_state_continues_exactly(shards: Path, batches: int):
    iterator = make_train_iterator(shards, "train", 16, batch_size=4, seed=3)
    numbers(iterator, batches + 1)
    state = iterator.get_state()
    expected = numbers(iterator, 8)
    fresh = make_train_iterator(shards, "train", 16, batch_size=4, seed=3)
    fresh.set_state(state)
    assert numbers(fresh, 8) == expected
    iterator.set_state(state)  # also back, on an iterator that has gone on
    assert numbers(iterator, 8) == expected


def test_processes_share_an_epoch(shards: Path):
    count = 3
    iterators = [make_train_iterator(shards, "train", 16, 1, 0, index, count) for index in range(count)]
    sizes = [len(range(index, EXAMPLES, count)) for index in range(count)]
    epochs = [[numbers(iterator, size) for iterator, size in zip(iterators, sizes, strict=True)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(EXAMPLES))
    assert sorted(epochs[0][0]) != sorted(epochs[1][0])  # the shares are dealt anew


def test_a_split_is_loaded_in_order(shards: Path):
    loaded = load_split(shards, "validation", 32)
    assert loaded["text"] == ["number 0", "number 1", "number 2"]
    assert loaded["id"] == ["validation-0", "validation-1", "validation-2"]
    assert loaded["latent_std"].shape == (3, 4, 4, 8)
    assert loaded["caption"].dtype == np.float16
    assert loaded["caption"][:, 0, 0].tolist() == [0, 1, 2]
    assert load_split(shards, "validation", 32, limit=2)["id"] == loaded["id"][:2]
    assert len(load_split(shards, "validation", 32, limit=9)["id"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "train", 16, 4, 0), "No shards at nowhere"),
        ((None, "test", 16, 4, 0), "no examples in split 'test'"),
        ((None, "train", 64, 4, 0), "not 64 px"),
        ((None, "validation", 16, 4, 0, 0, 8), "3 examples in 'validation' for 8 processes"),
        ((None, "train", 16, 0, 0), "at least 1"),
        ((None, "train", 16, 4, -1), "at least 0"),
    ],
)
def test_wrong_arguments_are_refused(shards: Path, arguments: tuple, message: str):
    with pytest.raises(UserError, match=message):
        make_train_iterator(arguments[0] or shards, *arguments[1:])


def test_a_damaged_record_stops_the_iterator_with_its_name(tmp_path: Path):
    folder = write_numbers(tmp_path / "shards", "mean_std")
    path = folder / "validation-00000-of-00001.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(b"number 1")] ^= 1
    path.write_bytes(data)
    iterator = make_train_iterator(folder, "validation", 16, batch_size=3, seed=0)
    with pytest.raises(UserError, match=r"Record 1 of .*validation-00000-of-00001\.array_record cannot be read"):
        next(iterator)


def test_reading_needs_neither_torch_nor_tensorflow(shards: Path):
    code = (
        "import sys; from micro_dit.data.pipeline import make_train_iterator;"
        f"next(make_train_iterator({str(shards)!r}, 'train', 16, 4, 0));"
        "assert not {'torch', 'transformers', 'diffusers', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
