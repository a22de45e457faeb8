"""CLIP's byte-pair tokens, with the padding that each family of towers was trained with."""

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
    """Captions to token ids, from `vocab.json` and `merges.txt`, or from `tokenizer.json`.

    Rows are filled up with the id `padding`. OpenCLIP's is 0; Hugging Face's is that of the folder's pad token (the end
    token for Stable Diffusion 1, '!' for its later towers).
    """

    def __init__(self, folder: Path, open_clip: bool):
        """Reads the tokenizer in or beside a tower's folder.

        Raises:
            UserError: The tokenizer is missing or broken, or transformers is not installed.
        """
        try:
            from transformers.models.clip.tokenization_clip import CLIPTokenizer
        except ImportError as error:
            raise UserError(f"CLIP's tokenizer needs {error.name}: pip install transformers.") from error
        place = find_tokenizer(folder, ("vocab.json", "tokenizer.json"))
        if place is None:
            raise UserError(f"{folder} has no tokenizer: put CLIP's vocab.json and merges.txt there.")
        vocabulary, merges, self.files = _read_vocabulary(place)
        if START not in vocabulary or END not in vocabulary:
            raise UserError(f"{self.files[0]} is not CLIP's vocabulary: it has no {START} and {END}.")
        pad_token = END if open_clip else _pad_token(place)
        if pad_token not in vocabulary:
            raise UserError(f"{place}: the pad token '{pad_token}' is not in {self.files[0].name}.")
        self.padding = OPEN_CLIP_PADDING if open_clip else vocabulary[pad_token]
        self.size = max(vocabulary.values()) + 1
        self._open_clip = open_clip
        try:
            self._backend = CLIPTokenizer(vocabulary, merges, pad_token=pad_token).backend_tokenizer
        except Exception as error:  # of no better class
            raise UserError(f"{self.files[0]} and its merges don't belong together ({error}).") from error

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, start and end included, of any length; lower case, white space made one blank."""
        if self._open_clip:  # as OpenCLIP's own tokenizer, which repairs broken encodings besides
            captions = [html.unescape(html.unescape(caption)) for caption in captions]
        return [encoding.ids for encoding in self._backend.encode_batch(list(captions))]


def _read_vocabulary(place: Path) -> tuple[dict[str, int], Any, list[Path]]:
    """The vocabulary, the merges (pairs, in order of their rank), and the files that they came from."""
    if (place / "vocab.json").is_file():
        files = [place / "vocab.json", place / "merges.txt"]
        try:
            lines = files[1].read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise UserError(f"Cannot read {files[1]} ({error.strerror}): download the tokenizer again.") from error
        vocabulary, rules = read_json(files[0]), [line for line in lines if line and not line.startswith("#version")]
    else:
        files = [place / "tokenizer.json"]
        model = read_json(files[0]).get("model", {})
        vocabulary, rules = model.get("vocab", {}), model.get("merges", [])
    merges = [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in rules]
    if wrong := [rule for rule in merges if len(rule) != 2]:
        raise UserError(f"{files[-1]}: {wrong[0]} is no pair of tokens; download the tokenizer again.")
    return vocabulary, merges, files


def _pad_token(place: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (place / name).is_file() and (token := read_json(place / name).get("pad_token")):
            return token["content"] if isinstance(token, dict) else token
    return END
