"""Trains a model: `python -m micro_dit.main --config=configs/mask75.py [--workdir=…] [--config.FIELD=VALUE …]`."""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from micro_dit.errors import UserError, run_command

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/mask75.py or configs/mask75.py:xl.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: runs/<name of the config>.")


def main(argv: Sequence[str]) -> None:
    """Sets up the process and trains."""
    from micro_dit.train import train

    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; config fields are set by --config.FIELD=VALUE.")
    if CONFIG.value is None:
        raise UserError("no config given; try --config=configs/mask75.py.")
    logging.set_verbosity(logging.WARNING)
    enable_compilation_cache()
    train(CONFIG.value, WORKDIR.value or Path("runs") / CONFIG.value.name)


def enable_compilation_cache() -> None:
    """Compiled programs are kept between runs, unless JAX_COMPILATION_CACHE_DIR already says where."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "micro_dit" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parsing, with one clear line for a config file or field that does not exist."""
    try:
        return app.parse_flags_with_usage(list(argv))
    except (AttributeError, KeyError) as error:
        asked = re.sub(r"[^\w.]", "", str(error.args[0]).split("'")[1] if "'" in str(error) else str(error))
        field = next((a.split("=")[0].removeprefix("--config.") for a in argv if asked and asked in a), asked)
        known = [name for name, _ in _leaves(CONFIG.value)] if CONFIG.value is not None else []
        close = difflib.get_close_matches(field, known, n=3, cutoff=0.5) or known
        raise UserError(f"the config has no field {field!r}; did you mean {', '.join(close)}?") from error
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise UserError(str(error).splitlines()[0]) from error


def _leaves(config: object, prefix: str = "") -> list[tuple[str, object]]:
    """(dotted name, value) of every field."""
    found: list[tuple[str, object]] = []
    for name, value in config.items() if hasattr(config, "items") else ():
        found += _leaves(value, f"{prefix}{name}.") or [(f"{prefix}{name}", value)]
    return found


def _parse_or_exit(argv: Sequence[str]) -> list[str]:
    rest: list[str] = []
    status = run_command(lambda argv: rest.extend(parse_flags(argv)), argv)
    return rest if status == 0 else sys.exit(status)


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(run_command(main, argv)), flags_parser=_parse_or_exit)
