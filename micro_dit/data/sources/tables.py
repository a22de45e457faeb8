"""Reads rows of CSV, TSV, JSON, JSONL and Parquet files, including strings that are not valid UTF-8.

A caption that is not valid UTF-8 must not make the whole file unreadable. Its bytes are decoded to surrogates (Python's
'surrogateescape'), and the item is rejected later.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from micro_dit.errors import UserError


def read_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table as dictionaries.

    A JSON file is read into memory. It contains a list of objects, or an object {key: value} whose values are captions
    or objects; the rows of the latter have the key as 'key', and the caption as 'caption'.

    Args:
        file: A .csv, .tsv, .jsonl, .json or .parquet file.
        columns: Columns to read from a Parquet file; all columns of other formats are read.

    Raises:
        UserError: The file is damaged, of another format, or lacks a column.
    """
    if file.suffix == ".parquet":
        return _read_parquet(file, columns)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json_lines}
    return readers.get(file.suffix, _read_json_rows)(file)


def read_json(file: Path) -> Any:
    """Reads a JSON file of annotations; raises UserError if it is missing or not valid JSON."""
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig", "surrogateescape"))
    except FileNotFoundError as error:
        raise UserError(f"The file {file} does not exist. Correct the path in --source.") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}). Correct it or download it again.") from error


def pick_column(file: Path, row: dict[str, Any], names: Sequence[str]) -> str:
    """Returns the first of `names` that is a column of the row; raises UserError if there is none."""
    for name in names:
        if name in row:
            return name
    columns = ", ".join(map(str, row))
    raise UserError(
        f"{file} has no column {' or '.join(names)}. Set the column names in --source; the columns are {columns}."
    )


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
        try:
            yield from rows
        except csv.Error as error:
            raise UserError(f"Cannot read line {rows.line_num} of {file} ({error}). Correct the line.") from error


def _read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"Line {number} of {file}"
                try:
                    yield _object(json.loads(line), where)
                except ValueError as error:
                    raise UserError(
                        f"{where} is not valid JSON ({error}). Correct it or download the file again."
                    ) from error


def _read_json_rows(file: Path) -> Iterator[dict[str, Any]]:
    content = read_json(file)
    if isinstance(content, dict):
        for key, value in content.items():
            yield {"key": key} | (value if isinstance(value, dict) else {"caption": value})
    elif isinstance(content, list):
        for number, row in enumerate(content, 1):
            yield _object(row, f"Entry {number} of {file}")
    else:
        raise UserError(f"{file} contains neither a JSON list nor a JSON object. Correct it or download it again.")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object. Correct it or download the file again.")
    return row


def _read_parquet(file: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"Reading {file} requires the package pyarrow. Run pip install pyarrow.") from error
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            for column in columns or ():
                pick_column(file, dict.fromkeys(names), [column])
            for batch in table.iter_batches(batch_size=4096, columns=list(columns or names)):
                values = [_values(column) for column in batch.columns]
                yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*values, strict=True))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Cannot read {file} ({reason}). Download or create the file again.") from error


def _values(column: Any) -> list[Any]:
    """Returns the values of an Arrow column; strings and lists of strings are decoded with 'surrogateescape'."""
    import pyarrow

    types = pyarrow.types
    if types.is_string(column.type) or types.is_large_string(column.type):
        return [_text(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]
    if types.is_list(column.type) and types.is_string(column.type.value_type):
        lists = column.cast(pyarrow.list_(pyarrow.binary())).to_pylist()
        return [None if values is None else [_text(value) for value in values] for values in lists]
    return column.to_pylist()


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")
