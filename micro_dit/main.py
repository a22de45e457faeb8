"""Trains a model: `python -m micro_dit.main --config=configs/mask75.py [--workdir=…] [--config.FIELD=VALUE …]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from micro_dit.cli import parse_or_exit, run_command
from micro_dit.errors import UserError
from micro_dit.parallel import distributed
from micro_dit.parallel.cpu import keep_memory

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/mask75.py or configs/mask75.py:xl.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: runs/<name of the config>.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "With several processes: host:port where process 0 is reached.")
PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "With --coordinator: number of this process, from 0.")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "With --coordinator: how many processes there are.")
CLUSTER = flags.DEFINE_bool(
    "cluster", False, "Ask the cluster for coordinator and processes: for TPU VMs. SLURM, GKE and MPI need no flag."
)
TIMEOUT = flags.DEFINE_integer("timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Sets up the process and trains."""
    from micro_dit.train import train

    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; config fields are set by --config.FIELD=VALUE.")
    if CONFIG.value is None:
        raise UserError("no config given; try --config=configs/mask75.py.")
    keep_memory()
    distributed.start(
        COORDINATOR.value, PROCESS_INDEX.value, PROCESS_COUNT.value, cluster=CLUSTER.value,
        timeout_seconds=TIMEOUT.value,
    )  # fmt: skip
    train(CONFIG.value, WORKDIR.value or Path("runs") / CONFIG.value.name)


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(run_command(main, argv)), flags_parser=parse_or_exit)
