"""Iterates over shards: endless, shuffled and exactly resumable batches from a folder or a mix of folders.

The contents of batch n depend only on the mix, the batch size and the seed. The data position is therefore the number
n, for any number of processes that share a batch.

Shapes: B images · n examples · h w latent rows, columns · C latent channels · L caption tokens · Y caption channels.
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

READ_THREADS = 2  # array_record holds the GIL while it reads, so more threads do not help
BATCHES_AHEAD = 8  # prefetched in memory
SEEDS_APART = 1_000_003  # between folders of a mix; nearby seeds are used by the other phases of a run


def make_train_iterator(
    shards: str | Path,
    split: str,
    resolution: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Returns an endless iterator over a split; every epoch of a folder contains each of its examples once.

    Each epoch is shuffled differently. Batches may span several epochs, so a batch may be larger than the split. If an
    image has several captions, each epoch uses the next one. `get_state` and `set_state` resume exactly at any batch,
    even with a different number of processes.

    Args:
        shards: A folder written by micro_dit.precompute, or a mix of folders (see micro_dit/data/mixture.py).
        split: Name of the split.
        resolution: Side of the images in pixels; selects the latents of this resolution.
        batch_size: Global number of images per batch, B.
        seed: Seed of the order of the examples.
        process_index: Index of this process.
        process_count: Number of processes that share a batch; each reads b = B / process_count consecutive rows.

    Returns:
        An iterator of {'latent_mean': (b, h, w, C), 'latent_std': (b, h, w, C), 'caption': (b, L, Y)}, all float16
        numpy arrays. If the shards store samples of the posterior, `latent_mean` holds them and `latent_std` is absent.

    Raises:
        UserError: Shards are missing, damaged or incompatible, or lack the split or resolution; or the batch size or
            seed is out of range.
    """
    if batch_size < 1 or seed < 0:
        raise UserError(f"batch_size must be at least 1 and seed at least 0, not {batch_size} and {seed}.")
    if batch_size % process_count:
        raise UserError(
            f"A batch of {batch_size} images cannot be split over {process_count} processes. Set "
            f"--config.phases[i].batch_size to a multiple of {process_count}."
        )
    size = batch_size // process_count
    rows = range(process_index * size, (process_index + 1) * size)
    batches = grain.MapDataset.source(_Batches(read_mix(shards), split, resolution, batch_size, rows, seed))
    return iter(batches.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))


def load_split(shards: str | Path, split: str, resolution: int, limit: int | None = None) -> dict[str, Any]:
    """Loads the first examples of a split into memory, in their stored order, each with its first caption.

    In a mix, the folders that have the split alternate in the proportions of the mix until all are exhausted.

    Args:
        shards: A folder of shards, or a mix of folders.
        split: Name of the split.
        resolution: Side of the images in pixels.
        limit: Maximum number of examples; None loads all.

    Returns:
        Arrays of n rows as `make_train_iterator` yields them, and 'text' and 'id', lists of n strings.

    Raises:
        UserError: Shards are missing, damaged or incompatible, or lack the split or resolution.
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
    """A random-access Grain source of batches, indexed by batch number."""

    def __init__(self, mix: Mix, split: str, resolution: int, batch_size: int, rows: range, seed: int):
        self._readers, self._names = _open(mix, split, resolution)
        self._manifest, self._weights = mix.manifests[0], mix.weights(split)
        self._batch_size, self._rows, self._seed = batch_size, rows, seed
        self._orders = [  # one per folder; indices beyond its length belong to later epochs, each shuffled differently
            grain.MapDataset.range(len(reader)).seed((seed + SEEDS_APART * k) % 2**32).shuffle()
            for k, reader in enumerate(self._readers)
        ]

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns the rows of a batch that belong to this process."""
        batch = _empty_batch(self._manifest, self._names, len(self._rows))
        for row, global_row in enumerate(self._rows):
            folder, visit = deal(self._weights, index * self._batch_size + global_row)
            number = int(self._orders[folder][visit])
            epoch = visit // len(self._readers[folder])
            record = self._readers[folder][number]
            # Copied immediately, while the record is still in the CPU cache.
            _fill(batch, row, record, self._names, caption=(self._seed + epoch + number) % len(record.captions))
        return batch


def _open(mix: Mix, split: str, resolution: int) -> tuple[list[SplitReader], dict[str, str]]:
    """Checks the folders and opens their splits; also returns the record field of each batch array."""
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
