"""CLIP's byte-pair tokenizer, with the padding that each family of text encoders was trained with."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from micro_dit.encoders.hub import read_json
from micro_dit.encoders.tokens import find_tokenizer
from micro_dit.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP_PADDING = 0


class ClipTokenizer:
    """Converts captions to token ids, using `vocab.json` and `merges.txt`, or `tokenizer.json`.

    `padding` is the id of padding tokens. It is 0 for OpenCLIP and the id of the folder's pad token for Hugging Face
    (the end token for Stable Diffusion 1, '!' for later text encoders).
    """

    def __init__(self, folder: Path, open_clip: bool):
        """Reads the tokenizer in or next to an encoder's folder.

        Raises:
            UserError: The tokenizer is missing or corrupt, or transformers is not installed.
        """
        try:
            from transformers.models.clip.tokenization_clip import CLIPTokenizer
        except ImportError as error:
            raise UserError(
                f"CLIP's tokenizer requires the package {error.name}. Run `pip install transformers`."
            ) from error
        place = find_tokenizer(folder, ("vocab.json", "tokenizer.json"))
        if place is None:
            raise UserError(f"{folder} has no tokenizer. Copy CLIP's vocab.json and merges.txt into it.")
        vocabulary, merges, self.files = _read_vocabulary(place)
        if START not in vocabulary or END not in vocabulary:
            raise UserError(
                f"{self.files[0]} is not a CLIP vocabulary: it lacks {START} or {END}. Download the tokenizer again."
            )
        pad_token = END if open_clip else _pad_token(place)
        if pad_token not in vocabulary:
            raise UserError(
                f"{place}: the pad token '{pad_token}' is not in {self.files[0].name}. Download the tokenizer again."
            )
        self.padding = OPEN_CLIP_PADDING if open_clip else vocabulary[pad_token]
        self.size = max(vocabulary.values()) + 1
        self._open_clip = open_clip
        try:
            self._backend = CLIPTokenizer(vocabulary, merges, pad_token=pad_token).backend_tokenizer
        except Exception as error:  # tokenizers raises plain Exceptions
            raise UserError(
                f"{self.files[0]} does not match its merges ({error}). Download the tokenizer again."
            ) from error

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns each caption's token ids, including start and end, without truncation.

        Captions are converted to lower case, and runs of white space to one space.
        """
        if self._open_clip:  # as in OpenCLIP's tokenizer, which also repairs broken encodings (not done here)
            captions = [html.unescape(html.unescape(caption)) for caption in captions]
        return [encoding.ids for encoding in self._backend.encode_batch(list(captions))]


def _read_vocabulary(place: Path) -> tuple[dict[str, int], Any, list[Path]]:
    """Returns the vocabulary, the merges (pairs in order of rank), and the files that hold them."""
    if (place / "vocab.json").is_file():
        files = [place / "vocab.json", place / "merges.txt"]
        try:
            lines = files[1].read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise UserError(f"Cannot read {files[1]} ({error.strerror}). Download the tokenizer again.") from error
        vocabulary, rules = read_json(files[0]), [line for line in lines if line and not line.startswith("#version")]
    else:
        files = [place / "tokenizer.json"]
        model = read_json(files[0]).get("model", {})
        vocabulary, rules = model.get("vocab", {}), model.get("merges", [])
    merges = [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in rules]
    if wrong := [rule for rule in merges if len(rule) != 2]:
        raise UserError(f"{files[-1]}: {wrong[0]} is not a pair of tokens. Download the tokenizer again.")
    return vocabulary, merges, files


def _pad_token(place: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (place / name).is_file() and (token := read_json(place / name).get("pad_token")):
            return token["content"] if isinstance(token, dict) else token
    return END
