"""Webdataset tars: CC12M as `pixparse/cc12m-wds`, and whatever img2dataset has written.

    webdataset:FOLDER                    all .tar files of a folder
    webdataset:'FOLDER/*/train-*.tar'    a pattern
    webdataset:FOLDER,split=validation   the split gets another name than 'train'

The members of a sample share a key: the member's name up to the first dot of its last part. An image needs a caption,
`KEY.txt`, or else the entry 'caption' of `KEY.json`. Each tar is a part; tars must be uncompressed, so that they can be
counted and indexed without being read. Hidden members are ignored.
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
    """A folder of webdataset tars; see `micro_dit.data.sources.Source`. Ids are 'TAR/KEY'."""

    name = "webdataset"

    def __init__(self, path: str, *, split: str = "train"):
        """Lists the archives, opens none; raises UserError if there are no tars, or some are compressed."""
        self.tars = find_tars(path)
        self.splits: tuple[str, ...] = (split,)
        self.attribution = f"your own data: {path}"
        if all(Path(tar).name.startswith("cc12m-") for tar in self.tars.values()):
            self.attribution = "Conceptual 12M (https://github.com/google-research-datasets/conceptual-12m)"

    def parts(self, split: str) -> list[Part]:
        """Returns a part for each tar, in the order of their names."""
        check_split(self, split)
        return [TarPart(name, path) for name, path in self.tars.items()]


class TarPart:
    """The samples of a tar, in their order, then the members that belong to none."""

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
        """Reads a sample from the open tar: of its members the image and the text only."""
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
        """The captions of a sample, as `make_item` takes them; UnicodeDecodeError or ValueError if they are damaged."""
        if text := sample.members.get("txt"):
            return text.read(tar).decode("utf-8-sig").strip()
        if record := sample.members.get("json"):
            entries = json.loads(record.read(tar).decode("utf-8-sig"))
            return entries.get("caption") if isinstance(entries, dict) else None
        return None

    def _reject(self, reject: Reject) -> Reject:
        return Reject(escape(f"{self.name}/{reject.id}" if reject.id else self.name), reject.reason)


class Member(NamedTuple):
    """Where the bytes of a file lie in a tar."""

    offset: int
    size: int

    def read(self, tar: BinaryIO) -> bytes:
        """Returns the bytes."""
        tar.seek(self.offset)
        return tar.read(self.size)


class TarSample(NamedTuple):
    """The members of a tar that share a key, by what follows the key, in lower case ('jpg', 'txt', 'seg.png')."""

    key: str
    members: dict[str, Member]


class TarIndex(NamedTuple):
    """The table of contents of a tar: its samples, and what is wrong with it (the id '' stands for the tar)."""

    samples: list[TarSample]
    rejects: list[Reject]


def index_tar(path: str) -> TarIndex:
    """Reads the headers of a tar (10,000 samples take about a second); the latest few are kept in memory.

    A truncated or damaged tar is indexed as far as its members are whole, and its last reject says so.
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
                with open(path, "rb") as file:  # tarfile takes the end of the file for the end of the archive
                    file.seek(tar.offset)
                    whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.ReadError:
        pass
    if not whole:
        rejects.append(Reject("", DAMAGED))
    # Samples without image and caption (a shard's statistics, say) are no samples.
    kept = [
        TarSample(key, members)
        for key, members in samples.items()
        if any(suffix in ("txt", "json") or is_image_name(suffix) for suffix in members)
    ]
    return TarIndex(kept, rejects)


def find_tars(path: str) -> dict[str, str]:
    """Finds tars by a folder or a pattern: sorted paths by names, which are paths without the ending.

    Raises:
        UserError: There are none, or some are compressed.
    """
    path = os.path.expanduser(path)
    pattern = os.path.join(glob.escape(path), "*.tar*") if os.path.isdir(path) else path
    found = sorted(glob.glob(pattern, recursive=True))
    if compressed := [file for file in found if file.endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))]:
        raise UserError(f"{compressed[0]} is compressed, so it cannot be indexed: decompress it to a plain .tar.")
    tars = [file for file in found if file.endswith(".tar")]
    if not tars:
        raise UserError(f"There are no .tar files at {path}: correct the folder or the pattern.")
    root = os.path.commonpath([os.path.dirname(tar) for tar in tars])
    return {os.path.relpath(tar, root).removesuffix(".tar"): tar for tar in tars}
