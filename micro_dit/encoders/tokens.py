"""Truncation and padding of token ids, and the location of tokenizer files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def cut_tokens(ids: Sequence[int], length: int) -> list[int]:
    """Truncates token ids to at most `length`, keeping the last one, which is the end token."""
    return list(ids) if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def pad_tokens(rows: Sequence[Sequence[int]], length: int, padding: int) -> np.ndarray:
    """Stacks rows of at most `length` token ids as (B, length) int32, padded on the right with `padding`."""
    ids = np.full((len(rows), length), padding, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids


def find_tokenizer(folder: Path, files: Sequence[str]) -> Path | None:
    """Returns the folder that contains any of a tokenizer's files, or None.

    This is the encoder's folder, `tokenizer` inside it, or, as in diffusers' pipelines, `tokenizer` next to
    `text_encoder` and `tokenizer_2` next to `text_encoder_2`.
    """
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for place in (folder, folder / "tokenizer", beside):
        if any((place / file).is_file() for file in files):
            return place
    return None
