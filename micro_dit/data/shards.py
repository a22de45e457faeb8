"""The on-disk format of a prepared data set: a folder of ArrayRecord files and one `manifest.json`.

    manifest.json                            the contents of the records and the encoders that produced them
    rejects.jsonl                            {"id", "split", "part", "reason"} of each dropped input
    train-00000-of-00002.array_record        records, uncompressed, each readable on its own
    train-00001-of-00002.array_record
    validation-00000-of-00001.array_record

A record consists of a header (magic, version, length of the id in bytes, number of captions n, length of each caption
in bytes), the id and the captions in UTF-8, and the little-endian arrays in the order of the manifest's `fields`. The
array of a `per_caption` field is stored n times.

The manifest is written last: a folder without one is unfinished. `shard_writer.py` writes the files, and
`shard_checks.py` compares them with their manifest.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from micro_dit.encoders.info import ImageEncoderInfo, TextEncoderInfo
from micro_dit.errors import UserError
from micro_dit.files import hash_text

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
POSTERIORS = ("mean_std", "sample")
HEADER = struct.Struct("<4sIII")
CAPTION_BYTES = np.dtype("<u4")
MAGIC = b"mDiT"
IDS_NAMED = 20  # ids that the manifest lists for each reason


@dataclasses.dataclass(frozen=True)
class Field:
    """An array stored in every record, once or, if `per_caption`, once per caption."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    per_caption: bool = False

    @functools.cached_property
    def stored(self) -> np.dtype:
        """Returns the dtype on disk."""
        return np.dtype(self.dtype).newbyteorder("<")

    def shape_in(self, captions: int) -> tuple[int, ...]:
        """Returns the shape of the array in a record with the given number of captions."""
        return (captions, *self.shape) if self.per_caption else self.shape

    def bytes_in(self, captions: int) -> int:
        """Returns the size in bytes of the array in a record with the given number of captions."""
        return math.prod(self.shape_in(captions)) * self.stored.itemsize


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """One ArrayRecord file of a split."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass
class Tally:
    """The number of inputs that were dropped or altered for one reason, and the ids of the first few."""

    count: int = 0
    ids: list[str] = dataclasses.field(default_factory=list)

    def add(self, id: str) -> None:
        """Counts an input, and stores its id unless IDS_NAMED ids are stored already."""
        self.count += 1
        if len(self.ids) < IDS_NAMED:
            self.ids.append(id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a folder of shards.

    Attributes:
        source: Name of the data source.
        attribution: Credit and license of the data.
        resolutions: Sides in pixels of the square images whose latents each record contains.
        posterior: 'mean_std' (mean and standard deviation of the latent) or 'sample' (one sample from the posterior).
        vae: The image encoder.
        text_encoder: The text encoder.
        fields: Arrays of a record, in their stored order.
        dropped: Inputs that were dropped, by reason; `rejects.jsonl` lists all of them.
        altered: Inputs that were kept after a change, by the kind of change.
        statistics: By resolution, 'mean' and 'std' of each latent channel, including the variance of the posterior.
        caption_cleaning: 'none', or the version of the rules that cleaned the captions before they were embedded.
        splits: Files of each split; an empty split has no files.
        format_version: Version of the on-disk format.
    """

    source: str
    attribution: str
    resolutions: tuple[int, ...]
    posterior: str
    vae: ImageEncoderInfo
    text_encoder: TextEncoderInfo
    fields: tuple[Field, ...]
    dropped: dict[str, Tally] = dataclasses.field(default_factory=dict)
    altered: dict[str, Tally] = dataclasses.field(default_factory=dict)
    statistics: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    caption_cleaning: str
    splits: dict[str, tuple[ShardFile, ...]] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def records(self, split: str) -> int:
        """Returns the number of records in a split, or 0 if it does not exist."""
        return sum(file.records for file in self.splits.get(split, ()))

    @property
    def bytes(self) -> int:
        """Returns the size of all files."""
        return sum(file.bytes for files in self.splits.values() for file in files)

    @property
    def fingerprint(self) -> str:
        """Returns a short hash of the contents of all files."""
        hashes = "".join(file.sha256 for split in sorted(self.splits) for file in self.splits[split])
        return hash_text(hashes)[:16]

    def latent_std(self, resolution: int) -> float:
        """Returns the root mean square of the latents over all channels, which `sigma_data` should match."""
        statistics = self.statistics[str(resolution)]
        return float(np.sqrt(np.mean(np.square(statistics["mean"]) + np.square(statistics["std"]))))

    def to_json(self) -> str:
        """Serializes to indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the output of `to_json`; raises ValueError, KeyError or TypeError for any other text."""
        values: dict[str, Any] = json.loads(text)
        values |= {
            "resolutions": tuple(values["resolutions"]),
            "vae": ImageEncoderInfo(**values["vae"]),
            "text_encoder": TextEncoderInfo(**values["text_encoder"]),
            "fields": tuple(Field(**field | {"shape": tuple(field["shape"])}) for field in values["fields"]),
            "splits": {name: tuple(ShardFile(**file) for file in files) for name, files in values["splits"].items()},
        }
        for kind in ("dropped", "altered"):
            values[kind] = {reason: Tally(**tally) for reason, tally in values[kind].items()}
        return cls(**values)


def record_fields(
    resolutions: Sequence[int], posterior: str, vae: ImageEncoderInfo, text_encoder: TextEncoderInfo
) -> tuple[Field, ...]:
    """Returns the arrays of a record: the latents of every resolution, then the caption embeddings, all float16."""
    latents = [
        Field(f"latent_{kind}_{resolution}", "float16", (*[resolution // vae.downsample] * 2, vae.channels))
        for resolution in resolutions
        for kind in (("mean", "std") if posterior == "mean_std" else ("sample",))
    ]
    shape = (text_encoder.tokens, text_encoder.channels)
    return (*latents, Field("caption_embedding", "float16", shape, per_caption=True))


class Record(NamedTuple):
    """One image with one or more captions. Parsed arrays are read-only views of the serialized record."""

    id: str
    captions: tuple[str, ...]
    arrays: dict[str, np.ndarray]


def pack_record(record: Record, fields: Sequence[Field]) -> bytes:
    """Serializes a record, casting its arrays to the dtypes of the fields.

    Raises:
        ValueError: There is no caption, or an array does not have the shape of its field.
    """
    if not record.captions:
        raise ValueError(f"Record {record.id} has no caption.")
    id, captions = record.id.encode(), [caption.encode() for caption in record.captions]
    lengths = np.array([len(caption) for caption in captions], CAPTION_BYTES)
    parts = [HEADER.pack(MAGIC, FORMAT_VERSION, len(id), len(captions)), lengths.tobytes(), id, *captions]
    for field in fields:
        array = np.ascontiguousarray(record.arrays[field.name], field.stored)
        if array.shape != (shape := field.shape_in(len(captions))):
            raise ValueError(f"{field.name} of record {record.id} has shape {array.shape}, not {shape}.")
        parts.append(array.tobytes())
    return b"".join(parts)


def parse_record(data: bytes, fields: Sequence[Field], names: Sequence[str] | None = None) -> Record:
    """Parses the output of `pack_record`; returns only the arrays in `names`, by default all.

    Raises:
        UserError: The record is truncated, of another version, or not in this format.
    """
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise UserError(f"A record of {len(data)} bytes is not a micro_dit record. Rebuild the shards.")
    _, version, id_bytes, captions = HEADER.unpack_from(data)
    if version != FORMAT_VERSION:
        raise UserError(
            f"A record has format version {version}, but this code reads version {FORMAT_VERSION}. Rebuild the shards."
        )
    id_start = HEADER.size + captions * CAPTION_BYTES.itemsize
    expected = id_start
    if len(data) >= id_start:
        lengths = np.frombuffer(data, CAPTION_BYTES, captions, HEADER.size).tolist()
        ends = list(itertools.accumulate([id_bytes, *lengths], initial=id_start))[1:]  # ends of the id and captions
        expected = ends[-1] + sum(field.bytes_in(captions) for field in fields)
    if len(data) != expected:
        raise UserError(f"A record has {len(data)} bytes instead of {expected}, so it is damaged. Rebuild the shards.")
    position = ends[-1]
    arrays = {}
    for field in fields:
        if names is None or field.name in names:
            arrays[field.name] = np.ndarray(field.shape_in(captions), field.stored, data, position)
        position += field.bytes_in(captions)
    texts = tuple(data[start:end].decode() for start, end in itertools.pairwise(ends))
    return Record(data[id_start : ends[0]].decode(), texts, arrays)


def shards_folder(shards: str | Path) -> Path:
    """Returns the path of a folder of shards.

    Raises:
        UserError: The path is a URL in an object store.
    """
    if "://" in str(shards):
        raise UserError(
            f"{shards} is in an object store, but shards must be in a folder. Mount the bucket (for example with "
            "gcsfuse) or copy the shards to a disk, and pass the path of that folder instead."
        )
    return Path(shards).expanduser()


def read_manifest(shards: str | Path) -> Manifest:
    """Reads the manifest of a folder.

    Raises:
        UserError: The manifest is missing, damaged, or of another format version.
    """
    path = shards_folder(shards) / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        found = f"{MANIFEST}: {error.strerror}"
        raise UserError(f"No shards at {shards} ({found}). Create them with python -m micro_dit.precompute.") from error
    try:
        version = json.loads(text)["format_version"]
        if version == FORMAT_VERSION:
            return Manifest.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Rebuild the shards.") from error
    raise UserError(
        f"{path} has format version {version}, but this code reads version {FORMAT_VERSION}. Rebuild the shards."
    )


class SplitReader:
    """A thread-safe, random-access reader of the records of one split."""

    def __init__(self, shards: str | Path, manifest: Manifest, split: str, names: Sequence[str] | None = None):
        """Opens the files of a split; records contain only the arrays in `names`, by default all.

        Raises:
            UserError: The split does not exist or is empty.
        """
        if not manifest.splits.get(split):
            held = ", ".join(name for name in manifest.splits if manifest.records(name)) or "none"
            raise UserError(f"{shards} has no examples in split '{split}'. Splits with examples: {held}.")
        files = manifest.splits[split]
        self._paths = [str(shards_folder(shards) / file.name) for file in files]
        self._ends = list(itertools.accumulate(file.records for file in files))
        # Explicit record ranges let ArrayRecord open each file only when it is first read.
        ranges = [f"{path}[0:{file.records}]" for path, file in zip(self._paths, files, strict=True)]
        self._data = ArrayRecordDataSource(ranges)
        self._fields, self._names = manifest.fields, names

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        try:
            return parse_record(self._data[index], self._fields, self._names)
        except (RuntimeError, UserError) as error:
            path = self._paths[bisect.bisect_right(self._ends, index)]
            raise UserError(f"Cannot read record {index} of {path}: {error}") from error
