"""Files that are written whole or not at all."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from micro_dit.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 that is seen whole or not at all, also after a power cut.

    Raises:
        UserError: the disk is full, or another failure of writing.
    """
    partial = path.with_name(f"{path.name}.partial")
    with disk_errors(path):
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a failure to write `path` into a UserError; ArrayRecord reports those as RuntimeErrors."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            message in str(error) for message in ("No space left", "quota exceeded")
        )
        if full:
            raise UserError(f"The disk is full at {path.parent}: free space there, and run again.") from error
        raise UserError(f"Cannot write {path} ({error}): correct that, and run again.") from error
