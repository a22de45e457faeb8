import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from micro_dit.encoders.clip_tokenizer import ClipTokenizer
from micro_dit.encoders.text import load_text_encoder
from micro_dit.errors import UserError
from tests.helpers.published import CLIP_SIZES, open_clip_tensors, rewrite, write_clip, write_open_clip

CAPTIONS = ["A photo of  the cat", "a cat! 🐈 &amp; the DOG's 123 photos", "the cat of the cat of the cat of the cat"]
TOKENS = 20


def assert_close(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.shape == tuple(theirs.shape)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs.numpy()).max() <= 1e-4 * theirs.abs().max()


def transformers_ids(folder: Path, tokens: int = TOKENS) -> torch.Tensor:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt").input_ids


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("pad_token", [None, "!", {"__type": "AddedToken", "content": "!", "special": True}])
def test_matches_transformers(activation: str, pad_token: Any, tmp_path: Path) -> None:
    model = write_clip(tmp_path, pad_token=pad_token, hidden_act=activation)
    encoder = load_text_encoder(str(tmp_path), TOKENS)
    assert (encoder.name, encoder.tokens, encoder.channels) == (tmp_path.name, TOKENS, CLIP_SIZES["hidden_size"])
    ids = transformers_ids(tmp_path)
    assert (ids[0] == (0 if pad_token else ids.max())).sum() > 5
    assert_close(encoder.encode(CAPTIONS), model(ids).last_hidden_state)
    assert_close(load_text_encoder(str(tmp_path), 7).encode(CAPTIONS), model(transformers_ids(tmp_path, 7))[0])


def test_loads_the_text_encoder_of_full_and_projected_models(tmp_path: Path) -> None:
    reference = write_clip(tmp_path / "tower")
    text = CLIPTextConfig(**reference.config.to_dict())
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    ).to_dict()))  # fmt: skip
    whole.text_model.load_state_dict(reference.state_dict())
    shutil.copytree(tmp_path / "tower", tmp_path / "whole")
    whole.save_pretrained(tmp_path / "whole")
    projected = CLIPTextModelWithProjection(text)
    projected.text_model.load_state_dict(reference.state_dict())
    shutil.copytree(tmp_path / "tower", tmp_path / "projected")
    projected.save_pretrained(tmp_path / "projected")
    old = shutil.copytree(tmp_path / "tower", tmp_path / "old")  # as saved by transformers before version 5
    rewrite(old / "model.safetensors", lambda name: f"text_model.{name.removeprefix('text_model.')}")
    expected = reference(transformers_ids(tmp_path / "tower")).last_hidden_state
    for name in ("tower", "whole", "projected", "old"):
        assert_close(load_text_encoder(str(tmp_path / name), TOKENS).encode(CAPTIONS), expected)


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clip_matches_transformers_with_zero_padding(activation: str, prefix: str, tmp_path: Path) -> None:
    reference = write_clip(tmp_path / "reference", hidden_act=activation)
    write_open_clip(tmp_path / "open", reference, prefix)
    encoder = load_text_encoder(str(tmp_path / "open"), TOKENS)
    ids = ClipTokenizer(tmp_path / "open", open_clip=True)(CAPTIONS)
    end = reference.config.vocab_size - 1
    rows = [torch.tensor([*row[: TOKENS - 1], end] if len(row) > TOKENS else row) for row in ids]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    assert padded.shape == (3, TOKENS)
    assert (padded[0] == 0).sum() == TOKENS - 7
    assert_close(encoder.encode(CAPTIONS), reference(padded).last_hidden_state)


def test_open_clip_unescapes_html_and_has_no_special_exclamation_mark(tmp_path: Path) -> None:
    write_clip(tmp_path, pad_token="!")
    ours, theirs = ClipTokenizer(tmp_path, open_clip=True), ClipTokenizer(tmp_path, open_clip=False)
    assert ours(["a &amp;amp; b"]) == ours(["a & b"]) == theirs(["A  &\n B"]) != theirs(["a &amp;amp; b"])
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert ours(["cat!"])[0][1:-1] == [vocabulary["cat</w>"], vocabulary["!</w>"]]
    assert theirs(["cat!"])[0][1:-1] == [vocabulary["cat</w>"], vocabulary["!"]]  # the pad token in transformers
    assert (ours.padding, theirs.padding) == (0, 0)


def test_counts_tokens_and_truncates_to_the_end_token(tmp_path: Path) -> None:
    write_clip(tmp_path)
    encoder = load_text_encoder(str(tmp_path), 6)
    assert encoder.count_tokens(["", "cat", "the cat of the cat"]) == [2, 3, 7]
    long, cut = encoder.encode(["the cat of the cat", "the cat of the"])
    np.testing.assert_array_equal(long, cut)


def test_embeddings_do_not_depend_on_the_batch_and_empty_captions_are_zero(tmp_path: Path) -> None:
    write_clip(tmp_path)
    encoder = load_text_encoder(str(tmp_path), 8)
    one, empty = encoder.encode(["cat", "  "])
    assert np.abs(one).min(axis=-1).max() > 0
    assert not empty.any()
    many = encoder.encode(["the photo", "cat"] * 50)
    np.testing.assert_allclose(many[[1, 99]], [one, one], atol=1e-5)
    assert encoder.encode([]).shape == (0, 8, CLIP_SIZES["hidden_size"])


def test_bfloat16_products_approximate_float32_products(tmp_path: Path) -> None:
    write_clip(tmp_path)
    exact, rounded = (load_text_encoder(str(tmp_path), TOKENS, dtype) for dtype in ("float32", "bfloat16"))
    ours, theirs = rounded.encode(CAPTIONS), exact.encode(CAPTIONS)
    assert ours.dtype == np.float32
    assert 1e-4 < np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean()) < 0.02
    assert exact.fingerprint == rounded.fingerprint


def test_loads_tokenizer_json_and_tokenizer_folders(tmp_path: Path) -> None:
    write_clip(tmp_path / "plain")
    encoder = load_text_encoder(str(tmp_path / "plain"), TOKENS)
    write_clip(tmp_path / "pipeline" / "text_encoder", tokenizer=tmp_path / "pipeline" / "tokenizer")
    for name in ("pipeline", "pipeline/text_encoder"):
        found = load_text_encoder(str(tmp_path / name), TOKENS)
        np.testing.assert_array_equal(found.encode(CAPTIONS), encoder.encode(CAPTIONS))
    CLIPTokenizer.from_pretrained(tmp_path / "plain").backend_tokenizer.save(str(tmp_path / "plain" / "tokenizer.json"))
    (tmp_path / "plain" / "vocab.json").unlink()
    again = load_text_encoder(str(tmp_path / "plain"), TOKENS)
    np.testing.assert_array_equal(again.encode(CAPTIONS), encoder.encode(CAPTIONS))


def test_fingerprint_depends_on_weights_configuration_tokenizer_and_length(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    model = write_clip(folder)

    def fingerprint(tokens: int = TOKENS) -> str:
        return load_text_encoder(str(folder), tokens).fingerprint

    seen = [fingerprint(), fingerprint(10)]
    assert seen[0] == fingerprint()
    (folder / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    seen.append(fingerprint())
    (folder / "merges.txt").write_text((folder / "merges.txt").read_text().replace("th e</w>\n", ""))
    seen.append(fingerprint())
    model.final_layer_norm.bias.data[0] += 1e-3
    model.save_pretrained(folder)
    seen.append(fingerprint())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    seen.append(fingerprint())
    assert len(set(seen)) == 6


def test_rejects_unsupported_and_inconsistent_files(tmp_path: Path) -> None:
    model = write_clip(tmp_path)
    weights = tmp_path / "model.safetensors"
    config = json.loads((tmp_path / "config.json").read_text())

    def error_message(tokens: int = TOKENS, **changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError) as error:
            load_text_encoder(str(tmp_path), tokens)
        return str(error.value)

    assert "supports 3 to 20 caption tokens, not 21" in error_message(tokens=21)
    assert "'relu' is not supported" in error_message(hidden_act="relu")
    assert "width 32 is not a multiple of the 3 attention heads" in error_message(num_attention_heads=3)
    assert "encoder.layers.2.layer_norm1.bias is missing" in error_message(num_hidden_layers=3)
    assert "encoder.layers.1.layer_norm1.bias is not expected" in error_message(num_hidden_layers=1)
    assert "is 100. Use the tokenizer that was published with these weights" in error_message(vocab_size=100)
    save_file(open_clip_tensors(model), weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_text_encoder(str(tmp_path), TOKENS)  # OpenCLIP's tensor names are accepted in Hugging Face's format
    merges = (tmp_path / "merges.txt").read_text()
    (tmp_path / "merges.txt").write_text(merges + "cat dog\n")
    assert "does not match its merges" in error_message()
    (tmp_path / "merges.txt").write_text(merges)
    weights.write_bytes(b"nothing")
    assert "is not a valid safetensors file" in error_message()
    weights.unlink()
    assert "convert_weights" in error_message()
    (tmp_path / "vocab.json").unlink()
    model.save_pretrained(tmp_path)
    assert "has no tokenizer" in error_message()


def test_rejects_unsupported_open_clip_settings(tmp_path: Path) -> None:
    write_open_clip(tmp_path, write_clip(tmp_path / "reference"))
    about = json.loads((tmp_path / "open_clip_config.json").read_text())
    for field, value in {"no_causal_mask": True, "hf_model_name": "roberta-base", "embed_cls": True}.items():
        text = about["model_cfg"]["text_cfg"] | {field: value}
        changed = {"model_cfg": about["model_cfg"] | {"text_cfg": text}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"'{field}' is .* not supported"):
            load_text_encoder(str(tmp_path), TOKENS)
