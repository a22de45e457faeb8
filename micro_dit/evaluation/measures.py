"""Metric values with a description of how they were measured, and the file metrics.json that stores them."""

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
    """A metric value.

    Attributes:
        name: Name of the metric, such as 'fid'.
        value: The value.
        better: 'lower' or 'higher'.
        pipeline: How it was measured: hashes of networks, preprocessing, numbers of images.
        images: Settings of the images that were measured. For losses, the kind of weights only.
    """

    name: str
    value: float
    better: str
    pipeline: Mapping[str, Any]
    images: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def replaces(self, other: "Measure") -> bool:
        """Returns whether the other value is of the same metric and image set, with any number of images."""
        return self.name == other.name and {**self.images, "count": 0} == {**other.images, "count": 0}


class Measures:
    """The metric values of one checkpoint, stored in metrics.json. `add` writes the file immediately."""

    def __init__(self, folder: str | Path, about: Mapping[str, Any]):
        """Reads metrics.json in a folder if it exists.

        Args:
            folder: The folder.
            about: Description of the model; has to match that in the file.

        Raises:
            UserError: The file is damaged or belongs to another model.
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
            raise UserError(
                f"{self.path} is damaged ({error}). Move or delete it to measure the model again."
            ) from error
        if theirs != self.about:
            differing = sorted(n for n in theirs.keys() | self.about.keys() if theirs.get(n) != self.about.get(n))
            raise UserError(
                f"{self.path} belongs to another model (different {', '.join(differing)}). Set --out to another "
                "folder, or move the file."
            )

    def add(self, *measures: Measure) -> None:
        """Adds values, removes those that they replace, and writes the file atomically."""
        for measure in measures:
            # The round trip converts tuples to lists, so that the value compares equal to one read from the file.
            measure = Measure(**json.loads(json.dumps(dataclasses.asdict(measure))))
            self.all = [other for other in self.all if not measure.replaces(other)] + [measure]
        content = {"about": self.about, "metrics": [dataclasses.asdict(measure) for measure in self.all]}
        write_atomically(self.path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
