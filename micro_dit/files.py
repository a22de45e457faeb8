"""Atomic file writes, content hashes, flat dictionaries and text tables."""

import contextlib
import errno
import hashlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from micro_dit.errors import UserError


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically (text in UTF-8) and syncs it to disk; raises UserError if that fails."""
    with disk_errors(Path(path)), replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` when the block succeeds and is removed when it fails.

    Creates the folder if it does not exist. Each process has its own temporary path, so that several processes can
    write the same file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Converts errors of writing `path`, which ArrayRecord raises as RuntimeError, into UserErrors."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or any(message in str(error) for message in ("No space left", "quota exceeded")):
            raise UserError(
                f"The disk is full at {path.parent}. Free some space and run the same command again."
            ) from error
        raise UserError(f"Cannot write {path} ({error}). Fix this and run the same command again.") from error


def hash_file(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_text(text: str) -> str:
    """Returns the SHA-256 of a UTF-8 encoded string as a hexadecimal string."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_arrays(arrays: Iterable[tuple[str, Any]], about: str = "") -> str:
    """Returns the SHA-256 of `about` and of the names and bytes of arrays, in order, as a hexadecimal string."""
    digest = hashlib.sha256(about.encode())
    for name, array in arrays:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_to_unit(text: str) -> float:
    """Returns a hash of a string as a number that is uniform in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings and lists of mappings as a flat dictionary with keys such as 'phases[0].steps'."""
    if isinstance(tree, Mapping):
        items = [(f"{prefix}.{name}" if prefix else name, value) for name, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, Mapping) for value in tree):
        items = [(f"{prefix}[{index}]", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {name: value for key, item in items for name, value in flatten(item, key).items()}


def text_table(rows: Sequence[Sequence[str]], *, left: int = 1, rule: bool = True, total: bool = False) -> str:
    """Returns a table with aligned columns.

    Args:
        rows: Rows of cells; the first row is the header.
        left: Number of left-aligned columns; the others are right-aligned.
        rule: Whether to draw a line below the header.
        total: Whether to draw a line above the last row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    line = "─" * len(lines[0])
    if total:
        lines.insert(-1, line)
    if rule:
        lines.insert(1, line)
    return "\n".join(lines)
