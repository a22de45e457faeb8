"""Rows of token ids: cut to a length, filled up to it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def cut_tokens(ids: Sequence[int], length: int) -> list[int]:
    """Shortens token ids to at most `length`, keeping the last one, which ends the caption."""
    return list(ids) if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def pad_tokens(rows: Sequence[Sequence[int]], length: int, padding: int) -> np.ndarray:
    """Stacks rows of at most `length` token ids as (B, length) int32, filled up with `padding`."""
    ids = np.full((len(rows), length), padding, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids


def find_tokenizer(folder: Path, files: Sequence[str]) -> Path | None:
    """The folder that holds any of a tokenizer's files: the encoder's own, `tokenizer` in it, or the one beside it.

    Pipelines have `tokenizer` beside `text_encoder`, and `tokenizer_2` beside `text_encoder_2`.
    """
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for place in (folder, folder / "tokenizer", beside):
        if any((place / file).is_file() for file in files):
            return place
    return None
