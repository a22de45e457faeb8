"""The on-disk format of a prepared data set: a folder of ArrayRecord files and one `manifest.json`.

    manifest.json                            what the records hold, and which encoders made them
    train-00000-of-00002.array_record        records, uncompressed, each readable on its own
    train-00001-of-00002.array_record
    validation-00000-of-00001.array_record

A record is a header (magic, version, bytes of id, bytes of caption), the id and the caption in UTF-8, and the arrays
back to back, little-endian, in the order of the manifest's `fields`.

The folder appears under its name only when it is whole: all is written to a folder beside it, the manifest last, and
then renamed.
"""

import bisect
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import secrets
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from micro_dit.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
POSTERIORS = ("mean_std", "sample")
HEADER = struct.Struct("<4sIII")
MAGIC = b"mDiT"
WRITER_OPTIONS = "group_size:1,uncompressed"  # latents do not compress, and a record of its own is found by one seek
IDS_NAMED = 20  # of each kind of irregular input, the manifest names this many


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of every record."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the array in a record."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class ImageEncoderInfo:
    """The image encoder that made the latents; `downsample` is pixels per latent, along each side."""

    name: str
    fingerprint: str
    channels: int
    downsample: int


@dataclasses.dataclass(frozen=True)
class TextEncoderInfo:
    """The text encoder that made the caption embeddings."""

    name: str
    fingerprint: str
    tokens: int
    channels: int


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """One ArrayRecord file of a split."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass
class Tally:
    """How many inputs were irregular in one way, and the ids of the first few."""

    count: int = 0
    ids: list[str] = dataclasses.field(default_factory=list)

    def add(self, id: str) -> None:
        """Counts an input, and remembers its id while there are few."""
        self.count += 1
        if len(self.ids) < IDS_NAMED:
            self.ids.append(id)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        source: name of the data set.
        attribution: whom to credit for it, and its license.
        resolutions: sides in pixels of the square images whose latents each record holds.
        posterior: 'mean_std' (mean and standard deviation of the latent) or 'sample' (one latent drawn from them).
        vae: the image encoder.
        text_encoder: the text encoder.
        fields: the arrays of a record, in order.
        dropped: inputs that were left out, by reason.
        altered: inputs that were kept, but changed, by what happened to them.
        splits: the files of each split; a split without files is empty.
        format_version: version of this format.
    """

    source: str
    attribution: str
    resolutions: tuple[int, ...]
    posterior: str
    vae: ImageEncoderInfo
    text_encoder: TextEncoderInfo
    fields: tuple[Field, ...]
    dropped: dict[str, Tally]
    altered: dict[str, Tally]
    splits: dict[str, tuple[ShardFile, ...]] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def records(self, split: str) -> int:
        """Number of records in a split."""
        return sum(file.records for file in self.splits[split])

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for files in self.splits.values() for file in files)

    @property
    def fingerprint(self) -> str:
        """Short hash of the contents of all files."""
        hashes = "".join(file.sha256 for split in sorted(self.splits) for file in self.splits[split])
        return hashlib.sha256(hashes.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Serializes to indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses what `to_json` wrote; raises ValueError, KeyError or TypeError for anything else."""
        values: dict[str, Any] = json.loads(text)
        return cls(
            **values
            | {
                "resolutions": tuple(values["resolutions"]),
                "vae": ImageEncoderInfo(**values["vae"]),
                "text_encoder": TextEncoderInfo(**values["text_encoder"]),
                "fields": tuple(Field(f["name"], f["dtype"], tuple(f["shape"])) for f in values["fields"]),
                "dropped": {reason: Tally(**tally) for reason, tally in values["dropped"].items()},
                "altered": {reason: Tally(**tally) for reason, tally in values["altered"].items()},
                "splits": {
                    split: tuple(ShardFile(**file) for file in files) for split, files in values["splits"].items()
                },
            }
        )


def record_fields(
    resolutions: Sequence[int], posterior: str, vae: ImageEncoderInfo, text_encoder: TextEncoderInfo
) -> tuple[Field, ...]:
    """The arrays of a record: the latents of every resolution, then the caption embedding, all float16."""
    fields = []
    for resolution in resolutions:
        side = resolution // vae.downsample
        for kind in ("mean", "std") if posterior == "mean_std" else ("sample",):
            fields.append(Field(f"latent_{kind}_{resolution}", "float16", (side, side, vae.channels)))
    fields.append(Field("caption_embedding", "float16", (text_encoder.tokens, text_encoder.channels)))
    return tuple(fields)


class Record(NamedTuple):
    """One example; the arrays are read-only views of the record's bytes."""

    id: str
    caption: str
    arrays: dict[str, np.ndarray]


def pack_record(record: Record, fields: Sequence[Field]) -> bytes:
    """Serializes a record, casting its arrays to the fields' dtypes.

    Raises:
        ValueError: an array has not its field's shape.
    """
    id, caption = record.id.encode(), record.caption.encode()
    parts = [HEADER.pack(MAGIC, FORMAT_VERSION, len(id), len(caption)), id, caption]
    for field in fields:
        array = np.ascontiguousarray(record.arrays[field.name], np.dtype(field.dtype).newbyteorder("<"))
        if array.shape != field.shape:
            raise ValueError(f"{field.name} of {record.id} has shape {array.shape}, not {field.shape}")
        parts.append(array.tobytes())
    return b"".join(parts)


def parse_record(data: bytes, fields: Sequence[Field], names: Sequence[str] | None = None) -> Record:
    """Parses what `pack_record` wrote.

    Args:
        data: the record.
        fields: the manifest's fields.
        names: the fields to return; all by default.

    Raises:
        UserError: the record is truncated, of another version, or no record of this format.
    """
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise UserError(f"A record of {len(data)} bytes is not in this format: make the shards again.")
    _, version, id_bytes, caption_bytes = HEADER.unpack_from(data)
    if version != FORMAT_VERSION:
        raise UserError(f"A record has format {version}, and this code reads {FORMAT_VERSION}: make the shards again.")
    expected = HEADER.size + id_bytes + caption_bytes + sum(field.bytes for field in fields)
    if len(data) != expected:
        raise UserError(f"A record has {len(data)} bytes instead of {expected}, it is damaged: make the shards again.")
    caption_start = HEADER.size + id_bytes
    position = caption_start + caption_bytes
    arrays = {}
    for field in fields:
        if names is None or field.name in names:
            dtype = np.dtype(field.dtype).newbyteorder("<")
            array = np.frombuffer(data, dtype, field.bytes // dtype.itemsize, position)
            arrays[field.name] = array.reshape(field.shape)
        position += field.bytes
    return Record(
        data[HEADER.size : caption_start].decode(), data[caption_start : caption_start + caption_bytes].decode(), arrays
    )


class ShardWriter:
    """Writes a folder of shards, whole or not at all.

    Use as a context manager: `write` every record, then `publish`. Leaving without `publish` removes what was written;
    a killed process leaves a folder `<out>.incomplete-…`, which nothing reads.
    """

    def __init__(self, out: str | Path, splits: Sequence[str], fields: Sequence[Field], examples_per_shard: int):
        """Makes the temporary folder.

        Args:
            out: the folder to make; it must not exist, or be empty.
            splits: names of all splits.
            fields: the arrays of a record.
            examples_per_shard: a new file is begun after this many records.

        Raises:
            UserError: `out` exists and holds something, or its parent cannot be written to.
        """
        self.out = Path(out).expanduser()
        self.fields = tuple(fields)
        self.examples_per_shard = examples_per_shard
        self.records = 0  # written so far, in all splits
        self._files: dict[str, list[ShardFile]] = {split: [] for split in splits}
        self._open: dict[str, tuple[Path, ArrayRecordWriter, int]] = {}
        check_vacant(self.out)
        self.folder = self.out.with_name(f"{self.out.name}.incomplete-{secrets.token_hex(4)}")
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"Cannot make the folder {self.folder}: {error.strerror}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _, writer, _ in self._open.values():
            with contextlib.suppress(OSError, RuntimeError):  # a failed writer fails again, and would hide the cause
                writer.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # no such folder after `publish`

    def write(self, split: str, record: Record) -> None:
        """Appends a record to a split.

        Raises:
            UserError: the disk is full, or another failure of writing.
        """
        if split not in self._open:
            path = self.folder / f"{split}-{len(self._files[split]):05d}"
            self._open[split] = (path, self._attempt(ArrayRecordWriter, str(path), WRITER_OPTIONS), 0)
        path, writer, count = self._open[split]
        self._attempt(writer.write, pack_record(record, self.fields))
        self._open[split] = (path, writer, count + 1)
        self.records += 1
        if count + 1 == self.examples_per_shard:
            self._close(split)

    def publish(self, manifest: Manifest) -> Manifest:
        """Closes all files, writes the manifest, and gives the folder its name.

        Args:
            manifest: without `splits`.

        Returns:
            The manifest with `splits`, as written.

        Raises:
            UserError: the disk is full, or `out` has been made by someone else meanwhile.
        """
        for split in list(self._open):
            self._close(split)
        splits = {split: self._number(split, files) for split, files in self._files.items()}
        manifest = dataclasses.replace(manifest, splits=splits)
        self._attempt((self.folder / MANIFEST).write_text, manifest.to_json())
        check_vacant(self.out)
        self._attempt(self.folder.rename, self.out)
        return manifest

    def _close(self, split: str) -> None:
        path, writer, count = self._open[split]
        self._attempt(writer.close)
        del self._open[split]
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._files[split].append(ShardFile(path.name, count, path.stat().st_size, sha256))

    def _number(self, split: str, files: list[ShardFile]) -> tuple[ShardFile, ...]:
        """Gives a split's files their last names, which tell how many there are."""
        numbered = []
        for file in files:
            name = f"{file.name}-of-{len(files):05d}.array_record"
            self._attempt((self.folder / file.name).rename, self.folder / name)
            numbered.append(dataclasses.replace(file, name=name))
        return tuple(numbered)

    def _attempt(self, action: Any, *arguments: Any) -> Any:
        """Calls what touches the disk; ArrayRecord reports errors of the file system as RuntimeErrors."""
        try:
            return action(*arguments)
        except (OSError, RuntimeError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
                message in str(error) for message in ("No space left", "quota exceeded")
            )
            if full:
                raise UserError(f"The disk is full at {self.out.parent}: free space there, and run again.") from error
            raise UserError(f"Cannot write the shards {self.out}: {error}.") from error


def check_vacant(out: str | Path) -> None:
    """Raises UserError if a folder to be made exists already and is not empty."""
    out = Path(out).expanduser()
    if (out / MANIFEST).exists():
        raise UserError(f"{out} holds finished shards already: delete that folder or choose another.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: delete it or choose another.")


def read_manifest(shards: str | Path) -> Manifest:
    """Reads a folder's manifest.

    Raises:
        UserError: there is none, it is damaged, or it is of another format version.
    """
    path = Path(shards).expanduser() / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"No shards at {shards} ({MANIFEST}: {error.strerror}): make them with python -m micro_dit.precompute."
        ) from error
    try:
        version = json.loads(text)["format_version"]
        manifest = Manifest.from_json(text) if version == FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): make the shards again.") from error
    if manifest is None:
        raise UserError(f"{path} has format {version}, and this code reads {FORMAT_VERSION}: make the shards again.")
    return manifest


def check_shards(
    manifest: Manifest,
    shards: str | Path,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    vae_fingerprint: str | None = None,
    caption_tokens: int | None = None,
    caption_channels: int | None = None,
    text_fingerprint: str | None = None,
    checksums: bool = False,
) -> None:
    """Checks that a folder's files are those of its manifest, and that they hold what is asked for.

    Args:
        manifest: the folder's manifest.
        shards: the folder.
        resolution: side in pixels that must be among the manifest's.
        channels: latent channels C.
        vae_fingerprint: fingerprint of the image encoder.
        caption_tokens: caption tokens L.
        caption_channels: caption channels Y.
        text_fingerprint: fingerprint of the text encoder.
        checksums: read every file and compare its sha256; the sizes and record counts are always compared.

    Raises:
        UserError: the first difference found.
    """
    if resolution is not None and resolution not in manifest.resolutions:
        sides = ", ".join(map(str, manifest.resolutions))
        raise UserError(f"{shards} holds latents for {sides} px, not {resolution} px: prepare those, or use {sides}.")
    comparisons: tuple[tuple[str, int | str | None, int | str], ...] = (
        ("latent channels", channels, manifest.vae.channels),
        ("caption tokens", caption_tokens, manifest.text_encoder.tokens),
        ("caption channels", caption_channels, manifest.text_encoder.channels),
        ("image encoder fingerprint", vae_fingerprint, manifest.vae.fingerprint),
        ("text encoder fingerprint", text_fingerprint, manifest.text_encoder.fingerprint),
    )
    for what, asked, held in comparisons:
        if asked is not None and asked != held:
            raise UserError(f"{shards} was made with {what} {held}, not {asked}: use {held}, or make the shards again.")
    for file in itertools.chain.from_iterable(manifest.splits.values()):
        _check_file(Path(shards).expanduser() / file.name, file, checksums)


def _check_file(path: Path, file: ShardFile, checksums: bool) -> None:
    """Compares a file with what the manifest says of it."""
    again = "copy it again, or make the shards again"
    if not path.exists():
        raise UserError(f"The shard {path} is missing: {again}.")
    if path.stat().st_size != file.bytes:
        raise UserError(f"The shard {path} has {path.stat().st_size} bytes instead of {file.bytes}: {again}.")
    reader = ArrayRecordReader(str(path))
    records = reader.num_records()  # 0 if the file is damaged; only closing it would then raise
    with contextlib.suppress(RuntimeError):
        reader.close()
    if records != file.records:
        raise UserError(f"The shard {path} has {records} records instead of {file.records}: {again}.")
    if checksums:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != file.sha256:
            raise UserError(f"The shard {path} has been altered (its sha256 differs from the manifest's): {again}.")


class SplitReader:
    """Random access to the records of one split; safe to read from several threads."""

    def __init__(self, shards: str | Path, manifest: Manifest, split: str, names: Sequence[str] | None = None):
        """Opens the split's files.

        Args:
            shards: the folder.
            manifest: its manifest.
            split: one of the manifest's splits.
            names: the fields to return; all by default.

        Raises:
            UserError: there is no such split, or it is empty.
        """
        if not manifest.splits.get(split):
            held = ", ".join(name for name in manifest.splits if manifest.records(name)) or "none"
            raise UserError(f"{shards} has no examples in split '{split}': choose one of {held}.")
        self._paths = [str(Path(shards).expanduser() / file.name) for file in manifest.splits[split]]
        self._ends = list(itertools.accumulate(file.records for file in manifest.splits[split]))
        self._data = ArrayRecordDataSource(self._paths)
        self._fields, self._names = manifest.fields, names

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        try:
            return parse_record(self._data[index], self._fields, self._names)
        except (RuntimeError, UserError) as error:
            path = self._paths[bisect.bisect_right(self._ends, index)]
            raise UserError(f"Record {index} of {path} cannot be read: {error}") from error
