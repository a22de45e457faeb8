from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.encoders import image, text
from micro_dit.errors import UserError
from micro_dit.evaluation.evaluator import Schedule, Weights
from micro_dit.evaluation.previews import Previews, embed_prompts, load_matching_image_encoder
from tests.helpers import tiny

PROMPTS = ["A <b>Red</b> Heart #12", "plain"]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces the encoders with small ones and returns the prompts of each call of the text encoder."""
    calls: list[list[str]] = []

    def encode(prompts: list[str]) -> np.ndarray:
        calls.append(prompts)
        return np.full((len(prompts), tiny.TEXT.tokens, tiny.TEXT.channels), len(calls), np.float32)

    encoder = SimpleNamespace(name="noise", fingerprint=tiny.TEXT.fingerprint, encode=encode)
    monkeypatch.setattr(text, "load_text_encoder", lambda name, tokens: encoder)
    vae = SimpleNamespace(name="noise", fingerprint=tiny.VAE.fingerprint)
    monkeypatch.setattr(image, "load_image_encoder", lambda name: vae)
    return calls


def embed(workdir: Path, prompts: list[str] = PROMPTS, **manifest: Any) -> np.ndarray:
    return embed_prompts(prompts, "noise", tiny.make_manifest((64,), **manifest), workdir / "prompts.npz")


def test_prompts_are_cleaned_like_the_captions_of_the_shards(tmp_path: Path, encoded: list[list[str]]) -> None:
    embed(tmp_path, caption_cleaning="deepfloyd-2")
    assert encoded == [["a red heart", "plain"]]


def test_preview_is_sampled_from_the_ema_weights_and_shows_the_original_prompts() -> None:
    sampled: list[tuple[Any, ...]] = []

    def sample(params: Any, captions: np.ndarray, seeds: Any) -> np.ndarray:
        sampled.append((params, captions, list(seeds)))
        return np.zeros((2, 8, 8, 3), np.uint8)

    captions = np.ones((2, 4, 12), np.float32)
    previews = Previews(PROMPTS, captions, sample, Schedule(4, last_step=6), "run", {"guidance": "3.0"})
    assert [step for step in range(1, 7) if previews.schedule.due(step)] == [4, 6]
    raw, ema, base = jnp.ones(1), jnp.zeros(1), jnp.zeros(2)
    results = previews.run(Weights({"w": raw}, {"w": ema}, merge=lambda params: params | {"base": base}), 4)
    ((params, given, seeds),) = sampled
    assert params["w"] is ema
    assert params["base"] is base
    assert given is captions
    assert seeds == [0, 1]
    preview = results.images["samples"]
    assert preview.pixels.dtype == np.uint8
    assert preview.metadata == {
        "prompts": "A <b>Red</b> Heart #12 | plain", "seeds": "0 to 1", "checkpoint": "step 4 of run", "guidance": "3.0"
    }  # fmt: skip
    assert not results.scalars


def test_embeddings_are_cached_for_the_same_prompts_and_cleaning(tmp_path: Path, encoded: list[list[str]]) -> None:
    first, second = embed(tmp_path), embed(tmp_path)
    np.testing.assert_array_equal(first, second)
    assert encoded == [PROMPTS]
    embed(tmp_path, caption_cleaning="deepfloyd-2")
    assert encoded == [PROMPTS, ["a red heart", "plain"]]
    embed(tmp_path, PROMPTS[:1])
    assert encoded[2:] == [PROMPTS[:1]]


def test_unknown_caption_cleaning_is_rejected(tmp_path: Path, encoded: list[list[str]]) -> None:
    with pytest.raises(
        UserError, match="caption cleaning 'other-1', but this version supports only 'deepfloyd-2' and 'none'"
    ):
        embed(tmp_path, caption_cleaning="other-1")


@pytest.mark.parametrize("which", ["image", "text"])
def test_other_encoders_are_rejected(tmp_path: Path, encoded: list[list[str]], which: str) -> None:
    other = {"image": dict(vae=tiny.VAE), "text": dict(text=tiny.TEXT)}[which]
    other = {name: type(info)(**vars(info) | {"fingerprint": "89ab"}) for name, info in other.items()}
    manifest = tiny.make_manifest((64,), **other)

    def load() -> None:
        load_matching_image_encoder("noise", manifest)
        embed_prompts(PROMPTS, "noise", manifest, tmp_path / "prompts.npz")

    with pytest.raises(UserError, match=rf"built with the {which} encoder noise \(89ab\), but noise has"):
        load()
