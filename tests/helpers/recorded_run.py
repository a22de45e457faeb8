"""Runs the command `python -m micro_dit.main` and records every training batch. Used by test_resume.py."""

import json
import os
import runpy
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from micro_dit import train as loop


def checksum(batch: Mapping[str, np.ndarray]) -> int:
    return zlib.crc32(b"".join(np.ascontiguousarray(batch[name]).tobytes() for name in sorted(batch)))


class Recorded:
    """An iterator that appends a line to a file for each batch: the data, its position and its checksum."""

    def __init__(self, iterator: Any, data: str, path: str) -> None:
        self.iterator, self.data, self.path = iterator, data, path

    def __next__(self) -> dict[str, np.ndarray]:
        position = json.dumps(self.iterator.get_state(), sort_keys=True)
        batch = next(self.iterator)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, (json.dumps([self.data, position, checksum(batch)]) + "\n").encode())  # one atomic write
        os.close(file)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)


if __name__ == "__main__":
    make, records = loop.make_train_iterator, sys.argv.pop(1)
    loop.make_train_iterator = lambda *arguments, **named: Recorded(
        make(*arguments, **named), str(named["seed"]), records
    )
    runpy.run_module("micro_dit.main", run_name="__main__")
