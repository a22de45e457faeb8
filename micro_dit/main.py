"""Trains a model.

python -m micro_dit.main --config=configs/mask75.py [--workdir=…] [--config.FIELD=VALUE …]
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from micro_dit.cli import define_distributed_flags, distributed_options, run_command
from micro_dit.errors import UserError
from micro_dit.parallel import distributed
from micro_dit.parallel.cpu import keep_memory

FLAGS = flags.FLAGS


def main() -> None:
    """Configures the process and trains the config given by the flags."""
    from micro_dit.train import train

    if FLAGS.config is None:
        raise UserError("No config was given. Set --config, for example --config=configs/mask75.py.")
    keep_memory()
    distributed.start(**distributed_options())
    train(FLAGS.config, FLAGS.workdir or Path("runs") / FLAGS.config.name)


def define_flags() -> None:
    """Defines the command's flags."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/mask75.py or configs/mask75.py:xl.")
    flags.DEFINE_string("workdir", None, "Work directory of the run; by default runs/<config.name>.")
    define_distributed_flags()


if __name__ == "__main__":
    run_command(main, define_flags, takes_config=True)
