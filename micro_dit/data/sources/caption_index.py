"""Looks up captions by image in an SQLite file, for data sets that store captions separately from the images.

Ten million long captions need gigabytes, which is too much to keep in memory in every process that reads images. The
file is written once, in a few minutes for ten million captions. A lookup then takes less than a millisecond.
"""

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from micro_dit.data.sources import escape
from micro_dit.errors import UserError
from micro_dit.files import replacing


class CaptionIndex:
    """An index of captions by key, with one or more captions per key. Stores only the path of the file."""

    def __init__(self, file: Path):
        self.file = file

    @classmethod
    def beside(cls, captions: Path, file: str = "") -> "CaptionIndex":
        """Returns the index of a file or folder of captions, stored beside it or, if given, in `file`."""
        captions = captions.absolute()
        return cls(Path(file).expanduser() if file else captions.with_name(f"{captions.name}.index.sqlite"))

    def ensure(self, inputs: Iterable[Path], settings: str, rows: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Writes the index, unless it was already written from the same inputs and settings.

        Args:
            inputs: Input files, compared by size and modification time.
            settings: Description of the settings that affect the rows, such as column names.
            rows: Returns the (key, caption) pairs.

        Raises:
            UserError: The file cannot be written.
        """
        stats = [(path.name, path.stat()) for path in inputs]
        origin = settings + "".join(f"\n{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
        if self.file.exists() and self._origin() == origin:
            return
        try:
            with replacing(self.file) as temporary, closing(sqlite3.connect(temporary)) as database:
                database.execute("PRAGMA journal_mode = OFF")
                database.execute("CREATE TABLE captions (key TEXT, caption BLOB)")
                database.execute("CREATE TABLE origin (text TEXT)")
                # Stored as bytes, because SQLite rejects text with surrogates, which represent invalid UTF-8.
                encoded = ((escape(key), caption.encode("utf-8", "surrogatepass")) for key, caption in rows())
                database.executemany("INSERT INTO captions VALUES (?, ?)", encoded)
                database.execute("INSERT INTO origin VALUES (?)", (origin,))
                database.execute("CREATE INDEX by_key ON captions (key)")  # faster than inserting into an index
                database.commit()
        except (sqlite3.OperationalError, OSError) as error:
            raise UserError(
                f"Cannot write the caption index {self.file} ({error}). Set another path with the option index=... in "
                "--source."
            ) from error

    def captions(self, key: str) -> list[str]:
        """Returns the captions of a key, in the order of the data; invalid UTF-8 is decoded to surrogates."""
        found = self._query("SELECT caption FROM captions WHERE key = ? ORDER BY rowid", key)
        return [caption.decode("utf-8", "surrogatepass") for (caption,) in found]

    def keys(self, prefix: str) -> list[str]:
        """Returns the sorted keys that start with a prefix."""
        after = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        found = self._query("SELECT DISTINCT key FROM captions WHERE key >= ? AND key < ? ORDER BY key", prefix, after)
        return [key for (key,) in found]

    def _origin(self) -> str | None:
        try:
            return self._query("SELECT text FROM origin")[0][0]
        except (sqlite3.DatabaseError, IndexError):
            return None  # damaged or another file, which `ensure` replaces

    def _query(self, question: str, *values: str) -> list[tuple]:
        # `immutable` avoids file locks, which are unreliable on network file systems.
        with closing(sqlite3.connect(f"{self.file.absolute().as_uri()}?immutable=1", uri=True)) as database:
            return database.execute(question, values).fetchall()
