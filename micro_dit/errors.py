"""Errors that a user is meant to read."""

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Something the user can put right: one sentence that says what is wrong, where, and what to do."""


def run_command(command: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Runs a command line; a UserError is printed as one line, without a traceback. Returns the exit status."""
    try:
        command(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
