"""Reads WebDataset tars, such as CC12M (`pixparse/cc12m-wds`) and the output of img2dataset.

    webdataset:FOLDER                    all .tar files of a folder
    webdataset:'FOLDER/*/train-*.tar'    a glob pattern
    webdataset:FOLDER,split=validation   sets the name of the split; default: train

The members of a sample share a key: the path of the member up to the first dot of its file name. The caption is in
`KEY.txt`, or else in the entry 'caption' of `KEY.json`. Each tar is a part. Tars must be uncompressed, so that only
their headers are read to count and index them. Hidden members are ignored.
"""

import functools
import glob
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from micro_dit.data.sources import (
    DAMAGED,
    IMAGE_SUFFIXES,
    NO_IMAGE,
    NOT_JSON,
    NOT_UTF8,
    REPEATED,
    Item,
    Part,
    Reject,
    check_split,
    escape,
    is_image_name,
    make_item,
)
from micro_dit.errors import UserError


class WebDataset:
    """A folder of WebDataset tars; see `micro_dit.data.sources.Source`. Ids are 'TAR/KEY'."""

    name = "webdataset"

    def __init__(self, path: str, *, split: str = "train"):
        """Lists the archives without opening them; raises UserError if there are no tars, or some are compressed."""
        self.tars = find_tars(path)
        self.splits: tuple[str, ...] = (split,)
        self.attribution = f"your own data: {path}"
        if all(Path(tar).name.startswith("cc12m-") for tar in self.tars.values()):
            self.attribution = "Conceptual 12M (https://github.com/google-research-datasets/conceptual-12m)"

    def parts(self, split: str) -> list[Part]:
        """Returns one part per tar, sorted by name."""
        check_split(self, split)
        return [TarPart(name, path) for name, path in self.tars.items()]


class TarPart:
    """The samples of a tar in stored order, followed by its rejects."""

    def __init__(self, name: str, path: str):
        self.name, self.path = name, path

    def __len__(self) -> int:
        index = index_tar(self.path)
        return len(index.samples) + len(index.rejects)

    def __getitem__(self, number: int) -> Item:
        samples, rejects = index_tar(self.path)
        number = range(len(samples) + len(rejects))[number]
        if number >= len(samples):
            return self._reject(rejects[number - len(samples)])
        with open(self.path, "rb") as tar:
            return self.read(tar, samples[number])

    def __iter__(self) -> Iterator[Item]:
        samples, rejects = index_tar(self.path)
        with open(self.path, "rb") as tar:
            for sample in samples:
                yield self.read(tar, sample)
        yield from map(self._reject, rejects)

    def read(self, tar: BinaryIO, sample: "TarSample") -> Item:
        """Reads the image and the captions of a sample from an open tar."""
        id = f"{self.name}/{sample.key}"
        image = next((member for suffix, member in sample.members.items() if suffix in IMAGE_SUFFIXES), None)
        try:
            captions = self.captions(tar, sample)
        except UnicodeDecodeError:
            return Reject(escape(id), NOT_UTF8)
        except ValueError:
            return Reject(escape(id), NOT_JSON)
        if image is None:
            return Reject(escape(id), NO_IMAGE)
        return make_item(id, image.read(tar), captions)

    def captions(self, tar: BinaryIO, sample: "TarSample") -> object:
        """Returns the captions of a sample for `make_item`; raises UnicodeDecodeError or ValueError if damaged."""
        if text := sample.members.get("txt"):
            return text.read(tar).decode("utf-8-sig").strip()
        if record := sample.members.get("json"):
            entries = json.loads(record.read(tar).decode("utf-8-sig"))
            return entries.get("caption") if isinstance(entries, dict) else None
        return None

    def _reject(self, reject: Reject) -> Reject:
        return Reject(escape(f"{self.name}/{reject.id}" if reject.id else self.name), reject.reason)


class Member(NamedTuple):
    """The location of a file in a tar, in bytes."""

    offset: int
    size: int

    def read(self, tar: BinaryIO) -> bytes:
        """Returns the contents of the file."""
        tar.seek(self.offset)
        return tar.read(self.size)


class TarSample(NamedTuple):
    """The members of a tar that share a key, by lower-case suffix ('jpg', 'txt', 'seg.png')."""

    key: str
    members: dict[str, Member]


class TarIndex(NamedTuple):
    """The index of a tar: its samples and its rejects, where the id '' stands for the tar itself."""

    samples: list[TarSample]
    rejects: list[Reject]


def index_tar(path: str) -> TarIndex:
    """Reads the headers of a tar (about one second for 10,000 samples) and caches the index.

    A truncated or damaged tar is indexed up to its last complete member, and its last reject has the reason DAMAGED.
    """
    status = os.stat(path)
    return _index_tar(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _index_tar(path: str, size: int, modified: int) -> TarIndex:
    samples: dict[str, dict[str, Member]] = defaultdict(dict)
    rejects = []
    whole = False
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, base = info.name.removeprefix("./").rpartition("/")
                if not info.isreg() or base.startswith("."):
                    continue
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}".lstrip("/"), suffix.lower()
                if info.offset_data + info.size > size:
                    break
                if suffix in samples[key]:
                    rejects.append(Reject(key, REPEATED))
                else:
                    samples[key][suffix] = Member(info.offset_data, info.size)
            else:
                with open(path, "rb") as file:  # tarfile does not distinguish a truncated archive from its end
                    file.seek(tar.offset)
                    whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.ReadError:
        pass
    if not whole:
        rejects.append(Reject("", DAMAGED))
    # Keys with neither an image nor a caption, such as statistics of a shard, are not samples.
    kept = [
        TarSample(key, members)
        for key, members in samples.items()
        if any(suffix in ("txt", "json") or is_image_name(suffix) for suffix in members)
    ]
    return TarIndex(kept, rejects)


def find_tars(path: str) -> dict[str, str]:
    """Returns the sorted paths of tars in a folder or of a pattern, by name (the relative path without suffix).

    Raises:
        UserError: There are no tars, or some are compressed.
    """
    path = os.path.expanduser(path)
    pattern = os.path.join(glob.escape(path), "*.tar*") if os.path.isdir(path) else path
    found = sorted(glob.glob(pattern, recursive=True))
    if compressed := [file for file in found if file.endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))]:
        raise UserError(f"{compressed[0]} is compressed and cannot be indexed. Decompress it to a .tar file.")
    tars = [file for file in found if file.endswith(".tar")]
    if not tars:
        raise UserError(f"There are no .tar files at {path}. Correct the folder or pattern in --source.")
    root = os.path.commonpath([os.path.dirname(tar) for tar in tars])
    return {os.path.relpath(tar, root).removesuffix(".tar"): tar for tar in tars}
