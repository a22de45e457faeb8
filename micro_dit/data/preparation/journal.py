"""A folder of shards in the making: what is to be made, which parts are done, and how they become one manifest.

    plan.json                  the settings and the names of all parts, written first; other settings are refused
    parts/train-00003.json     what became of a part, written when its shard files are whole
    rejects.jsonl              every input that was left out, and why
    manifest.json              written last: the folder is whole

A process may be killed at any moment: what has its last name is whole, and what has not is made again. Several hosts
may work in one folder, on different parts; the last one to finish, or two at once, write the same manifest.
"""

import dataclasses
import itertools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from micro_dit.data.shard_writer import LatentSums, latent_statistics, write_manifest
from micro_dit.data.shards import IDS_NAMED, MANIFEST, Manifest, ShardFile, Tally
from micro_dit.errors import UserError
from micro_dit.files import disk_errors, flatten, write_atomically

PLAN, PARTS, REJECTS = "plan.json", "parts", "rejects.jsonl"


@dataclasses.dataclass
class PartReport:
    """What became of a part's items: each is in a file or in `rejects`.

    Attributes:
        index: the part's place in the split.
        files: its shard files by the split that they belong to.
        rejects: id and reason of each item that was left out, in order.
        latent_sums: of each file, for the statistics of all.
    """

    split: str
    index: int
    name: str
    files: dict[str, ShardFile] = dataclasses.field(default_factory=dict)
    rejects: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    altered: dict[str, Tally] = dataclasses.field(default_factory=lambda: defaultdict(Tally))
    latent_sums: list[LatentSums] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses a report; raises ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        files = {split: ShardFile(**file) for split, file in values["files"].items()}
        altered = {reason: Tally(**tally) for reason, tally in values["altered"].items()}
        return cls(**values | {"files": files, "altered": altered})


class Journal:
    """The work on a folder, as one of its processes sees it."""

    def __init__(
        self, out: str | Path, settings: Mapping[str, Any], parts: Mapping[str, Sequence[str]], process_index: int = 0
    ):
        """Opens the folder, or makes it.

        The settings are everything that the records depend on, with values as JSON has them; the parts are named by
        split of the source.

        Raises:
            UserError: the folder holds something else, or was begun with other settings.
        """
        if "://" in str(out):
            raise UserError(f"{out} is not on a disk: make the shards in a local folder, and copy them there.")
        self.folder = Path(out).expanduser()
        self.parts = {split: list(names) for split, names in parts.items()}
        # Of this process alone, so that no two write the same temporary file.
        self._own = self.folder / PARTS / f"process-{process_index}"
        wanted = {**settings, "parts": self.parts}
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file: choose another name for the folder of shards.")
        if not (self.folder / PLAN).exists():
            if (self.folder / MANIFEST).exists():
                raise UserError(f"{self.folder} holds finished shards of unknown settings: choose another folder.")
            if self.folder.exists() and any(path.name not in (PARTS, PLAN) for path in self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty, and no shards were begun there: choose another folder.")
            write_atomically(self._own / PLAN, json.dumps(wanted, indent=2) + "\n")
            (self._own / PLAN).replace(self.folder / PLAN)
        old, new = _by_name(json.loads((self.folder / PLAN).read_text(encoding="utf-8"))), _by_name(wanted)
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                raise UserError(
                    f"{self.folder} was begun with {name} {old.get(name)}, not {new.get(name)}: use the same again, or "
                    "choose another folder."
                )
        shutil.rmtree(self._own, ignore_errors=True)  # a killed process may have left it

    @property
    def finished(self) -> bool:
        """Whether the folder is whole."""
        return (self.folder / MANIFEST).exists()

    def read_part(self, split: str, index: int) -> PartReport | None:
        """The report of a part that is done; None if it is not, or if its files are not there in full."""
        try:
            report = PartReport.from_json(self._report_path(split, index).read_text(encoding="utf-8"))
            for file in report.files.values():
                if file.records and (self.folder / file.name).stat().st_size != file.bytes:
                    return None
        except FileNotFoundError:
            return None
        return report

    @property
    def complete(self) -> bool:
        """Whether all parts are done."""
        return None not in self._reports()

    def finish_part(self, report: PartReport) -> None:
        """Records that a part is done; its files have their last names by now.

        Raises:
            UserError: the disk is full, or another failure of writing.
        """
        # A plain dictionary: Python 3.11 cannot copy another kind.
        plain = dataclasses.asdict(dataclasses.replace(report, altered=dict(report.altered)))
        write_atomically(self._report_path(report.split, report.index), json.dumps(plain) + "\n")

    def merge(self, manifest: Manifest) -> None:
        """Makes the folder whole when all parts are done; the manifest still lacks files, counts and statistics.

        Raises:
            UserError: not a single input is usable, or the disk is full.
        """
        dropped: defaultdict[str, Tally] = defaultdict(Tally)
        altered: defaultdict[str, Tally] = defaultdict(Tally)
        files: dict[str, list[ShardFile]] = {split: [] for split in manifest.splits}
        sums: list[LatentSums] = []
        rejects = self._own / REJECTS
        with disk_errors(rejects):
            self._own.mkdir(parents=True, exist_ok=True)
            with rejects.open("w", encoding="utf-8", newline="\n") as lines:
                for report in self._reports():
                    assert report is not None, "merged before all parts were done"
                    for split, file in report.files.items():
                        files[split].append(file)
                    sums += report.latent_sums
                    for reason, tally in report.altered.items():
                        total = altered[reason]
                        total.count, total.ids = total.count + tally.count, (total.ids + tally.ids)[:IDS_NAMED]
                    for id, reason in report.rejects:
                        dropped[reason].add(id)
                        line = {"id": id, "split": report.split, "part": report.name, "reason": reason}
                        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
            rejects.replace(self.folder / REJECTS)
        if not any(file.records for file in itertools.chain.from_iterable(files.values())):
            reasons = ", ".join(f"{reason} ({tally.count})" for reason, tally in dropped.items()) or "it is empty"
            raise UserError(f"No example of {manifest.source} is usable: {reasons}.")
        manifest = dataclasses.replace(
            manifest,
            dropped=dict(dropped),
            altered=dict(altered),
            statistics=latent_statistics(sums),
            splits={split: tuple(of_split) for split, of_split in files.items()},
        )
        write_manifest(self._own, manifest)
        (self._own / MANIFEST).replace(self.folder / MANIFEST)
        self._own.rmdir()
        for left in (self.folder / PARTS).glob(".*.tmp"):  # by a process that was killed; all parts are written by now
            left.unlink(missing_ok=True)

    def _reports(self) -> Iterator[PartReport | None]:
        """Returns what `read_part` returns of each part, in order."""
        return (self.read_part(split, index) for split, names in self.parts.items() for index in range(len(names)))

    def _report_path(self, split: str, index: int) -> Path:
        return self.folder / PARTS / f"{split}-{index:05d}.json"


def check_process(index: int, count: int) -> None:
    """Raises UserError if the index of a process is out of range."""
    if not 0 <= index < count:
        raise UserError(f"The process index must be from 0 to {count - 1}, not {index}.")


def _by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings by dotted names; each list as its length and then its items."""
    flat: dict[str, Any] = {}
    for name, value in flatten(settings).items():
        if isinstance(value, list):
            flat |= {f"length of {name}": len(value)} | {f"{name}[{index}]": item for index, item in enumerate(value)}
        else:
            flat[name] = value
    return flat
