"""Numbers that say how they came about, and the file that keeps them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micro_dit.errors import UserError
from micro_dit.files import write_atomically

MEASURES_FILE = "metrics.json"


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
        name: of the metric, such as 'fid'.
        value: the number.
        better: 'lower' or 'higher'.
        pipeline: all that the number depends on besides the images: networks by their hashes, resizing, counts.
        images: what it was measured on: how the images were drawn; empty for losses.
    """

    name: str
    value: float
    better: str
    pipeline: Mapping[str, Any]
    images: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def replaces(self, other: "Measure") -> bool:
        """Whether it is the same metric of the same images, measured again, or of more of them."""
        return self.name == other.name and {**self.images, "count": 0} == {**other.images, "count": 0}


class Measures:
    """The measures of one checkpoint, in the file metrics.json; each is on the disk as soon as it is added."""

    def __init__(self, folder: str | Path, about: Mapping[str, Any]):
        """Opens (or begins) the file; `about` says what model is evaluated.

        Raises:
            UserError: the file is damaged, or is of another model.
        """
        self.path, self.about = Path(folder) / MEASURES_FILE, json.loads(json.dumps(dict(about)))
        self.all: list[Measure] = []
        if not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            self.all = [Measure(**fields) for fields in saved["metrics"]]
            theirs = saved["about"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}); move it away to measure again.") from error
        if theirs != self.about:
            differing = sorted(n for n in theirs.keys() | self.about.keys() if theirs.get(n) != self.about.get(n))
            raise UserError(
                f"{self.path} is of another model (its {', '.join(differing)} differ); move it away, or give another "
                "--out."
            )

    def add(self, *measures: Measure) -> None:
        """Adds measures, in place of what they replace, and writes the file, whole or not at all."""
        for measure in measures:
            measure = Measure(**json.loads(json.dumps(dataclasses.asdict(measure))))  # as it is read back
            self.all = [other for other in self.all if not measure.replaces(other)] + [measure]
        content = {"about": self.about, "metrics": [dataclasses.asdict(measure) for measure in self.all]}
        write_atomically(self.path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
