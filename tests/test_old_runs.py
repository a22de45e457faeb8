"""Runs and model folders written before the package had its current layout can be resumed and loaded.

tests/fixtures/before_layout/runs.tar.xz holds the work directory of a run stopped in its second phase, the work
directory of a LoRA run stopped in its only phase, and the exported model that the LoRA run started from. expected.json
and latents.npy hold the results of the old code after it finished the runs and sampled from the model.
"""

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from micro_dit.api import load
from micro_dit.encoders import image, text
from micro_dit.train import train
from micro_dit.training.metrics import read_metrics
from tests.helpers import tiny

FIXTURE = Path(__file__).parent / "fixtures" / "before_layout"
LATENTS = FIXTURE / "latents.npy"
SIZE = dict(depth=1, dim=16, head_dim=8, patch_mixer_depth=1, patch_mixer_dim=16, multiple_of=8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the old runs and their shards, which is the current folder, as the runs have relative paths."""
    with tarfile.open(FIXTURE / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for strings in tmp_path.glob("lora/checkpoints/*/meta/_strings.json"):  # the path of the base model is absolute
        strings.write_text(strings.read_text().replace("/tmp/fix/w/model", str(tmp_path / "model")))
    tiny.write_shards(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "load_text_encoder", lambda name, tokens: tiny.Words())
    monkeypatch.setattr(image, "load_image_encoder", lambda name: tiny.Blocks())
    return tmp_path


def run_config() -> ConfigDict:
    config = tiny.get_config("shards")
    config.model.update(SIZE)
    config.data.update(heldout="validation", heldout_images=4)
    config.phases = (tiny.MASKED | dict(steps=6), tiny.UNMASKED | dict(steps=8, ema_start=2))
    config.checkpoint_every = 100
    return config


def finetune_config() -> ConfigDict:
    config = run_config()
    config.init_from = "model"
    config.lora.update(rank=2, alpha=8.0, targets=r"attn\.qkv\.kernel$")
    finetune = dict(name="finetune", steps=8, learning_rate=1e-2, warmup_steps=2, ema_start=2)
    config.phases = (tiny.UNMASKED | finetune,)
    return config


def assert_close(ours: Mapping[str, Any], theirs: Mapping[str, float], tolerance: float) -> None:
    """Asserts equality within `tolerance`, which allows for rounding but not for another mask, noise or batch."""
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=tolerance), name


@pytest.mark.parametrize(("name", "config"), [("run", run_config), ("lora", finetune_config)])
def test_a_resumed_old_run_has_the_recorded_results(name: str, config: Any, folder: Path) -> None:
    expected = json.loads((FIXTURE / "expected.json").read_text())[name]
    fields = json.loads((folder / name / "config.json").read_text())["config"]
    assert fields["quantize"] == "", "the config of an old run has the field that was removed"
    stopped = max(int(path.name) for path in (folder / name / "checkpoints").iterdir())
    workdir = train(config(), folder / name)
    rows = read_metrics(workdir / "metrics.jsonl")
    losses = {str(row["step"]): row["loss"] for row in rows if "loss" in row}
    assert 1 < stopped < expected["step"] == len(losses)
    assert_close(losses, expected["losses"], 1e-4)
    validation = next(row for row in reversed(rows) if "heldout_loss" in row)
    assert_close({k: v for k, v in validation.items() if k.startswith("heldout")}, expected["validation"], 1e-4)
    saved = tiny.read_checkpoint(workdir)
    assert [saved["meta"][field] for field in ("step", "images")] == [expected["step"], expected["images"]]
    for part, norms in expected["norms"].items():
        ours = {parameter: np.linalg.norm(np.asarray(value, np.float64)) for parameter, value in saved[part].items()}
        assert_close(ours, norms, 1e-3)


def test_a_model_folder_samples_the_recorded_latents(folder: Path) -> None:
    latents, recorded = load(folder / "model").latents(["one", "two words"], seed=3, steps=4), np.load(LATENTS)
    np.testing.assert_allclose(latents, recorded, rtol=0, atol=1e-3 * np.abs(recorded).max())
