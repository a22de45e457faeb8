"""Files that are written whole or not at all, and text tables."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
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


def text_table(rows: Sequence[Sequence[str]], *, left: int = 1, rule: bool = True, total: bool = False) -> str:
    """Returns rows of cells as lines of text in aligned columns.

    Args:
        rows: The cells; the first row is the head.
        left: Number of columns that are aligned to the left; the others are aligned to the right.
        rule: Whether there is a rule under the head.
        total: Whether there is a rule over the last row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows
    ]
    line = "─" * len(lines[0])
    if total:
        lines.insert(-1, line)
    if rule:
        lines.insert(1, line)
    return "\n".join(lines)
