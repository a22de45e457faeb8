import json
from pathlib import Path

import pytest

from micro_dit.encoders.text import load_text_encoder
from micro_dit.errors import UserError


def test_rejects_unknown_names() -> None:
    with pytest.raises(UserError, match=r"Unknown text encoder 'clip'\. Pass minilm, a folder, or owner/repository"):
        load_text_encoder("clip")
    with pytest.raises(UserError, match="'/no/such/folder' is not a folder"):
        load_text_encoder("/no/such/folder")


def test_rejects_folders_without_a_text_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither config\.json nor open_clip_config\.json"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match=r"is of type 'gpt2'\. Pass a text encoder of one of the types open_clip, clip"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a JSON object"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_text_encoder(str(tmp_path))
