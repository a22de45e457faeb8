"""From shards to batches: an endless, shuffled, exactly resumable iterator over a folder or a mix of folders.

What batch number n holds follows from the mix, the batch size and the seed alone. So the position in the data is the
number n, whatever the number of processes that share a batch.

Letters: B images · n examples · h w latent rows, columns · C latent channels · L caption tokens · Y caption channels.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import grain
import numpy as np

from micro_dit.data.mixture import Mix, deal, read_mix
from micro_dit.data.shard_checks import ShardExpectations
from micro_dit.data.shards import Manifest, Record, SplitReader
from micro_dit.errors import UserError

READ_THREADS = 2  # array_record keeps Python's lock while it reads: more threads would only wait for each other
BATCHES_AHEAD = 8  # kept ready in memory
SEEDS_APART = 1_000_003  # from one folder of a mix to the next; the seeds close by are those of a run's other phases


def make_train_iterator(
    shards: str | Path,
    split: str,
    resolution: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over a split forever; every example of a folder comes once in each epoch of that folder.

    Epochs are shuffled anew, and batches run across their ends, so that a batch may be larger than the split. Of the
    captions of an image, each epoch takes the next one. `get_state` and `set_state` continue exactly, at any batch,
    also with another number of processes.

    Args:
        shards: A folder written by micro_dit.precompute, or a mix of folders (see micro_dit/data/mixture.py).
        split: One of their splits.
        resolution: Side of the images in pixels; chooses among the latents of a record.
        batch_size: Images per batch B, of all processes together.
        seed: Seed of the order of the examples.
        process_index: Index of this process.
        process_count: Number of processes that share a batch; each gets b = B / process_count rows of it, in turn.

    Returns:
        An iterator of {'latent_mean': (b, h, w, C), 'latent_std': (b, h, w, C), 'caption': (b, L, Y)}, all float16
        numpy arrays. If the shards hold samples of the posterior, those are `latent_mean` and there is no `latent_std`.

    Raises:
        UserError: Shards are missing, damaged, lack the split or resolution, or do not fit each other; or the batch
            size or seed is out of range.
    """
    if batch_size < 1 or seed < 0:
        raise UserError(f"The batch size must be at least 1 and the seed at least 0, not {batch_size} and {seed}.")
    if batch_size % process_count:
        raise UserError(f"{process_count} processes cannot share a batch of {batch_size} images: use a multiple.")
    size = batch_size // process_count
    rows = range(process_index * size, (process_index + 1) * size)
    batches = grain.MapDataset.source(_Batches(read_mix(shards), split, resolution, batch_size, rows, seed))
    return iter(batches.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))


def load_split(shards: str | Path, split: str, resolution: int, limit: int | None = None) -> dict[str, Any]:
    """Loads the first examples of a split into memory, in their stored order, each with its first caption.

    In a mix, the folders that have the split alternate in the mix's proportions, until each has given all it has.

    Returns:
        Arrays of n rows as `make_train_iterator` yields them, and 'text' and 'id', lists of n strings; n is at most
        `limit`.

    Raises:
        UserError: Shards are missing, damaged, lack the split or resolution, or do not fit each other.
    """
    mix = read_mix(shards).having(split)
    readers, names = _open(mix, split, resolution)
    total = sum(map(len, readers))
    dealt = map(lambda position: deal(mix.weights(split), position), itertools.count())
    there = (readers[folder][number] for folder, number in dealt if number < len(readers[folder]))
    records = list(itertools.islice(there, total if limit is None else min(limit, total)))
    batch: dict[str, Any] = _empty_batch(mix.manifests[0], names, len(records))
    for row, record in enumerate(records):
        _fill(batch, row, record, names, caption=0)
    return batch | {"text": [record.captions[0] for record in records], "id": [record.id for record in records]}


class _Batches:
    """The batches of a run by their number, as a source for Grain."""

    def __init__(self, mix: Mix, split: str, resolution: int, batch_size: int, rows: range, seed: int):
        self._readers, self._names = _open(mix, split, resolution)
        self._manifest, self._weights = mix.manifests[0], mix.weights(split)
        self._batch_size, self._rows, self._seed = batch_size, rows, seed
        self._orders = [  # of each folder; indices beyond its length are those of the next epochs, shuffled anew
            grain.MapDataset.range(len(reader)).seed((seed + SEEDS_APART * k) % 2**32).shuffle()
            for k, reader in enumerate(self._readers)
        ]

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """This process's rows of a batch."""
        batch = _empty_batch(self._manifest, self._names, len(self._rows))
        for row, global_row in enumerate(self._rows):
            folder, visit = deal(self._weights, index * self._batch_size + global_row)
            number = int(self._orders[folder][visit])
            epoch = visit // len(self._readers[folder])
            record = self._readers[folder][number]
            # Into its place while the processor's cache still has it.
            _fill(batch, row, record, self._names, caption=(self._seed + epoch + number) % len(record.captions))
        return batch


def _open(mix: Mix, split: str, resolution: int) -> tuple[list[SplitReader], dict[str, str]]:
    """Checks the folders and opens a split of each; also returns which field is which array of a batch."""
    mix.check(ShardExpectations(resolution))
    if mix.manifests[0].posterior == "sample":
        names = {"latent_mean": f"latent_sample_{resolution}"}
    else:
        names = {"latent_mean": f"latent_mean_{resolution}", "latent_std": f"latent_std_{resolution}"}
    names["caption"] = "caption_embedding"
    folders = zip(mix.folders, mix.manifests, strict=True)
    return [SplitReader(folder, manifest, split, list(names.values())) for folder, manifest in folders], names


def _empty_batch(manifest: Manifest, names: dict[str, str], rows: int) -> dict[str, np.ndarray]:
    fields = {field.name: field for field in manifest.fields}
    return {name: np.empty((rows, *fields[of].shape), fields[of].dtype) for name, of in names.items()}


def _fill(batch: dict[str, np.ndarray], row: int, record: Record, names: dict[str, str], caption: int) -> None:
    """Copies a record, with one of its captions, into a row of a batch."""
    for name, field in names.items():
        batch[name][row] = record.arrays[field][caption] if name == "caption" else record.arrays[field]
