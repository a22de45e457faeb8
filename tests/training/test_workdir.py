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


def test_the_same_config_may_come_again_and_what_has_no_influence_may_change(tmp_path: Path) -> None:
    claim_workdir(tmp_path / "run", CONFIG, SHARDS)
    claim_workdir(tmp_path / "run", CONFIG, SHARDS)
    changed = CONFIG | {"checkpoint_every": 7, "sampling": {"every": 1, "prompts": ()}}
    claim_workdir(tmp_path / "run", changed, SHARDS)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["checkpoint_every"] == 7
    assert saved["shards"] == SHARDS
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_run_of_an_earlier_version_goes_on_with_the_fields_that_it_lacks_left_off(tmp_path: Path) -> None:
    claim_workdir(tmp_path, CONFIG, SHARDS)
    lora = {"rank": 0, "alpha": 8.0, "targets": "qkv"}
    claim_workdir(tmp_path, CONFIG | {"init_from": "", "lora": lora, "quantize": ""}, SHARDS)
    with pytest.raises(UserError, match=r"init_from \('' there, 'models/a' here\); lora.alpha .*; lora.rank \(0 there"):
        claim_workdir(tmp_path, CONFIG | {"init_from": "models/a", "lora": lora | {"rank": 4}}, SHARDS)


def test_only_runs_without_8_bit_products_resume(tmp_path: Path) -> None:
    claim_workdir(tmp_path / "plain", CONFIG | {"quantize": ""}, SHARDS)
    claim_workdir(tmp_path / "plain", CONFIG, SHARDS)
    claim_workdir(tmp_path / "int8", CONFIG | {"quantize": "int8"}, SHARDS)
    with pytest.raises(UserError, match="holds a run with quantize='int8', and 8-bit products were removed") as error:
        claim_workdir(tmp_path / "int8", CONFIG, SHARDS)
    assert "\n" not in str(error.value)


def test_configs_are_the_same_if_one_would_resume_the_other() -> None:
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
        (CONFIG | {"seed": 1}, SHARDS, r"seed \(0 there, 1 here\)"),
        (CONFIG | {"model": {"size": "Nano", "dim": 8}}, SHARDS, r"model\.dim \(None there, 8 here\)"),
        (CONFIG | {"phases": (CONFIG["phases"][0], {"name": "b", "steps": 5})}, SHARDS, r"phases\[1\]\.steps \(4 "),
        (CONFIG | {"phases": ({"name": "a", "steps": 3},)}, SHARDS, r"phases\[1\]"),
        (CONFIG, SHARDS | {"files": ["bb"]}, "the shards, which were made again"),
    ],
)
def test_another_runs_directory_is_not_taken(tmp_path: Path, config: dict, shards: dict, message: str) -> None:
    claim_workdir(tmp_path, CONFIG, SHARDS)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=message) as error:
        claim_workdir(tmp_path, config, shards)
    assert "give a new --workdir" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("name", ["phases[0]", "run*", "run?"])
def test_names_in_which_checkpoints_would_be_lost_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="by which Orbax would not find what it has saved: give another --workdir"):
        claim_workdir(tmp_path / name / "run", CONFIG, SHARDS)
    assert not list(tmp_path.iterdir())
