"""What every command line of the package does around its work."""

import difflib
import errno
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

from micro_dit.errors import UserError

# Config fields of earlier versions, and why they were removed.
REMOVED_FIELDS = {"quantize": "8-bit products showed no gain, see docs/lab_notes.md"}


def run_command(command: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Runs a command; a UserError is printed as one line, without a traceback. Returns the exit status.

    Libraries log only errors, and compiled programs are kept between runs (in JAX_COMPILATION_CACHE_DIR if that is
    set, else in the user's cache folder).
    """
    logging.set_verbosity(logging.ERROR)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "micro_dit" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    try:
        command(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: no space left on the disk of {error.filename}; make room and run it again.", file=sys.stderr)
        return 1
    return 0


def parse_or_exit(argv: Sequence[str]) -> list[str]:
    """absl's `flags_parser` for commands that take --config: a wrong flag is one line, and the exit status 1."""
    rest: list[str] = []
    status = run_command(lambda argv: rest.extend(_parse_flags(argv)), argv)
    return rest if status == 0 else sys.exit(status)


def _parse_flags(argv: Sequence[str]) -> list[str]:
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
        known = _leaves(load_config(path))
        for field in fields:
            if field in REMOVED_FIELDS:
                raise removed_field(field) from error
            if field not in known:
                close = difflib.get_close_matches(field, known, n=3, cutoff=0.5) or known
                raise UserError(f"the config has no field {field!r}; did you mean {', '.join(close)}?") from error
        raise UserError(f"a config field has a value of the wrong type: {error}") from error


def removed_field(name: str) -> UserError:
    """Returns the error for a config or an override that sets one of REMOVED_FIELDS."""
    return UserError(f"the config field `{name}` was removed ({REMOVED_FIELDS[name]}); drop --config.{name}.")


def load_config(path: str) -> Any:
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
