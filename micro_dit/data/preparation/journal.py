"""Tracks the progress of a folder of shards that is being written.

    plan.json                  the settings and the names of all parts, written first; runs with other settings fail
    parts/train-00003.json     the report of a part, written when its shard files are complete
    rejects.jsonl              every dropped input and the reason
    manifest.json              written last, when the folder is complete

A process may be killed at any moment. Files are renamed to their final names once they are complete, and incomplete
parts are processed again. Several hosts may process different parts of one folder; the host that finishes last writes
the manifest. If two hosts finish at the same time, both write identical manifests.
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
    """The result of processing one part: every item is either in a file or in `rejects`.

    Attributes:
        split: Split of the source.
        index: Index of the part in the split.
        name: Name of the part.
        files: The shard files of the part, by the split of the output.
        rejects: Id and reason of each dropped item, in order.
        altered: Items that were kept after a change, by the kind of change.
        latent_sums: Sums of the latents of each file, for the statistics of the manifest.
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
        """Parses a report; raises ValueError, KeyError or TypeError for any other text."""
        values = json.loads(text)
        files = {split: ShardFile(**file) for split, file in values["files"].items()}
        altered = {reason: Tally(**tally) for reason, tally in values["altered"].items()}
        return cls(**values | {"files": files, "altered": altered})


class Journal:
    """The progress of a folder of shards, as used by one process."""

    def __init__(
        self, out: str | Path, settings: Mapping[str, Any], parts: Mapping[str, Sequence[str]], process_index: int = 0
    ):
        """Opens the folder, or creates it.

        Args:
            out: Path of the folder.
            settings: All settings that the records depend on, as JSON values.
            parts: Names of the parts, by split of the source.
            process_index: Index of this process.

        Raises:
            UserError: The folder contains other files, or was started with other settings.
        """
        if "://" in str(out):
            raise UserError(f"{out} is not a local folder. Set --out to a local folder, and copy the shards afterward.")
        self.folder = Path(out).expanduser()
        self.parts = {split: list(names) for split, names in parts.items()}
        # Each process has its own folder for temporary files.
        self._own = self.folder / PARTS / f"process-{process_index}"
        wanted = {**settings, "parts": self.parts}
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file. Set --out to a folder.")
        if not (self.folder / PLAN).exists():
            if (self.folder / MANIFEST).exists():
                raise UserError(f"{self.folder} has finished shards but no {PLAN}. Set --out to another folder.")
            if self.folder.exists() and any(path.name not in (PARTS, PLAN) for path in self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty and has no {PLAN}. Set --out to a new or empty folder.")
            write_atomically(self._own / PLAN, json.dumps(wanted, indent=2) + "\n")
            (self._own / PLAN).replace(self.folder / PLAN)
        old, new = _by_name(json.loads((self.folder / PLAN).read_text(encoding="utf-8"))), _by_name(wanted)
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                raise UserError(
                    f"{self.folder} was started with {name} {old.get(name)}, but this run has {new.get(name)}. Use the "
                    "original settings, or set --out to another folder."
                )
        shutil.rmtree(self._own, ignore_errors=True)  # left by a killed process

    @property
    def finished(self) -> bool:
        """Whether the folder is complete, including its manifest."""
        return (self.folder / MANIFEST).exists()

    def read_part(self, split: str, index: int) -> PartReport | None:
        """Returns the report of a finished part, or None if the part is unfinished or its files are incomplete."""
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
        """Whether all parts are finished."""
        return None not in self._reports()

    def finish_part(self, report: PartReport) -> None:
        """Writes the report of a part, whose shard files must be complete.

        Raises:
            UserError: The disk is full, or the report cannot be written.
        """
        # On Python 3.11, dataclasses.asdict cannot copy a defaultdict.
        plain = dataclasses.asdict(dataclasses.replace(report, altered=dict(report.altered)))
        write_atomically(self._report_path(report.split, report.index), json.dumps(plain) + "\n")

    def merge(self, manifest: Manifest) -> None:
        """Completes the folder after all parts are finished: writes the rejects and the manifest.

        Args:
            manifest: Manifest without files, counts and statistics, which are added here.

        Raises:
            UserError: No input is usable, or the disk is full.
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
                    assert report is not None, "merge requires that all parts are finished"
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
            reasons = ", ".join(f"{reason} ({tally.count})" for reason, tally in dropped.items()) or "no items found"
            raise UserError(
                f"The source {manifest.source} has no usable examples: {reasons}. Correct --source or the data."
            )
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
        for left in (self.folder / PARTS).glob(".*.tmp"):  # left by killed processes
            left.unlink(missing_ok=True)

    def _reports(self) -> Iterator[PartReport | None]:
        """Returns the result of `read_part` for each part, in order."""
        return (self.read_part(split, index) for split, names in self.parts.items() for index in range(len(names)))

    def _report_path(self, split: str, index: int) -> Path:
        return self.folder / PARTS / f"{split}-{index:05d}.json"


def check_process(index: int, count: int) -> None:
    """Raises UserError if the index of a process is out of range."""
    if not 0 <= index < count:
        raise UserError(f"--process_index must be from 0 to {count - 1}, not {index}.")


def _by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings as a flat dictionary; a list is represented by its length and its items."""
    flat: dict[str, Any] = {}
    for name, value in flatten(settings).items():
        if isinstance(value, list):
            flat |= {f"length of {name}": len(value)} | {f"{name}[{index}]": item for index, item in enumerate(value)}
        else:
            flat[name] = value
    return flat
