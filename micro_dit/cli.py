"""Runs the package's commands: parses flags and config files, prints one-line errors and sets exit statuses."""

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
    """Parses the flags, runs a command and exits with its status.

    Args:
        main: The command, called without arguments.
        define_flags: Defines the command's flags.
        takes_config: Whether the command has a --config flag, whose fields can be overridden.
        takes_arguments: Whether `main` is called with the positional arguments, `sys.argv` without the flags.
    """

    def command(argv: Sequence[str]) -> None:
        if takes_arguments:
            main(argv)
            return
        if len(argv) > 1:
            hint = "Set config fields with --config.FIELD=VALUE. " if takes_config else ""
            raise UserError(f"Unknown argument {argv[1]!r}. {hint}Run the command with --help to list its flags.")
        main()

    if define_flags:
        define_flags()
    options: dict[str, Any] = {"flags_parser": parse_or_exit} if takes_config else {}
    app.run(lambda argv: sys.exit(exit_status(command, argv)), **options)


def exit_status(command: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Runs a command, prints a UserError as one line without a traceback, and returns the exit status.

    The log level of libraries is set to ERROR. JAX's persistent compilation cache is enabled, in
    JAX_COMPILATION_CACHE_DIR if that is set, otherwise in the user's cache folder.
    """
    import jax  # imported here because worker processes that import a command do not need JAX

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
        message = f"No space is left on the disk of {error.filename}. Free some space and run the same command again."
    print(f"error: {message}", file=sys.stderr)
    return 1


def define_distributed_flags() -> None:
    """Defines the flags of a command that can run as several processes."""
    flags.DEFINE_string("coordinator", None, "Address of process 0 as host:port, for runs with several processes.")
    flags.DEFINE_integer("process_index", None, "Index of this process, starting at 0. Requires --coordinator.")
    flags.DEFINE_integer("process_count", None, "Number of processes. Requires --coordinator.")
    flags.DEFINE_bool(
        "cluster", False, "Detect the other processes from the cluster environment. Required on TPU VMs, but not for "
        "SLURM, GKE and MPI.",
    )  # fmt: skip
    flags.DEFINE_integer("timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)


def distributed_options() -> dict[str, Any]:
    """Returns the arguments for `parallel.distributed.start` from the flags."""
    names = ("coordinator", "process_index", "process_count", "cluster")
    return {name: getattr(flags.FLAGS, name) for name in names} | {"timeout_seconds": flags.FLAGS.timeout}


def parse_or_exit(argv: Sequence[str]) -> list[str]:
    """Parses the flags of a command with --config; on an error, prints one line and exits with status 1."""
    rest: list[str] = []
    status = exit_status(lambda argv: rest.extend(_parse_flags(argv)), argv)
    return rest if status == 0 else sys.exit(status)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags; raises UserError for a config file, variant or field that does not exist."""
    given = [argument.removeprefix("--") for argument in argv[1:]]
    path = next((argument.partition("=")[2] for argument in given if argument.startswith("config=")), "")
    file = path.partition(":")[0]
    if path and not Path(file).exists():
        raise UserError(f"Config file {file} does not exist. The folder configs/ holds the available configs.")
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
                raise UserError(f"Config has no field {field!r}. Did you mean {', '.join(close)}?") from error
        raise UserError(f"A config field has a value of the wrong type: {error}") from error


def load_config(path: str) -> Any:
    """Returns the config named by `file.py:variant`, without overrides."""
    file, _, variant = path.partition(":")
    get_config = runpy.run_path(file, run_name="config")["get_config"]
    return get_config(variant) if variant else get_config()


def _fields(config: Any, prefix: str = "") -> list[str]:
    """Returns the dotted names of all config fields that can be overridden."""
    nested: list[tuple[str, Any]] = []
    if hasattr(config, "items"):
        nested = [(f"{prefix}.{name}".removeprefix("."), value) for name, value in config.items()]
    elif isinstance(config, tuple | list):
        nested = [(f"{prefix}[{index}]", value) for index, value in enumerate(config)]
    return [*filter(None, [prefix]), *(field for name, value in nested for field in _fields(value, name))]


def parse_interval(text: str) -> tuple[float, float] | None:
    """Parses 'low,high' as two noise levels and an empty string as None; raises UserError for anything else."""
    if not text:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise UserError(
            f"--guidance_interval={text} is invalid. Set it to two noise levels, for example --guidance_interval=0.3,5."
        ) from error
    return low, high


def read_prompts(path: str | Path) -> list[str]:
    """Reads prompts from a text file, one per line; raises UserError if it cannot be read or has no prompts."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"The prompts file {path} can't be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"The prompts file {path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"The prompts file {path} is empty. Write one prompt per line.")
    return prompts
