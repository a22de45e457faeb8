"""What every command line of the package does around its work."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import logging

from micro_dit.errors import UserError


def run_command(command: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Runs a command; a UserError is printed as one line, without a traceback. Returns the exit status.

    Libraries log only warnings, and compiled programs are kept between runs (in JAX_COMPILATION_CACHE_DIR if that is
    set, else in the user's cache folder).
    """
    logging.set_verbosity(logging.WARNING)
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
