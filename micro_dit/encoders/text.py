"""Text encoders: map captions to one embedding per token.

Shapes: B captions · L caption tokens · Y caption channels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from micro_dit.encoders.clip import CONFIG_FILE, OPEN_CLIP_CONFIG_FILE, ClipText
from micro_dit.encoders.hub import read_json, resolve_folder, resolve_weights
from micro_dit.encoders.minilm import MiniLM
from micro_dit.encoders.t5 import T5Text
from micro_dit.errors import UserError


class TextEncoder(Protocol):
    """The interface of a text encoder."""

    name: str
    tokens: int  # L
    channels: int  # Y
    fingerprint: str  # encoders with equal fingerprints return equal embeddings, up to rounding

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embeds captions as (B, L, Y) float32; all positions of an empty caption are zero."""

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Counts each caption's tokens; `encode` truncates captions to `tokens`."""


# The class for each 'model_type' in transformers' config.json; 'open_clip' for folders with OpenCLIP's configuration.
TOWERS: dict[str, type[ClipText] | type[T5Text]]
TOWERS = {"open_clip": ClipText, "clip": ClipText, "clip_text_model": ClipText, "t5": T5Text}
SUBFOLDER = "text_encoder"  # folder of the text encoder in a diffusers pipeline
SMALL_FILES = (
    CONFIG_FILE, OPEN_CLIP_CONFIG_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "spiece.model",
)  # fmt: skip
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")


def load_text_encoder(
    name: str = "minilm",
    tokens: int | None = None,
    dtype: str = "float32",
    sharding: jax.sharding.Sharding | None = None,
) -> TextEncoder:
    """Loads a text encoder.

    Args:
        name: 'minilm', a folder, or 'owner/repository[/folder]' on the Hugging Face Hub. The folder contains a CLIP
            text encoder in transformers' or OpenCLIP's format, a T5 encoder, or a diffusers pipeline, whose folder
            `text_encoder` is used.
        tokens: Caption tokens L; longer captions are truncated, shorter ones padded. Default: the encoder's own.
        dtype: Dtype of matrix products, 'float32' or 'bfloat16'. MiniLM is always float32.
        sharding: How captions are split over the devices of this process. MiniLM and T5 use one device.

    Raises:
        UserError: The encoder is not found or not supported, `tokens` is out of range, or a package is missing.
    """
    if name == "minilm":
        return MiniLM(MiniLM.default_tokens if tokens is None else tokens)
    if "/" not in name and not Path(name).is_dir():
        raise UserError(
            f"Unknown text encoder '{name}'. Pass minilm, a folder, or owner/repository on the Hugging Face Hub."
        )
    places = ("", f"{SUBFOLDER}/", "tokenizer/", "../tokenizer*/")
    folder = resolve_folder(name, [place + file for place in places for file in SMALL_FILES])
    known_as = folder.resolve().name if Path(name).is_dir() else name  # folders in the Hub's cache are named by commit
    kind = _kind(folder)
    if kind is None and (folder / SUBFOLDER).is_dir():
        name, folder = f"{name.rstrip('/')}/{SUBFOLDER}", folder / SUBFOLDER
        kind = _kind(folder)
    if kind not in TOWERS:
        found = f"is of type '{kind}'" if kind else f"has neither {CONFIG_FILE} nor {OPEN_CLIP_CONFIG_FILE}"
        raise UserError(f"'{name}' {found}. Pass a text encoder of one of the types {', '.join(TOWERS)}.")
    patterns = OPEN_CLIP_WEIGHTS + WEIGHTS if kind == "open_clip" else WEIGHTS + OPEN_CLIP_WEIGHTS
    tower = TOWERS[kind]
    weights = resolve_weights(name, patterns)
    return tower(folder, weights, known_as, tower.default_tokens if tokens is None else tokens, dtype, sharding)


def _kind(folder: Path) -> str | None:
    """Returns the type of a folder's text encoder, as in TOWERS, or None if there is no configuration."""
    if (folder / OPEN_CLIP_CONFIG_FILE).is_file():
        return "open_clip"
    if (folder / CONFIG_FILE).is_file():
        return str(read_json(folder / CONFIG_FILE).get("model_type", "unknown model"))
    return None
