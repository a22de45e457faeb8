"""A fake gcloud that records its arguments and prints TPU states and run statuses chosen by a test.

The environment variable GCLOUD is a folder with `calls` (JSON lines, appended), and `states` and `statuses` (JSON lists
of answers, printed one after another; the last one repeats).
"""

import json
import os
import sys
from pathlib import Path

folder = Path(os.environ["GCLOUD"])
arguments = sys.argv[1:]
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")


def answer(name: str) -> None:
    answers = json.loads((folder / name).read_text())
    print(answers[0])
    (folder / name).write_text(json.dumps(answers[1:] or answers))


if "list" in arguments:
    answer("states")
elif any(argument.startswith("--command=") and argument.endswith("worker_status") for argument in arguments):
    answer("statuses")
