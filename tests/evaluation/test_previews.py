from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from micro_dit.diffusion.generate import Sampling
from micro_dit.encoders import image, text
from micro_dit.errors import UserError
from micro_dit.evaluation.previews import Previews
from tests.helpers import tiny

PROMPTS = ["A <b>Red</b> Heart #12", "plain"]
SETTINGS = dict(vae="noise", text_encoder="noise", sampling=Sampling(1), sigma_data=0.9, dtype="float32")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Puts small encoders in place of the real ones; what the text encoder is given."""
    calls: list[list[str]] = []

    def encode(prompts: list[str]) -> np.ndarray:
        calls.append(prompts)
        return np.full((len(prompts), tiny.TEXT.tokens, tiny.TEXT.channels), len(calls), np.float32)

    encoder = SimpleNamespace(name="noise", fingerprint=tiny.TEXT.fingerprint, encode=encode)
    monkeypatch.setattr(text, "load_text_encoder", lambda name, tokens: encoder)
    vae = SimpleNamespace(name="noise", fingerprint=tiny.VAE.fingerprint)
    monkeypatch.setattr(image, "load_image_encoder", lambda name: vae)
    return calls


def previews(workdir: Path, prompts: list[str] = PROMPTS, **manifest: Any) -> Previews:
    return Previews(workdir, prompts, tiny.make_manifest((64,), **manifest), **SETTINGS)


def test_prompts_are_cleaned_as_the_shards_captions_were_and_shown_in_the_users_words(
    tmp_path: Path, encoded: list[list[str]]
) -> None:
    made = previews(tmp_path, caption_cleaning="deepfloyd-2")
    assert encoded == [["a red heart", "plain"]]
    assert made.prompts == PROMPTS
    assert made.metadata(3)["prompts"] == "A <b>Red</b> Heart #12 | plain"


def test_embeddings_are_kept_for_the_same_prompts_and_cleaning_only(tmp_path: Path, encoded: list[list[str]]) -> None:
    previews(tmp_path)
    previews(tmp_path)
    assert encoded == [PROMPTS]
    previews(tmp_path, caption_cleaning="deepfloyd-2")
    assert encoded == [PROMPTS, ["a red heart", "plain"]]
    previews(tmp_path, PROMPTS[:1])
    assert encoded[2:] == [PROMPTS[:1]]
    previews(tmp_path, [])
    assert len(encoded) == 3


def test_unknown_rules_of_cleaning_are_refused(tmp_path: Path, encoded: list[list[str]]) -> None:
    with pytest.raises(UserError, match="were cleaned by 'other-1', and this code knows 'deepfloyd-2' and 'none'"):
        previews(tmp_path, caption_cleaning="other-1")


@pytest.mark.parametrize("which", ["image", "text"])
def test_other_encoders_are_refused(tmp_path: Path, encoded: list[list[str]], which: str) -> None:
    other = {"image": dict(vae=tiny.VAE), "text": dict(text=tiny.TEXT)}[which]
    other = {name: type(info)(**vars(info) | {"fingerprint": "89ab"}) for name, info in other.items()}
    with pytest.raises(UserError, match=rf"made with {which} encoder noise \(89ab\), but noise is"):
        previews(tmp_path, **other)
