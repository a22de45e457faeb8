"""Captions by image, for sets that keep them apart from the images: millions of rows, in an SQLite file.

Ten million captions of a paragraph each are gigabytes, too many to hold in every process that reads images. The file is
written once (a few minutes for ten million); any number of processes then find a caption in under a millisecond.
"""

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from micro_dit.data.sources import escape
from micro_dit.errors import UserError
from micro_dit.files import replacing


class CaptionIndex:
    """Captions by key; an image may have several. Holds nothing but the path of the file."""

    def __init__(self, file: Path):
        self.file = file

    @classmethod
    def beside(cls, captions: Path, file: str = "") -> "CaptionIndex":
        """The index of a file or folder of captions: beside it, or in a file that the user prefers."""
        captions = captions.absolute()
        return cls(Path(file).expanduser() if file else captions.with_name(f"{captions.name}.index.sqlite"))

    def ensure(self, inputs: Iterable[Path], settings: str, rows: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Writes the (key, caption) pairs of `rows`, unless the file was written from the same inputs and settings.

        Inputs count as the same while their size and time do; settings are names of columns and the like.

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
                # As bytes: SQLite refuses text with surrogates, which stand for what is not UTF-8 in the data.
                encoded = ((escape(key), caption.encode("utf-8", "surrogatepass")) for key, caption in rows())
                database.executemany("INSERT INTO captions VALUES (?, ?)", encoded)
                database.execute("INSERT INTO origin VALUES (?)", (origin,))
                database.execute("CREATE INDEX by_key ON captions (key)")  # sorts once, which beats sorted insertion
                database.commit()
        except (sqlite3.OperationalError, OSError) as error:
            raise UserError(f"{self.file} cannot be written ({error}): give another place by index=...") from error

    def captions(self, key: str) -> list[str]:
        """Returns the captions of a key, in the order of the data; what is not UTF-8 in them is surrogates."""
        found = self._query("SELECT caption FROM captions WHERE key = ? ORDER BY rowid", key)
        return [caption.decode("utf-8", "surrogatepass") for (caption,) in found]

    def keys(self, prefix: str) -> list[str]:
        """Returns the keys that begin with a prefix, sorted."""
        after = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        found = self._query("SELECT DISTINCT key FROM captions WHERE key >= ? AND key < ? ORDER BY key", prefix, after)
        return [key for (key,) in found]

    def _origin(self) -> str | None:
        try:
            return self._query("SELECT text FROM origin")[0][0]
        except (sqlite3.DatabaseError, IndexError):
            return None  # not ours, or damaged: made anew

    def _query(self, question: str, *values: str) -> list[tuple]:
        # Immutable: no locks, which network file systems do badly.
        with closing(sqlite3.connect(f"{self.file.absolute().as_uri()}?immutable=1", uri=True)) as database:
            return database.execute(question, values).fetchall()
