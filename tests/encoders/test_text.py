import json
from pathlib import Path

import pytest

from micro_dit.encoders.text import load_text_encoder
from micro_dit.errors import UserError


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="Unknown text encoder 'clip': choose minilm, a folder, or owner/repository"):
        load_text_encoder("clip")
    with pytest.raises(UserError, match="'/no/such/folder' is no folder"):
        load_text_encoder("/no/such/folder")


def test_folders_that_are_no_text_encoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither config\.json nor open_clip_config\.json"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="is a 'gpt2': give a text encoder in the format of open_clip, clip"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="is no JSON object"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_text_encoder(str(tmp_path))
