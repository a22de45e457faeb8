"""A stand-in for gcloud: writes down its arguments, and plays a TPU whose states and runs a test has chosen.

GCLOUD names a folder with `calls` (JSON lines), `states` and `statuses` (JSON lists: what is answered, in turn; the
last answer stays).
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
