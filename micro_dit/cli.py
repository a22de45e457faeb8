"""Runs the package's commands: flags, config files, one-line errors and exit statuses."""

import difflib
import errno
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from micro_dit.errors import REMOVED_FIELDS, UserError, removed_field


def run_command(
    main: Callable[..., object], define_flags: Callable[[], None] | None = None, *, takes_config: bool = False,
    takes_arguments: bool = False,
) -> None:  # fmt: skip
    """Runs a command from its flags to its exit status.

    Args:
        main: The command, called without arguments.
        define_flags: Defines the flags of the command.
        takes_config: Whether there is a flag --config, whose fields can be overridden.
        takes_arguments: Whether `main` is called with `sys.argv` without the flags.
    """

    def command(argv: Sequence[str]) -> None:
        if takes_arguments:
            main(argv)
            return
        if len(argv) > 1:
            hint = "config fields are set by --config.FIELD=VALUE; " if takes_config else ""
            raise UserError(f"unknown argument {argv[1]!r}; {hint}see --help.")
        main()

    if define_flags:
        define_flags()
    options: dict[str, Any] = {"flags_parser": parse_or_exit} if takes_config else {}
    app.run(lambda argv: sys.exit(exit_status(command, argv)), **options)


def exit_status(command: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Runs a command, prints a UserError as one line without a traceback, and returns the exit status.

    Libraries log only errors. Compiled programs are kept between runs, in JAX_COMPILATION_CACHE_DIR if that is set,
    else in the user's cache folder.
    """
    import jax  # not at the top: worker processes that import a command do without it

    logging.set_verbosity(logging.ERROR)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "micro_dit" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    try:
        command(argv)
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"no space left on the disk of {error.filename}; make room and run it again."
    print(f"error: {message}", file=sys.stderr)
    return 1


def define_distributed_flags() -> None:
    """Defines the flags of a command that can run as several processes."""
    flags.DEFINE_string("coordinator", None, "With several processes: host:port where process 0 is reached.")
    flags.DEFINE_integer("process_index", None, "With --coordinator: number of this process, from 0.")
    flags.DEFINE_integer("process_count", None, "With --coordinator: how many processes there are.")
    flags.DEFINE_bool(
        "cluster", False, "Ask the cluster for coordinator and processes: for TPU VMs. SLURM, GKE and MPI need no flag."
    )
    flags.DEFINE_integer("timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)


def distributed_options() -> dict[str, Any]:
    """Returns the arguments of `parallel.distributed.start` that these flags give."""
    names = ("coordinator", "process_index", "process_count", "cluster")
    return {name: getattr(flags.FLAGS, name) for name in names} | {"timeout_seconds": flags.FLAGS.timeout}


def parse_or_exit(argv: Sequence[str]) -> list[str]:
    """Parses the flags of a command with --config, and ends the process with one line and status 1 if one is wrong."""
    rest: list[str] = []
    status = exit_status(lambda argv: rest.extend(_parse_flags(argv)), argv)
    return rest if status == 0 else sys.exit(status)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; raises UserError for a config file, variant or field that does not exist."""
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
        known = _fields(load_config(path))
        for field in fields:
            if field in REMOVED_FIELDS:
                raise removed_field(field) from error
            if field not in known:
                close = difflib.get_close_matches(field, known, n=3, cutoff=0.5) or known
                raise UserError(f"the config has no field {field!r}; did you mean {', '.join(close)}?") from error
        raise UserError(f"a config field has a value of the wrong type: {error}") from error


def load_config(path: str) -> Any:
    """Returns the config of a `file.py:variant`, without overrides."""
    file, _, variant = path.partition(":")
    get_config = runpy.run_path(file, run_name="config")["get_config"]
    return get_config(variant) if variant else get_config()


def _fields(config: Any, prefix: str = "") -> list[str]:
    """Returns the dotted names of all fields that can be set."""
    nested: list[tuple[str, Any]] = []
    if hasattr(config, "items"):
        nested = [(f"{prefix}.{name}".removeprefix("."), value) for name, value in config.items()]
    elif isinstance(config, tuple | list):
        nested = [(f"{prefix}[{index}]", value) for index, value in enumerate(config)]
    return [*filter(None, [prefix]), *(field for name, value in nested for field in _fields(value, name))]


def parse_interval(text: str) -> tuple[float, float] | None:
    """Parses 'low,high' as two noise levels, and an empty text as None; raises UserError for another text."""
    if not text:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise UserError(f"--guidance_interval={text}: give two noise levels, as in 0.3,5.") from error
    return low, high


def read_prompts(path: str | Path) -> list[str]:
    """Reads a text file with a prompt per line; raises UserError if it can't be read or has no prompt."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"the prompts file {path} can't be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompts file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"the prompts file {path} is empty: write a prompt on each line.")
    return prompts
