"""Writes shards in the format of `shards.py`. Every file is written atomically, and the manifest last."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from micro_dit.data.shards import MANIFEST, Field, Manifest, Record, ShardFile, pack_record
from micro_dit.files import disk_errors, hash_file, hash_text, write_atomically

WRITER_OPTIONS = "group_size:1,uncompressed"  # latents do not compress; a group of one record is read with one seek

LatentSums = dict[str, list[list[float]]]  # by resolution: count, sum and sum of squares for each of C channels


def shard_name(split: str, index: int, count: int) -> str:
    """Returns the name of a shard file, such as 'train-00000-of-00002.array_record'."""
    return f"{split}-{index:05d}-of-{count:05d}.array_record"


class ShardFileWriter:
    """A context manager that writes one file of records atomically.

    A clean exit moves the file into place; an exception removes it. A killed process leaves `<name>.partial`, which is
    never read and is overwritten by the next attempt. A file without records is not created.

    Attributes:
        info: Name, number of records, size and checksum of the finished file; set on a clean exit.
        latent_sums: Count, sum and sum of squares of the latents per channel, as lists for `latent_statistics`.
    """

    info: ShardFile

    def __init__(self, path: str | Path, fields: Sequence[Field]):
        """Prepares to write to an existing folder; the file is created with the first record."""
        self.path, self.fields = Path(path), tuple(fields)
        self.records = 0
        self._sums: dict[str, np.ndarray] = {}
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._writer: ArrayRecordWriter | None = None

    def __enter__(self) -> Self:
        return self

    def write(self, record: Record) -> None:
        """Appends a record.

        Raises:
            UserError: The disk is full, or the file cannot be written.
            ValueError: An array does not have the shape of its field.
        """
        data = pack_record(record, self.fields)
        with disk_errors(self.path):
            if self._writer is None:
                self._partial.unlink(missing_ok=True)
                self._writer = ArrayRecordWriter(str(self._partial), WRITER_OPTIONS)
            self._writer.write(data)
        self.records += 1
        _add_latents(self._sums, record.arrays)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    @property
    def latent_sums(self) -> LatentSums:
        """Returns the sums of the latents written so far, by resolution."""
        return {resolution: sums.tolist() for resolution, sums in self._sums.items()}

    def _finish(self) -> None:
        if self._writer is None:
            self.info = ShardFile(self.path.name, 0, 0, hash_text(""))
            return
        with disk_errors(self.path):
            self._writer.close()
            with self._partial.open("rb") as file:
                os.fsync(file.fileno())
            size = self._partial.stat().st_size
            self.info = ShardFile(self.path.name, self.records, size, hash_file(self._partial))
            self._partial.replace(self.path)

    def _discard(self) -> None:
        """Removes the partial file, if it has not been moved into place."""
        if self._writer is not None:
            with contextlib.suppress(OSError, RuntimeError):  # a second error would hide the original one
                self._writer.close()
        self._partial.unlink(missing_ok=True)


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes `manifest.json` atomically, without files that have no records.

    Raises:
        UserError: The disk is full, or the file cannot be written.
    """
    splits = {split: tuple(file for file in files if file.records) for split, files in manifest.splits.items()}
    write_atomically(Path(folder) / MANIFEST, dataclasses.replace(manifest, splits=splits).to_json())


def latent_statistics(sums: Iterable[LatentSums]) -> dict[str, dict[str, list[float]]]:
    """Computes the `statistics` of a manifest from the `latent_sums` of all files."""
    totals: dict[str, np.ndarray] = {}
    for of_file in sums:
        for resolution, values in of_file.items():
            totals[resolution] = totals.get(resolution, 0) + np.array(values, np.float64)
    statistics = {}
    for resolution, (count, total, squares) in totals.items():
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        statistics[resolution] = {"mean": mean.tolist(), "std": std.tolist()}
    return statistics


def _add_latents(sums: dict[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
    """Adds the latents of a record. A sampled latent has E[x²] = mean² + std², so `std` adds only to the squares."""
    for name, array in arrays.items():
        if name.startswith("latent_"):
            _, kind, resolution = name.split("_")
            x = np.asarray(array, np.float16).reshape(-1, array.shape[-1]).astype(np.float64)  # as stored
            counted = 0.0 if kind == "std" else 1.0
            update = np.stack([np.full(x.shape[1], counted * len(x)), counted * x.sum(0), np.square(x).sum(0)])
            sums[resolution] = sums.get(resolution, 0) + update
