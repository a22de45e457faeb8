import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from micro_dit.errors import UserError
from micro_dit.interop.model_folder import config_from, is_model_folder, load_model_folder, save_model_folder
from tests.helpers import tiny

CONFIG = tiny.network(pos_interp_scale=2.0)
ABOUT = {
    "sigma_data": 0.5, "vae": "noise", "text_encoder": "words", "caption_tokens": 4, "caption_cleaning": "none",
    "source": "a test",
}  # fmt: skip


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in tiny.random_params(CONFIG).items()}


@pytest.fixture
def folder(tmp_path: Path, params: dict[str, np.ndarray]) -> Path:
    save_model_folder(tmp_path / "models" / "m", params, CONFIG, ABOUT)
    return tmp_path / "models" / "m"


def edit(folder: Path, change: dict[str, Any]) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | change))


def test_save_and_load_round_trip(folder: Path, params: dict[str, np.ndarray]) -> None:
    back, config, about = load_model_folder(folder)
    assert config == CONFIG
    assert hash(config) == hash(CONFIG)  # tuples, not lists
    assert about == ABOUT
    assert back.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
        assert back[name].dtype == np.float32
    fields = json.loads((folder / "config.json").read_text())
    assert (fields["format"], fields["version"]) == ("micro_dit model", 1)
    assert fields["model"] == json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_widens_narrow_floats_and_replaces_a_model(folder: Path, params: dict[str, np.ndarray]) -> None:
    narrow = {name: value.astype(ml_dtypes.bfloat16) for name, value in params.items()}
    save_model_folder(folder, narrow, CONFIG, ABOUT | {"source": "another"})
    back, _, about = load_model_folder(folder)
    assert about["source"] == "another"
    for name, value in narrow.items():
        np.testing.assert_array_equal(back[name], value.astype(np.float32), err_msg=name)


def test_optional_fields(folder: Path, params: dict[str, np.ndarray]) -> None:
    fields = ABOUT | {"step": 7, "guidance": 3, "steps": 14, "vae_fingerprint": "0123", "text_fingerprint": "4567"}
    save_model_folder(folder, params, CONFIG, fields, dtype="float16")
    back, _, about = load_model_folder(folder)
    assert about == fields
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value.astype(np.float16).astype(np.float32), err_msg=name)
        assert back[name].dtype == np.float32
    edit(folder, {"steps": "many"})
    with pytest.raises(UserError, match=r"config\.json: 'steps' is 'many', but must be of type int\.$"):
        load_model_folder(folder)
    with pytest.raises(ValueError, match="`about` must have the fields"):
        save_model_folder(folder, params, CONFIG, fields | {"color": "red"})


def test_includes_the_image_encoder(folder: Path, params: dict[str, np.ndarray], tmp_path: Path) -> None:
    vae = tmp_path / "somewhere"
    vae.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "notes.txt"):
        (vae / name).write_text(name)
    save_model_folder(folder, params, CONFIG, ABOUT, vae=vae)
    assert load_model_folder(folder)[2] == ABOUT | {"vae_included": True}
    assert {file.name for file in (folder / "vae").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    save_model_folder(folder, params, CONFIG, ABOUT)
    assert load_model_folder(folder)[2] == ABOUT  # the remaining encoder files belong to the replaced model


def test_does_not_overwrite_other_folders_or_files(tmp_path: Path, params: dict[str, np.ndarray]) -> None:
    (tmp_path / "config.json").write_text('{"config": {}}')  # a run's config
    assert not is_model_folder(tmp_path)
    with pytest.raises(UserError, match=r"has a config\.json but is not a model folder"):
        save_model_folder(tmp_path, params, CONFIG, ABOUT)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(UserError, match=r"is a file\. Choose a folder"):
        save_model_folder(tmp_path / "config.json", params, CONFIG, ABOUT)


def test_rejects_parameters_of_another_network(tmp_path: Path, params: dict[str, np.ndarray]) -> None:
    wrong = {name: value for name, value in params.items() if name != "blocks.1.attn.qkv.kernel"}
    wrong |= {"extra": np.zeros(3, np.float32), "final_layer.linear.bias": np.zeros(3, np.float32)}
    message = (
        r"missing blocks\.1\.attn\.qkv\.kernel; unexpected extra; final_layer.* with shape \(3,\), expected \(16,\)"
    )
    with pytest.raises(UserError, match=message):
        save_model_folder(tmp_path / "m", wrong, CONFIG, ABOUT)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a model folder"),
        ({"version": 2}, "has version 2, but this version of micro_dit reads version 1"),
        ({"model": None}, "dim is missing"),
        ({"model": dataclasses.asdict(CONFIG) | {"width": 3}}, "'model' in .*: width is unknown"),
        ({"model": dataclasses.asdict(CONFIG) | {"dim": "wide"}}, "has an invalid value"),
        ({"model": dataclasses.asdict(CONFIG) | {"dim": 30}}, "must be a multiple of head_dim"),
        ({"model": dataclasses.asdict(CONFIG) | {"num_experts": 4}}, "does not match the network: .*mlp"),
    ],
)
def test_rejects_invalid_configs(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        load_model_folder(folder)


def test_rejects_corrupt_folders(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    del fields["vae"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"config\.json lacks vae"):
        load_model_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_model_folder(folder)
    (folder / "config.json").write_text(json.dumps(fields | {"vae": "noise"}))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"Cannot read .*model\.safetensors"):
        load_model_folder(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"Cannot read .*model\.safetensors"):
        load_model_folder(folder)
    with pytest.raises(UserError, match="is not a model folder"):
        load_model_folder(folder / "missing")


def test_config_from_json_fields(folder: Path) -> None:
    assert config_from(json.loads(json.dumps(dataclasses.asdict(CONFIG))), "here") == CONFIG
