"""T5 v1.1 encoders (Raffel et al. 2020, arXiv 1910.10683), run in PyTorch on a GPU if available, else on the CPU.

Shapes: B captions · L caption tokens · Y caption channels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.encoders.devices import DTYPES
from micro_dit.encoders.tokens import cut_tokens, find_tokenizer, pad_tokens
from micro_dit.encoders.weights import fingerprint_files
from micro_dit.errors import UserError

CAPTIONS_AT_ONCE = 64
PADDING = 0  # id of T5's padding token
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


class T5Text:
    """A T5 encoder with its tokenizer; implements `TextEncoder`. Padding is masked out in the attention."""

    default_tokens = 120
    longest = 512  # sequence length of T5's training

    def __init__(
        self,
        folder: Path,
        weights: Sequence[Path],
        name: str,
        tokens: int,
        dtype: str = "float32",
        sharding: jax.sharding.Sharding | None = None,
    ):
        """Loads an encoder in Hugging Face's format.

        Args:
            folder: Folder with the configuration; the tokenizer is in it or next to it.
            weights: The safetensors files; a decoder in them is ignored.
            name: Name recorded in shards.
            tokens: Caption tokens L, including the end token.
            dtype: Dtype of matrix products, 'float32' or 'bfloat16'.
            sharding: Ignored, since PyTorch runs on one device.

        Raises:
            UserError: A file is missing or corrupt, or `tokens` is out of range.
        """
        if not 2 <= tokens <= self.longest:
            raise UserError(
                f"The text encoder '{name}' supports 2 to {self.longest} caption tokens, not {tokens}. Choose a number "
                "in this range."
            )
        if dtype not in DTYPES:
            raise UserError(f"Encoders do not support dtype '{dtype}'. Choose {' or '.join(DTYPES)}.")
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError as error:
            raise UserError(f"T5 requires the package {error.name}. Run `pip install torch transformers`.") from error
        place = find_tokenizer(folder, TOKENIZER_FILES)
        if place is None:
            raise UserError(f"{folder} has no tokenizer. Copy T5's spiece.model or tokenizer.json into it.")
        self._tokenizer = _load_tokenizer(place)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = _load_model(folder, weights, getattr(torch, dtype)).to(self._device)
        self.name, self.tokens, self.channels = name, tokens, self._model.config.d_model
        files = [folder / "config.json", *weights, *(place / file for file in TOKENIZER_FILES)]
        self.fingerprint = fingerprint_files([file for file in files if file.is_file()], f"tokens={tokens}")

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embeds captions as (B, L, Y) float32; padding positions, and all positions of an empty caption, are zero.

        Longer captions keep their first L-1 tokens and the end token.
        """
        torch = self._torch
        embeddings = np.zeros((len(captions), self.tokens, self.channels), np.float32)
        for start in range(0, len(captions), CAPTIONS_AT_ONCE):
            batch = captions[start : start + CAPTIONS_AT_ONCE]
            rows = [cut_tokens(ids, self.tokens) for ids in self._token_ids(batch)]
            lengths = np.array([len(ids) for ids in rows])
            ids = pad_tokens(rows, lengths.max(), PADDING)
            valid = np.arange(lengths.max()) < lengths[:, None]  # (B, lengths.max())
            with torch.inference_mode():
                states = self._model(
                    input_ids=torch.from_numpy(ids).to(self._device, torch.long),
                    attention_mask=torch.from_numpy(valid).to(self._device, torch.long),
                ).last_hidden_state.float()
            nonempty = np.array([bool(caption.strip()) for caption in batch])
            embeddings[start : start + len(batch), : lengths.max()] = np.where(
                (valid & nonempty[:, None])[..., None], states.cpu().numpy(), 0
            )
        return embeddings

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Counts each caption's tokens, including the end; `encode` truncates captions to `tokens`."""
        return [len(ids) for ids in self._token_ids(captions)]

    def _token_ids(self, captions: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(captions))]


def _load_tokenizer(place: Path) -> Any:
    """Loads a folder's tokenizer, with truncation and padding disabled."""
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    try:
        tokenizer = T5Tokenizer.from_pretrained(place, local_files_only=True).backend_tokenizer
    except (ImportError, ValueError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(
            f"Cannot read T5's tokenizer in {place} ({reason}). If it is a spiece.model, run `pip install "
            "sentencepiece`; otherwise download the tokenizer again."
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _load_model(folder: Path, weights: Sequence[Path], dtype: Any) -> Any:
    """Loads a T5EncoderModel; not with from_pretrained, which could print, access the network or load pickles."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    tensors = {}
    for file in weights:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dictionary
                    if name.startswith(("shared.", "encoder.")):
                        tensors[name] = opened.get_tensor(name).to(dtype)
        except SafetensorError as error:
            raise UserError(f"{file} is not a valid safetensors file ({error}). Download it again.") from error
    tables = [tensors[name] for name in ("shared.weight", "encoder.embed_tokens.weight") if name in tensors]
    if tables:  # the same table has two names, and a file may contain only one of them
        tensors["shared.weight"] = tensors["encoder.embed_tokens.weight"] = tables[0]
    with torch.device("meta"):  # allocates no memory, since the loaded weights are assigned below
        model = T5EncoderModel(T5Config.from_json_file(folder / "config.json"))
    try:
        loaded = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # a tensor has a different shape
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"The weights in {folder} do not match its config.json ({reason}). Download the encoder again."
        ) from error
    if wrong := [*loaded.missing_keys, *loaded.unexpected_keys]:
        raise UserError(
            f"The weights in {folder} do not match its config.json: {wrong[0]} is missing or not expected. Download "
            "the encoder again."
        )
    return model.eval()
