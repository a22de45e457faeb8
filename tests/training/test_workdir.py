import json
from pathlib import Path

import pytest

from micro_dit.errors import UserError
from micro_dit.training.workdir import claim_workdir, same_config

CONFIG = {
    "seed": 0, "name": "x", "phases": ({"name": "a", "steps": 3}, {"name": "b", "steps": 4}), "checkpoint_every": 10,
    "sampling": {"every": 3, "prompts": ("a", "b")}, "model": {"size": "Nano"},
}  # fmt: skip
SHARDS = {"vae": "0123", "files": ["aa"]}


def test_a_run_resumes_with_the_same_config_except_for_fields_without_influence(tmp_path: Path) -> None:
    claim_workdir(tmp_path / "run", CONFIG, SHARDS)
    claim_workdir(tmp_path / "run", CONFIG, SHARDS)
    changed = CONFIG | {"checkpoint_every": 7, "sampling": {"every": 1, "prompts": ()}}
    claim_workdir(tmp_path / "run", changed, SHARDS)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["checkpoint_every"] == 7
    assert saved["shards"] == SHARDS
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_run_of_an_earlier_version_resumes_if_new_fields_have_their_defaults(tmp_path: Path) -> None:
    claim_workdir(tmp_path, CONFIG, SHARDS)
    lora = {"rank": 0, "alpha": 8.0, "targets": "qkv"}
    claim_workdir(tmp_path, CONFIG | {"init_from": "", "lora": lora, "quantize": ""}, SHARDS)
    with pytest.raises(UserError, match=r"init_from \(was '', is now 'models/a'\); lora.alpha .*; lora.rank \(was 0"):
        claim_workdir(tmp_path, CONFIG | {"init_from": "models/a", "lora": lora | {"rank": 4}}, SHARDS)


def test_only_runs_without_8_bit_products_resume(tmp_path: Path) -> None:
    claim_workdir(tmp_path / "plain", CONFIG | {"quantize": ""}, SHARDS)
    claim_workdir(tmp_path / "plain", CONFIG, SHARDS)
    claim_workdir(tmp_path / "int8", CONFIG | {"quantize": "int8"}, SHARDS)
    with pytest.raises(UserError, match="holds a run with quantize='int8', but 8-bit matrix products were") as error:
        claim_workdir(tmp_path / "int8", CONFIG, SHARDS)
    assert "\n" not in str(error.value)


def test_a_run_with_explicit_caption_tokens_resumes_without_them_and_with_the_same_shards(tmp_path: Path) -> None:
    shards = SHARDS | {"caption_tokens": 16}
    claim_workdir(tmp_path, CONFIG | {"data": {"caption_tokens": 16}}, shards)
    claim_workdir(tmp_path, CONFIG | {"data": {"caption_tokens": None}}, shards)
    with pytest.raises(UserError, match="the shards were rebuilt"):
        claim_workdir(tmp_path, CONFIG | {"data": {"caption_tokens": None}}, shards | {"caption_tokens": 32})


def test_configs_are_the_same_if_one_can_resume_the_other() -> None:
    read = json.loads(json.dumps(CONFIG))
    assert same_config(CONFIG, read)
    assert same_config(read, CONFIG | {"checkpoint_every": 7, "sampling": {"every": 1}, "mesh": {"fsdp": 2}})
    assert same_config(CONFIG | {"init_from": "", "lora": {"rank": 0, "alpha": 8.0}, "quantize": ""}, read)
    for change in ({"seed": 1}, {"lora": {"rank": 4}}, {"quantize": "int8"}, {"model": {"size": "Nano", "dim": 8}}):
        assert not same_config(CONFIG, CONFIG | change)
        assert not same_config(CONFIG | change, CONFIG)


@pytest.mark.parametrize(
    ("config", "shards", "message"),
    [
        (CONFIG | {"seed": 1}, SHARDS, r"seed \(was 0, is now 1\)"),
        (CONFIG | {"model": {"size": "Nano", "dim": 8}}, SHARDS, r"model\.dim \(was None, is now 8\)"),
        (CONFIG | {"phases": (CONFIG["phases"][0], {"name": "b", "steps": 5})}, SHARDS, r"phases\[1\]\.steps \(was 4"),
        (CONFIG | {"phases": ({"name": "a", "steps": 3},)}, SHARDS, r"phases\[1\]"),
        (CONFIG, SHARDS | {"files": ["bb"]}, "the shards were rebuilt"),
    ],
)
def test_the_work_directory_of_another_run_is_rejected(
    tmp_path: Path, config: dict, shards: dict, message: str
) -> None:
    claim_workdir(tmp_path, CONFIG, SHARDS)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=message) as error:
        claim_workdir(tmp_path, config, shards)
    assert "Set a new --workdir" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("name", ["phases[0]", "run*", "run?"])
def test_paths_with_glob_characters_are_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"with which Orbax does not find its checkpoints\. Set another --workdir"):
        claim_workdir(tmp_path / name / "run", CONFIG, SHARDS)
    assert not list(tmp_path.iterdir())
