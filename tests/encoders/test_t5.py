import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5TokenizerFast

from micro_dit.encoders.text import TextEncoder, load_text_encoder
from micro_dit.errors import UserError
from tests.helpers.published import rewrite, write_t5

CAPTIONS = ["a photo of the cat", "a cat", "", "the quick brown fox jumps over the lazy dog"]
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    write_t5(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(str(folder), TOKENS)


def test_matches_transformers_and_padding_is_zero(folder: Path, encoder: TextEncoder) -> None:
    assert (encoder.tokens, encoder.channels) == (TOKENS, 32)
    tokenizer = T5TokenizerFast.from_pretrained(folder)
    inputs = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    with torch.inference_mode():
        expected = T5EncoderModel.from_pretrained(folder)(**inputs).last_hidden_state.numpy()
    ours = encoder.encode(CAPTIONS)
    assert ours.dtype == np.float32
    for row, caption in enumerate(CAPTIONS):
        count = min(encoder.count_tokens([caption])[0], TOKENS)
        assert count == inputs.attention_mask[row].sum()
        valid = count if caption else 0
        assert np.abs(ours[row, :valid] - expected[row, :valid]).max(initial=0) <= 1e-4 * np.abs(expected).max()
        assert not ours[row, valid:].any()


def test_counts_tokens_and_embeddings_do_not_depend_on_the_batch(folder: Path, encoder: TextEncoder) -> None:
    assert encoder.count_tokens(["a photo of the cat", ""]) == [6, 1]
    np.testing.assert_allclose(encoder.encode(CAPTIONS)[1], encoder.encode(["a cat"])[0], atol=1e-5)
    assert encoder.encode([]).shape == (0, TOKENS, 32)
    many = encoder.encode(["a cat"] * 70)
    np.testing.assert_allclose(many[0], many[69], atol=1e-5)
    assert load_text_encoder(str(folder)).tokens == 120


def test_reads_sharded_full_models(folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors") | {"decoder.x": torch.zeros(2), "lm_head.weight": torch.zeros(2)}
    names = sorted(tensors)
    for part, chosen in ((1, names[::2]), (2, names[1::2])):
        save_file({name: tensors[name] for name in chosen}, tmp_path / f"model-0000{part}-of-00002.safetensors")
    parts = load_text_encoder(str(tmp_path), TOKENS)
    np.testing.assert_array_equal(parts.encode(CAPTIONS), encoder.encode(CAPTIONS))
    assert parts.fingerprint != encoder.fingerprint
    rounded = load_text_encoder(str(tmp_path), TOKENS, "bfloat16")
    error = rounded.encode(CAPTIONS) - encoder.encode(CAPTIONS)
    assert 1e-4 < np.sqrt((error**2).mean() / (encoder.encode(CAPTIONS) ** 2).mean()) < 0.03
    assert rounded.fingerprint == parts.fingerprint


def test_rejects_unsupported_and_inconsistent_files(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def error_message(tokens: int = TOKENS, dtype: str = "float32") -> str:
        with pytest.raises(UserError) as error:
            load_text_encoder(str(tmp_path), tokens, dtype)
        return str(error.value)

    assert "supports 2 to 512 caption tokens, not 513" in error_message(513)
    assert "Choose float32 or bfloat16" in error_message(dtype="float16")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_ff": 128}))
    assert "do not match its config.json" in error_message()
    (tmp_path / "config.json").write_text(json.dumps(config))
    rewrite(tmp_path / "model.safetensors", lambda name: name.replace("block.1", "block.7"))
    assert "is missing or not expected" in error_message()
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "is not a valid safetensors file" in error_message()
    (tmp_path / "tokenizer.json").unlink()
    assert "has no tokenizer" in error_message()
