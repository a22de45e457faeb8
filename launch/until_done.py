"""Starts a training run again until it is done. All launchers run their training through this file.

    python launch/until_done.py [--restarts=3] python -m micro_dit.main --config=… --workdir=…

A run that was told to stop saves and exits with status 0, just as one that is done. Here they differ, so that whatever
has started this (Kubernetes, SLURM, a loop in a shell) knows what to do:

    0    the run is done
    75   it was stopped and has saved: run the same command again, here or on another machine
    else it failed `restarts` + 1 times in a row without saving anything new; this is its last status

It needs nothing but Python, and runs once on each host of a run.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


def main(argv: list[str]) -> int:
    """Runs the command of the arguments and returns the exit status."""
    parser = argparse.ArgumentParser(usage="until_done.py [--restarts=N] python -m micro_dit.main --workdir=… …")
    parser.add_argument("--restarts", type=int, default=3, help="failures in a row, without a new checkpoint, to bear")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    folders = [argument.partition("=")[2] for argument in options.command if argument.startswith("--workdir=")]
    if not folders or not folders[-1]:
        print("error: the command has no --workdir=FOLDER, by which to see whether the run is done.", file=sys.stderr)
        return 1
    return until_done(options.command, Path(folders[-1]), options.restarts)


def until_done(command: list[str], workdir: Path, restarts: int) -> int:
    """Runs the command until the run is done, was stopped, or fails again and again. Returns the exit status."""
    process: subprocess.Popen[bytes] | None = None
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        # Ctrl-C reaches the run by itself, as it belongs to the same terminal; a second one would not let it save.
        if number == signal.SIGTERM and process is not None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    failures = 0
    while not stopping:
        before = newest_checkpoint(workdir)
        process = subprocess.Popen(command)
        if stopping:  # between the loop's check and the start
            process.terminate()
        status = process.wait()
        if status == 0 and is_done(workdir):
            return 0
        if status == 0:
            break
        failures = 1 if newest_checkpoint(workdir) != before else failures + 1
        if stopping or failures > restarts:
            break
        print(f"the run ended with status {status}: starting it again", file=sys.stderr, flush=True)
    if not stopping and status != 0:
        return status if status > 0 else 128 - status  # as a shell would say it
    print("the run was stopped: resumable by running the same command again", file=sys.stderr, flush=True)
    return STOPPED


def newest_checkpoint(workdir: Path) -> int:
    """The step of the newest whole checkpoint; -1 if there is none. What is half saved has another name."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=-1)


def is_done(workdir: Path) -> bool:
    """Whether the checkpoint of the last step of the last phase is there."""
    config = workdir / "config.json"
    if not config.exists():
        return False
    steps = sum(phase["steps"] for phase in json.loads(config.read_text())["config"]["phases"])
    return newest_checkpoint(workdir) >= steps


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
