"""Trains a model: `python -m micro_dit.main --config=configs/mask75.py [--workdir=…] [--config.FIELD=VALUE …]`."""

import difflib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from micro_dit.command import run_command
from micro_dit.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/mask75.py or configs/mask75.py:xl.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: runs/<name of the config>.")


def main(argv: Sequence[str]) -> None:
    """Sets up the process and trains."""
    from micro_dit.train import train

    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; config fields are set by --config.FIELD=VALUE.")
    if CONFIG.value is None:
        raise UserError("no config given; try --config=configs/mask75.py.")
    train(CONFIG.value, WORKDIR.value or Path("runs") / CONFIG.value.name)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parsing, with one clear line for a config file, variant or field that does not exist."""
    given = [argument.removeprefix("--") for argument in argv[1:]]
    path = next((argument.partition("=")[2] for argument in given if argument.startswith("config=")), "")
    file = path.partition(":")[0]
    if path and not Path(file).exists():
        raise UserError(f"there is no config file {file}; see the folder configs/ for those there are.")
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raised = [line.partition(": ")[2] for line in lines if re.match(r"\w*Error: ", line)]
        raise UserError(raised[-1] if raised else lines[0]) from error
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        fields = [argument.partition("=")[0].removeprefix("config.") for argument in given if "config." in argument]
        known = _leaves(_load(path))
        for field in fields:
            if field not in known:
                close = difflib.get_close_matches(field, known, n=3, cutoff=0.5) or known
                raise UserError(f"the config has no field {field!r}; did you mean {', '.join(close)}?") from error
        raise UserError(f"a config field has a value of the wrong type: {error}") from error


def _load(path: str) -> Any:
    """The config of a `file.py:variant`, without overrides."""
    file, _, variant = path.partition(":")
    spec = importlib.util.spec_from_file_location("config", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def _leaves(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of every field that can be set."""
    if hasattr(config, "items"):
        nested = [(f"{prefix}.{name}" if prefix else name, value) for name, value in config.items()]
    elif isinstance(config, tuple | list):
        nested = [(f"{prefix}[{index}]", value) for index, value in enumerate(config)]
    else:
        return [prefix]
    return [*([prefix] if prefix else []), *(leaf for name, value in nested for leaf in _leaves(value, name))]


def _parse_or_exit(argv: Sequence[str]) -> list[str]:
    rest: list[str] = []
    status = run_command(lambda argv: rest.extend(parse_flags(argv)), argv)
    return rest if status == 0 else sys.exit(status)


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(run_command(main, argv)), flags_parser=_parse_or_exit)
