"""Latents that the public PyTorch release of MicroDiT has prepared (MosaicML's MDS files) become our shards.

The release writes one folder a GPU, each with files of samples and an `index.json`, and merges the indexes:

    index.json              version 2: of each file its name, size, number of samples and columns, also of sub-folders
    0/index.json            the same for this folder
    0/shard.00000.mds       or .mds.zstd: uint32 number of samples n, uint32 offsets (n + 1), a description, the samples
    1/shard.00000.mds

A sample is the uint32 sizes of those columns that have no fixed one, then the columns' bytes, all little-endian. The
columns that count here: `caption` (UTF-8), `caption_latents` (L, Y) and, for each resolution, `latents_256` (C, 32, 32)
or `latents_512` (C, 64, 64), all float16. Latents are samples of the posterior, multiplied by the scaling factor.
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
DOWNSAMPLE = 8  # pixels per latent of every autoencoder that the release takes
CAPTION_SHAPES = ((77, 1024), (77, 768), (120, 4096))  # (L, Y) of the text encoders that the release takes
UINT32, FLOAT16 = np.dtype("<u4"), np.dtype("<f2")
BYTES_IN_A_PART = 1 << 30  # of MDS files; a part becomes one shard file

WRONG_SIZE = "an array has another size than the others"
NOT_FINITE = "latents or caption embedding are not finite in float16"


class MdsFile(NamedTuple):
    """A file of samples, as an index describes it.

    Attributes:
        name: path below the data set's folder, without the ending of compression.
        path: the file that is there.
        compressed: whether that is by zstd.
        bytes: size before compression.
        sizes: bytes of each column; None if they vary from sample to sample.
    """

    name: str
    path: Path
    compressed: bool
    bytes: int
    samples: int
    columns: tuple[str, ...]
    sizes: tuple[int | None, ...]


class Layout(NamedTuple):
    """What the samples hold: sides of the images in pixels, latent channels C, caption tokens L and channels Y."""

    resolutions: tuple[int, ...]
    channels: int
    tokens: int
    caption_channels: int


@dataclasses.dataclass(frozen=True)
class MdsPart:
    """Files that are converted together."""

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
    """Converts the MDS latents in a folder and its sub-folders to shards; this needs no device.

    Returns the manifest, or None if other processes still have parts to convert. The encoders are those that made the
    latents and embeddings; `vae` may be a local folder, whose fingerprint is taken. By default all resolutions in
    pixels that there are are converted.

    Raises:
        UserError: there are no such files or some are missing, they hold something else, `out` was begun with other
            settings, no sample is usable, or the disk is full.
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
        report(f"{out} is finished: nothing is left to do")
        return read_manifest(out)
    own = range(process_index, len(parts), process_count)
    jobs = [index for index in own if journal.read_part(SPLIT, index) is None]
    done, total, started = 0, sum(len(parts[index]) for index in jobs), time.monotonic()
    report(f"{len(jobs)} of {len(own)} parts to convert: {total} samples of {folder}")
    for index in jobs:
        journal.finish_part(convert_part(parts[index], index, len(parts), journal.folder, layout, manifest))
        done += len(parts[index])
        rate = done / (time.monotonic() - started)
        report(f"{done} of {total} samples, {rate:.0f} a second, {(total - done) / rate:.0f} s left")
    if not journal.complete:
        report(f"this process has made its {len(own)} parts; the last of the {process_count} processes completes {out}")
        return None
    journal.merge(manifest)
    return read_manifest(out)


def convert_part(part: MdsPart, index: int, count: int, folder: Path, layout: Layout, manifest: Manifest) -> PartReport:
    """Writes the shard file of a part."""
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
    """The manifest, but for what is not known before all parts are done."""
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
        caption_cleaning=CLEANING_VERSION,  # the release cleans captions before it embeds them
        splits={SPLIT: ()},
    )


def known_as(encoder: str) -> str:
    """The name that an encoder has in manifests: a folder's own name, or else the one given."""
    folder = Path(encoder).expanduser()
    return folder.resolve().name if folder.is_dir() else encoder


def vae_fingerprint(vae: str, channels: int) -> str:
    """Returns the fingerprint of an autoencoder's folder; 'unverified' if the folder does not exist.

    Raises:
        UserError: it is a folder without an autoencoder, or of one with another number of channels.
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
            f"{vae} makes latents of {config.latent_channels} channels, one for {config.downsample} pixels, and the "
            f"MDS files hold {channels} channels, one for {DOWNSAMPLE}: give the image encoder that made them."
        )
    return fingerprint(config, load_parameters(folder, config))


def list_mds(folder: str | Path) -> list[MdsFile]:
    """The files of a data set by name, each once, though a merged index may repeat those of its sub-folders.

    Raises:
        UserError: there is no index, or it is damaged, of another version, or of another format; or files are missing.
    """
    root = Path(folder).expanduser()
    files: dict[str, MdsFile] = {}
    missing = []
    for index in sorted(root.rglob("index.json")):
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            if content["version"] != 2:
                raise UserError(f"{index} has version {content['version']}, and only version 2 can be read.")
            for entry in content["shards"]:
                name = os.path.relpath(index.parent / entry["raw_data"]["basename"], root)
                if found := _find_file(root, name, entry):
                    files[name] = found
                else:
                    missing.append(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of MDS files, or damaged ({error!r}): copy it again.") from error
    if missing:
        raise UserError(
            f"{len(set(missing))} MDS files that {root} lists are missing, the first is {missing[0]}: copy them too, "
            "or take them out of index.json."
        )
    if not files:
        raise UserError(f"There are no MDS files in {root}, no index.json lists any: correct the folder.")
    return [files[name] for name in sorted(files)]


def _find_file(root: Path, name: str, entry: dict[str, Any]) -> MdsFile | None:
    """The file that an index's entry describes, as it was or compressed; None if neither is there."""
    path, compressed = root / name, False
    if not path.exists() and entry["zip_data"]:
        path, compressed = path.with_name(Path(entry["zip_data"]["basename"]).name), True
    if not path.exists():
        return None
    if entry["format"] != "mds" or (compressed and not entry["compression"].startswith("zstd")):
        kind = entry["compression"] if entry["format"] == "mds" else entry["format"]
        raise UserError(f"{path} is of the kind '{kind}', and only MDS is read, uncompressed or by zstd: convert it.")
    size, samples = int(entry["raw_data"]["bytes"]), int(entry["samples"])
    return MdsFile(name, path, compressed, size, samples, tuple(entry["column_names"]), tuple(entry["column_sizes"]))


def group(files: Sequence[MdsFile]) -> list[MdsPart]:
    """Puts files together, in order, up to 1 GiB: seven terabytes come in some thirty thousand files."""
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
    """Finds out what the samples hold, from the names of the columns and the usual sizes in the first readable file.

    Raises:
        UserError: columns are missing, or their sizes are not those of latents and caption embeddings.
    """
    there = {int(found[1]) for name in files[0].columns if (found := re.fullmatch(r"latents_(\d+)", name))}
    wanted = tuple(sorted(there if resolutions is None else set(resolutions)))
    needed = ["caption", "caption_latents", *(f"latents_{resolution}" for resolution in wanted)]
    for file in files:
        absent = ", ".join(name for name in needed if name not in file.columns)
        if absent or not wanted:
            raise UserError(
                f"{file.path} has no column {absent or 'latents_256'} among {', '.join(file.columns)}: ask for the "
                "resolutions that are there, or give the folder of the latents."
            )
    for file in files:
        sizes = Counter(tuple(len(sample[name]) for name in needed[1:]) for _, sample in read_samples(file) if sample)
        if sizes:
            return _layout_of(file, wanted, *sizes.most_common(1)[0][0])
    raise UserError(f"No sample in {files[0].path.parent} can be read, all files are damaged: copy them again.")


def _layout_of(file: MdsFile, resolutions: tuple[int, ...], caption_bytes: int, *latent_bytes: int) -> Layout:
    """The layout of samples with such sizes."""
    plane_bytes = [(side // DOWNSAMPLE) ** 2 * FLOAT16.itemsize for side in resolutions]
    channels = {size / of_plane for size, of_plane in zip(latent_bytes, plane_bytes, strict=True)}
    if len(channels) > 1 or not (count := min(channels)).is_integer() or count < 1:
        sizes = ", ".join(f"{size} bytes at {side} px" for size, side in zip(latent_bytes, resolutions, strict=True))
        raise UserError(f"{file.path} holds no float16 latents (C, side/8, side/8): {sizes}.")
    for tokens, caption_channels in CAPTION_SHAPES:
        if tokens * caption_channels * FLOAT16.itemsize == caption_bytes:
            return Layout(resolutions, int(count), tokens, caption_channels)
    known = ", ".join(f"{tokens}×{width}" for tokens, width in CAPTION_SHAPES)
    raise UserError(f"{file.path} holds caption embeddings of {caption_bytes} bytes, not float16 of {known}.")


def read_records(part: MdsPart, layout: Layout) -> Iterator[Record | Reject]:
    """Yields a record or a reject for each sample that the index tells of; ids are 'FILE:index'."""
    for file in part.files:
        for index, sample in read_samples(file):
            yield to_record(f"{file.name}:{index}", sample, layout)


def to_record(id: str, sample: dict[str, memoryview] | None, layout: Layout) -> Record | Reject:
    """Checks a sample; latents become (H, W, C)."""
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
    # The release keeps a caption as it was found, and embeds it cleaned.
    return Record(id, (clean_caption(caption),), latents | {"caption_embedding": arrays["caption_latents"]})


def read_samples(file: MdsFile) -> Iterator[tuple[int, dict[str, memoryview] | None]]:
    """Yields the index and the columns of each sample; None for columns that are cut off or contradict their sizes."""
    data = memoryview(read_bytes(file))
    header = np.frombuffer(data[: 4 * (file.samples + 2)].tobytes().ljust(4 * (file.samples + 2), b"\0"), UINT32)
    whole = header[0] == file.samples
    for index, (start, stop) in enumerate(zip(header[1:-1].tolist(), header[2:].tolist(), strict=True)):
        inside = whole and 4 * len(header) <= start <= stop <= len(data)
        yield index, split_sample(data[start:stop], file) if inside else None


def split_sample(sample: memoryview, file: MdsFile) -> dict[str, memoryview] | None:
    """The columns of a sample; None if their sizes do not add up to that of the sample."""
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
    """Reads a file, decompressed; as far as it goes, if it is cut off or damaged.

    Raises:
        UserError: it cannot be opened or read, or the package for zstd is missing.
    """
    try:
        if not file.compressed:
            return file.path.read_bytes()
        import zstandard

        data = bytearray()
        with file.path.open("rb") as stream, contextlib.suppress(zstandard.ZstdError):  # what came before it is good
            for chunk in zstandard.ZstdDecompressor().read_to_iter(stream):
                data += chunk
                if len(data) >= file.bytes:
                    break
        return bytes(data)
    except ImportError as error:
        raise UserError("MDS files that are compressed need the package zstandard: pip install zstandard.") from error
    except OSError as error:
        raise UserError(f"Cannot read {file.path} ({error.strerror}): correct that, and run it again.") from error
