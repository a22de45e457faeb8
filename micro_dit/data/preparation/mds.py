"""Converts latents prepared by the public PyTorch release of MicroDiT (MosaicML MDS files) to shards.

The release writes one folder per GPU, each with files of samples and an `index.json`, and a merged index:

    index.json              version 2: name, size, number of samples and columns of each file, including sub-folders
    0/index.json            the same for this folder
    0/shard.00000.mds       or .mds.zstd: uint32 number of samples n, uint32 offsets (n + 1), a description, the samples
    1/shard.00000.mds

A sample consists of the uint32 sizes of all columns without a fixed size, followed by the bytes of all columns, all
little-endian. The converter reads the columns `caption` (UTF-8), `caption_latents` (L, Y) and, for each resolution,
`latents_256` (C, 32, 32) or `latents_512` (C, 64, 64); arrays are float16. The latents are samples from the posterior,
multiplied by the scaling factor.
"""

import contextlib
import dataclasses
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micro_dit.data.captions import CLEANING_VERSION, clean_caption
from micro_dit.data.preparation.journal import Journal, PartReport, check_process
from micro_dit.data.preparation.workers import EMPTY_CAPTION
from micro_dit.data.shard_writer import ShardFileWriter, shard_name
from micro_dit.data.shards import FORMAT_VERSION, Manifest, Record, read_manifest, record_fields
from micro_dit.data.sources import DAMAGED, NOT_UTF8, Reject
from micro_dit.encoders.info import UNVERIFIED, ImageEncoderInfo, TextEncoderInfo
from micro_dit.errors import UserError

ATTRIBUTION = "latents in MosaicML MDS files; the licenses are those of the data sets that they were made from"
SPLIT = "train"
DOWNSAMPLE = 8  # pixels per latent of all autoencoders that the release supports
CAPTION_SHAPES = ((77, 1024), (77, 768), (120, 4096))  # (L, Y) of the text encoders that the release supports
UINT32, FLOAT16 = np.dtype("<u4"), np.dtype("<f2")
BYTES_IN_A_PART = 1 << 30  # size of the MDS files of a part; each part becomes one shard file

WRONG_SIZE = "size of an array differs from the other samples"
NOT_FINITE = "latents or caption embedding are not finite in float16"


class MdsFile(NamedTuple):
    """A file of samples, as described by an index.

    Attributes:
        name: Path relative to the folder of the data set, without the suffix of the compression.
        path: Path of the existing file.
        compressed: Whether the file is compressed with zstd.
        bytes: Size before compression.
        samples: Number of samples.
        columns: Names of the columns.
        sizes: Size of each column in bytes; None if it varies between samples.
    """

    name: str
    path: Path
    compressed: bool
    bytes: int
    samples: int
    columns: tuple[str, ...]
    sizes: tuple[int | None, ...]


class Layout(NamedTuple):
    """The shapes of a sample: sides of the images in pixels, latent channels C, caption tokens L and channels Y."""

    resolutions: tuple[int, ...]
    channels: int
    tokens: int
    caption_channels: int


@dataclasses.dataclass(frozen=True)
class MdsPart:
    """Consecutive files that are converted to one shard file."""

    files: tuple[MdsFile, ...]

    @property
    def name(self) -> str:
        """Returns the names of the first and the last file."""
        return " to ".join(dict.fromkeys((self.files[0].name, self.files[-1].name)))

    def __len__(self) -> int:
        return sum(file.samples for file in self.files)


def convert_mds(
    folder: str,
    out: str,
    *,
    vae: str,
    text_encoder: str,
    resolutions: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    report: Callable[[str], None] = print,
) -> Manifest | None:
    """Converts the MDS latents in a folder and its sub-folders to shards. Does not use an accelerator.

    Args:
        folder: Folder with an `index.json`.
        out: Output folder.
        vae: Image encoder that computed the latents; if it is a local folder, its fingerprint is stored.
        text_encoder: Text encoder that computed the caption embeddings.
        resolutions: Resolutions to convert, in pixels; by default all available ones.
        process_index: Index of this process.
        process_count: Number of processes that share the work.
        report: Called with each line of progress.

    Returns:
        The manifest, or None if other processes still have parts to convert.

    Raises:
        UserError: MDS files are missing or of another format, `out` was started with other settings, no sample is
            usable, or the disk is full.
    """
    check_process(process_index, process_count)
    files = list_mds(folder)
    layout = find_layout(files, resolutions)
    manifest = describe(layout, vae, text_encoder)
    parts = group(files)
    settings = {
        "format_version": FORMAT_VERSION,
        "source": f"mds:{folder}",
        "resolutions": ",".join(map(str, layout.resolutions)),
        "vae": vars(manifest.vae),
        "text_encoder": vars(manifest.text_encoder),
    }
    journal = Journal(out, settings, {SPLIT: [part.name for part in parts]}, process_index)
    if journal.finished:
        report(f"{out} is already complete")
        return read_manifest(out)
    own = range(process_index, len(parts), process_count)
    jobs = [index for index in own if journal.read_part(SPLIT, index) is None]
    done, total, started = 0, sum(len(parts[index]) for index in jobs), time.monotonic()
    report(f"{len(jobs)} of {len(own)} parts to convert: {total} samples in {folder}")
    for index in jobs:
        journal.finish_part(convert_part(parts[index], index, len(parts), journal.folder, layout, manifest))
        done += len(parts[index])
        rate = done / (time.monotonic() - started)
        report(f"{done} of {total} samples, {rate:.0f} samples/s, {(total - done) / rate:.0f} s left")
    if not journal.complete:
        report(f"finished the {len(own)} parts of this process; {out} is complete when all {process_count} are done")
        return None
    journal.merge(manifest)
    return read_manifest(out)


def convert_part(part: MdsPart, index: int, count: int, folder: Path, layout: Layout, manifest: Manifest) -> PartReport:
    """Writes the shard file of a part, and returns its report."""
    report = PartReport(SPLIT, index, part.name)
    with ShardFileWriter(folder / shard_name(SPLIT, index, count), manifest.fields) as writer:
        for item in read_records(part, layout):
            if isinstance(item, Reject):
                report.rejects.append((item.id, item.reason))
            else:
                writer.write(item)
                if not item.captions[0]:
                    report.altered[EMPTY_CAPTION].add(item.id)
    report.files = {SPLIT: writer.info}
    report.latent_sums = [writer.latent_sums]
    return report


def describe(layout: Layout, vae: str, text_encoder: str) -> Manifest:
    """Returns the manifest without files, counts and statistics, which are known only after all parts are done."""
    image = ImageEncoderInfo(known_as(vae), vae_fingerprint(vae, layout.channels), layout.channels, DOWNSAMPLE)
    text = TextEncoderInfo(known_as(text_encoder), UNVERIFIED, layout.tokens, layout.caption_channels)
    return Manifest(
        source="mds",
        attribution=ATTRIBUTION,
        resolutions=layout.resolutions,
        posterior="sample",
        vae=image,
        text_encoder=text,
        fields=record_fields(layout.resolutions, "sample", image, text),
        caption_cleaning=CLEANING_VERSION,  # the release embeds cleaned captions
        splits={SPLIT: ()},
    )


def known_as(encoder: str) -> str:
    """Returns the name of an encoder in manifests: the base name of a local folder, otherwise the name itself."""
    folder = Path(encoder).expanduser()
    return folder.resolve().name if folder.is_dir() else encoder


def vae_fingerprint(vae: str, channels: int) -> str:
    """Returns the fingerprint of an autoencoder in a local folder, or 'unverified' if the folder does not exist.

    Raises:
        UserError: The folder does not contain an autoencoder, or it has another number of channels.
    """
    from micro_dit.encoders.image import SUBFOLDER, fingerprint, load_parameters, read_config

    folder = Path(vae).expanduser()
    if not folder.is_dir():
        return UNVERIFIED
    if (folder / SUBFOLDER).is_dir():
        folder /= SUBFOLDER
    config = read_config(folder)
    if (config.latent_channels, config.downsample) != (channels, DOWNSAMPLE):
        raise UserError(
            f"{vae} produces {config.latent_channels} latent channels with a downsampling factor of "
            f"{config.downsample}, but the MDS files have {channels} channels and a factor of {DOWNSAMPLE}. Set --vae "
            "to the image encoder that computed the latents."
        )
    return fingerprint(config, load_parameters(folder, config))


def list_mds(folder: str | Path) -> list[MdsFile]:
    """Lists the files of a data set by name. A file that is listed in several indexes is returned once.

    Raises:
        UserError: There is no index, an index is damaged or of another version or format, or files are missing.
    """
    root = Path(folder).expanduser()
    files: dict[str, MdsFile] = {}
    missing = []
    for index in sorted(root.rglob("index.json")):
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            if content["version"] != 2:
                raise UserError(
                    f"{index} has version {content['version']}, but only version 2 is supported. Convert the files to "
                    "MDS version 2."
                )
            for entry in content["shards"]:
                name = os.path.relpath(index.parent / entry["raw_data"]["basename"], root)
                if found := _find_file(root, name, entry):
                    files[name] = found
                else:
                    missing.append(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged or not an index of MDS files ({error!r}). Copy it again.") from error
    if missing:
        raise UserError(
            f"{len(set(missing))} MDS files listed in {root} are missing, for example {missing[0]}. Copy them, or "
            "remove them from index.json."
        )
    if not files:
        raise UserError(f"No index.json in {root} lists any MDS files. Correct the folder in --source=mds:FOLDER.")
    return [files[name] for name in sorted(files)]


def _find_file(root: Path, name: str, entry: dict[str, Any]) -> MdsFile | None:
    """Returns the file of an index entry, uncompressed or else compressed, or None if neither exists."""
    path, compressed = root / name, False
    if not path.exists() and entry["zip_data"]:
        path, compressed = path.with_name(Path(entry["zip_data"]["basename"]).name), True
    if not path.exists():
        return None
    if entry["format"] != "mds" or (compressed and not entry["compression"].startswith("zstd")):
        kind = entry["compression"] if entry["format"] == "mds" else entry["format"]
        raise UserError(
            f"{path} has format '{kind}', but only MDS files without compression or with zstd are supported. Convert "
            "the file."
        )
    size, samples = int(entry["raw_data"]["bytes"]), int(entry["samples"])
    return MdsFile(name, path, compressed, size, samples, tuple(entry["column_names"]), tuple(entry["column_sizes"]))


def group(files: Sequence[MdsFile]) -> list[MdsPart]:
    """Groups consecutive files into parts of up to 1 GiB, because a large data set has tens of thousands of files."""
    parts: list[list[MdsFile]] = []
    room = 0
    for file in files:
        if file.bytes > room:
            parts.append([])
            room = BYTES_IN_A_PART
        parts[-1].append(file)
        room -= file.bytes
    return [MdsPart(tuple(part)) for part in parts]


def find_layout(files: Sequence[MdsFile], resolutions: Sequence[int] | None) -> Layout:
    """Infers the layout from the column names and the most common sizes in the first readable file.

    Raises:
        UserError: Columns are missing, or their sizes do not match latents and caption embeddings.
    """
    there = {int(found[1]) for name in files[0].columns if (found := re.fullmatch(r"latents_(\d+)", name))}
    wanted = tuple(sorted(there if resolutions is None else set(resolutions)))
    needed = ["caption", "caption_latents", *(f"latents_{resolution}" for resolution in wanted)]
    for file in files:
        absent = ", ".join(name for name in needed if name not in file.columns)
        if absent or not wanted:
            raise UserError(
                f"{file.path} has no column {absent or 'latents_256'}; its columns are {', '.join(file.columns)}. Set "
                "--resolutions to available resolutions, or --source=mds:FOLDER to the folder of the latents."
            )
    for file in files:
        sizes = Counter(tuple(len(sample[name]) for name in needed[1:]) for _, sample in read_samples(file) if sample)
        if sizes:
            return _layout_of(file, wanted, *sizes.most_common(1)[0][0])
    raise UserError(f"All MDS files in {files[0].path.parent} are damaged. Copy them again.")


def _layout_of(file: MdsFile, resolutions: tuple[int, ...], caption_bytes: int, *latent_bytes: int) -> Layout:
    """Returns the layout of samples whose columns have the given sizes in bytes."""
    plane_bytes = [(side // DOWNSAMPLE) ** 2 * FLOAT16.itemsize for side in resolutions]
    channels = {size / of_plane for size, of_plane in zip(latent_bytes, plane_bytes, strict=True)}
    if len(channels) > 1 or not (count := min(channels)).is_integer() or count < 1:
        sizes = ", ".join(f"{size} bytes at {side} px" for size, side in zip(latent_bytes, resolutions, strict=True))
        raise UserError(
            f"{file.path} does not contain float16 latents of shape (C, side/8, side/8): {sizes}. Set "
            "--source=mds:FOLDER to the folder of the latents."
        )
    for tokens, caption_channels in CAPTION_SHAPES:
        if tokens * caption_channels * FLOAT16.itemsize == caption_bytes:
            return Layout(resolutions, int(count), tokens, caption_channels)
    known = ", ".join(f"{tokens}×{width}" for tokens, width in CAPTION_SHAPES)
    raise UserError(
        f"{file.path} has caption embeddings of {caption_bytes} bytes, which is not the size of a float16 array of "
        f"shape {known}. Only these embeddings can be converted."
    )


def read_records(part: MdsPart, layout: Layout) -> Iterator[Record | Reject]:
    """Yields a record or a reject for each sample in the index; ids are 'FILE:index'."""
    for file in part.files:
        for index, sample in read_samples(file):
            yield to_record(f"{file.name}:{index}", sample, layout)


def to_record(id: str, sample: dict[str, memoryview] | None, layout: Layout) -> Record | Reject:
    """Checks a sample and converts it to a record, with latents transposed to (H, W, C)."""
    if sample is None:
        return Reject(id, DAMAGED)
    try:
        caption = bytes(sample["caption"]).decode()
    except UnicodeDecodeError:
        return Reject(id, NOT_UTF8)
    shapes = {f"latents_{side}": (layout.channels, *[side // DOWNSAMPLE] * 2) for side in layout.resolutions}
    shapes["caption_latents"] = (1, layout.tokens, layout.caption_channels)
    if any(len(sample[name]) != np.prod(shape) * FLOAT16.itemsize for name, shape in shapes.items()):
        return Reject(id, WRONG_SIZE)
    arrays = {name: np.frombuffer(sample[name], FLOAT16).reshape(shape) for name, shape in shapes.items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        return Reject(id, NOT_FINITE)
    latents = {f"latent_sample_{side}": arrays[f"latents_{side}"].transpose(1, 2, 0) for side in layout.resolutions}
    # The release stores the original caption, but embeds the cleaned one.
    return Record(id, (clean_caption(caption),), latents | {"caption_embedding": arrays["caption_latents"]})


def read_samples(file: MdsFile) -> Iterator[tuple[int, dict[str, memoryview] | None]]:
    """Yields the index and the columns of each sample, or None in place of columns that are truncated or damaged."""
    data = memoryview(read_bytes(file))
    header = np.frombuffer(data[: 4 * (file.samples + 2)].tobytes().ljust(4 * (file.samples + 2), b"\0"), UINT32)
    whole = header[0] == file.samples
    for index, (start, stop) in enumerate(zip(header[1:-1].tolist(), header[2:].tolist(), strict=True)):
        inside = whole and 4 * len(header) <= start <= stop <= len(data)
        yield index, split_sample(data[start:stop], file) if inside else None


def split_sample(sample: memoryview, file: MdsFile) -> dict[str, memoryview] | None:
    """Returns the columns of a sample, or None if their sizes do not add up to the size of the sample."""
    start = UINT32.itemsize * file.sizes.count(None)
    if len(sample) < start:
        return None
    varying = iter(np.frombuffer(sample[:start], UINT32).tolist())
    columns = {}
    for name, size in zip(file.columns, file.sizes, strict=True):
        stop = start + (next(varying) if size is None else size)
        columns[name] = sample[start:stop]
        start = stop
    return columns if start == len(sample) else None


def read_bytes(file: MdsFile) -> bytes:
    """Returns the decompressed contents of a file, up to the first damage if it is truncated or damaged.

    Raises:
        UserError: The file cannot be opened or read, or the package zstandard is not installed.
    """
    try:
        if not file.compressed:
            return file.path.read_bytes()
        import zstandard

        data = bytearray()
        with file.path.open("rb") as stream, contextlib.suppress(zstandard.ZstdError):  # keeps the intact data
            for chunk in zstandard.ZstdDecompressor().read_to_iter(stream):
                data += chunk
                if len(data) >= file.bytes:
                    break
        return bytes(data)
    except ImportError as error:
        raise UserError("Compressed MDS files require the package zstandard. Run pip install zstandard.") from error
    except OSError as error:
        raise UserError(
            f"Cannot read {file.path} ({error.strerror}). Fix this and run the same command again."
        ) from error
