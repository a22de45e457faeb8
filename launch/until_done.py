"""Restarts a training run until it is done. All launchers start training through this script.

    python launch/until_done.py [--restarts=3] python -m micro_dit.main --config=… --workdir=…

A training process exits with status 0 both when the run is done and when it was stopped and has saved. This script
distinguishes the two by its own exit status, for Kubernetes, SLURM or a shell loop:

    0      the run is done
    75     the run was stopped and has saved; run the same command again, here or on another machine
    other  the run failed `restarts` + 1 times in a row without a new checkpoint; this is its last exit status

It requires only Python, and runs once on each host.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

STOPPED = 75  # EX_TEMPFAIL in sysexits.h: try again later


def main(argv: list[str]) -> int:
    """Runs the command in the arguments and returns the exit status."""
    parser = argparse.ArgumentParser(usage="until_done.py [--restarts=N] python -m micro_dit.main --workdir=… …")
    parser.add_argument("--restarts", type=int, default=3, help="restarts after failures without a new checkpoint")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    folders = [argument.partition("=")[2] for argument in options.command if argument.startswith("--workdir=")]
    if not folders or not folders[-1]:
        print("error: The command has no --workdir. Add --workdir=FOLDER to the command.", file=sys.stderr)
        return 1
    return until_done(options.command, Path(folders[-1]), options.restarts)


def until_done(command: list[str], workdir: Path, restarts: int) -> int:
    """Runs the command until the run is done, was stopped, or fails repeatedly, and returns the exit status."""
    process: subprocess.Popen[bytes] | None = None
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        # The terminal sends Ctrl-C to the run too. A second SIGINT would keep the run from saving.
        if number == signal.SIGTERM and process is not None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    failures = 0
    while not stopping:
        before = newest_checkpoint(workdir)
        process = subprocess.Popen(command)
        if stopping:  # the signal came between the check of the loop and the start of the process
            process.terminate()
        status = process.wait()
        if status == 0 and is_done(workdir):
            return 0
        if status == 0:
            break
        failures = 1 if newest_checkpoint(workdir) != before else failures + 1
        if stopping or failures > restarts:
            break
        print(f"the run exited with status {status}: restarting it", file=sys.stderr, flush=True)
    if not stopping and status != 0:
        return status if status > 0 else 128 - status  # like a shell, 128 + signal
    print("the run was stopped: run the same command again to resume it", file=sys.stderr, flush=True)
    return STOPPED


def newest_checkpoint(workdir: Path) -> int:
    """Returns the step of the newest complete checkpoint, or -1. Partial checkpoints have names with a suffix."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=-1)


def is_done(workdir: Path) -> bool:
    """Returns whether the checkpoint of the last step of the last phase exists."""
    config = workdir / "config.json"
    if not config.exists():
        return False
    steps = sum(phase["steps"] for phase in json.loads(config.read_text())["config"]["phases"])
    return newest_checkpoint(workdir) >= steps


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
