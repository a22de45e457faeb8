"""From shards to batches: an endless, shuffled, exactly resumable iterator, read with Grain.

Letters: B images · n examples · h w latent rows, columns · C latent channels · L caption tokens · Y caption channels.
"""

from pathlib import Path
from typing import Any

import grain
import numpy as np

from micro_dit.data.shards import Manifest, Record, SplitReader, check_shards, read_manifest
from micro_dit.errors import UserError

READ_THREADS = 4
BATCHES_AHEAD = 8  # kept ready in memory


def make_train_iterator(
    shards: str | Path,
    split: str,
    resolution: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over a split forever, in another order each epoch.

    An epoch holds every example once, each at one of the processes; batches run across the end of an epoch, so that
    a batch may be larger than the split. `get_state` and `set_state` continue exactly, at any batch.

    Args:
        shards: a folder made by micro_dit.precompute.
        split: one of its splits.
        resolution: side of the images in pixels; chooses among the latents of a record.
        batch_size: images per batch B of this process: the global batch divided by `process_count`.
        seed: of the order of the examples.
        process_index: which of the processes this is.
        process_count: how many processes share the split.

    Returns:
        An iterator of {'latent_mean': (B, h, w, C), 'latent_std': (B, h, w, C), 'caption': (B, L, Y)}, all float16
        numpy arrays. If the shards hold samples of the posterior, those are `latent_mean` and there is no `latent_std`.

    Raises:
        UserError: the shards are missing, damaged, or hold no such split or resolution; there are fewer
            examples than processes; or the batch size or seed is out of range.
    """
    if batch_size < 1 or seed < 0:
        raise UserError(f"The batch size must be at least 1 and the seed at least 0, not {batch_size} and {seed}.")
    reader, names = _open(shards, split, resolution)
    if len(reader) < process_count:
        raise UserError(f"{shards} has {len(reader)} examples in '{split}' for {process_count} processes: use fewer.")

    def to_arrays(record: Record) -> dict[str, np.ndarray]:
        return {name: record.arrays[field] for name, field in names.items()}

    dataset = grain.MapDataset.source(reader).seed(seed).shuffle()[process_index::process_count]
    # Repeating before batching reshuffles each epoch and leaves no partial batch.
    batches = dataset.repeat().map(to_arrays).batch(batch_size, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))


def load_split(shards: str | Path, split: str, resolution: int, limit: int | None = None) -> dict[str, Any]:
    """Loads the first examples of a split into memory, in their stored order.

    Args:
        shards: a folder made by micro_dit.precompute.
        split: one of its splits.
        resolution: side of the images in pixels.
        limit: the most examples n to load; all by default.

    Returns:
        {'latent_mean': (n, h, w, C), 'latent_std': (n, h, w, C), 'caption': (n, L, Y)} in float16, as
        `make_train_iterator` yields them, and 'text' and 'id', lists of n strings.

    Raises:
        UserError: the shards are missing, damaged, or hold no such split or resolution.
    """
    reader, names = _open(shards, split, resolution)
    count = len(reader) if limit is None else min(limit, len(reader))
    records = [reader[index] for index in range(count)]
    arrays: dict[str, Any] = {
        name: np.stack([record.arrays[field] for record in records]) for name, field in names.items()
    }
    return arrays | {"text": [record.caption for record in records], "id": [record.id for record in records]}


def _open(shards: str | Path, split: str, resolution: int) -> tuple[SplitReader, dict[str, str]]:
    """Checks the shards and opens a split; also returns which field is which array of a batch."""
    manifest = read_manifest(shards)
    check_shards(manifest, shards, resolution=resolution)
    names = batch_fields(manifest, resolution)
    return SplitReader(shards, manifest, split, list(names.values())), names


def batch_fields(manifest: Manifest, resolution: int) -> dict[str, str]:
    """Name of the stored field behind each array of a batch."""
    if manifest.posterior == "sample":
        latents = {"latent_mean": f"latent_sample_{resolution}"}
    else:
        latents = {"latent_mean": f"latent_mean_{resolution}", "latent_std": f"latent_std_{resolution}"}
    return latents | {"caption": "caption_embedding"}
