"""Fine-tuning of pretrained weights, with all parameters or with a LoRA adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from micro_dit.api import load
from micro_dit.data.pipeline import load_split
from micro_dit.errors import UserError
from micro_dit.evaluation.validation_loss import make_heldout_loss
from micro_dit.interop.model_folder import save_model_folder
from micro_dit.models.config import make_config
from micro_dit.models.dit import abstract_params, bind
from micro_dit.train import train
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.lora import LoRA
from micro_dit.training.metrics import read_metrics
from micro_dit.training.pretrained import Start, load_start, run_params
from micro_dit.training.recipe import make_recipe
from tests.helpers import tiny

NETWORK = tiny.network()
RANK, ALPHA, TARGETS = 2, 8.0, r"attn\.qkv\.kernel$"
STEPS = 60


def finetune(start: Path, shards: Path, rank: int) -> ConfigDict:
    config = tiny.get_config(str(shards))
    config.init_from = str(start)
    config.lora.update(rank=rank, alpha=ALPHA, targets=TARGETS)
    config.phases = (
        dict(name="finetune", resolution=64, mask_ratio=0.0, steps=STEPS, batch_size=8, learning_rate=1e-2,
             warmup_steps=2, ema_decay=0.9),
    )  # fmt: skip
    config.checkpoint_every = STEPS // 2
    return config


@pytest.fixture(scope="module")
def lora_run(finished_run: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(finetune(finished_run, tiny_shards, RANK), tmp_path_factory.mktemp("lora") / "run")


def loss_of(params: Any, shards: Path) -> float:
    """Returns the mean loss over the training images."""
    data = load_split(shards, "train", 64)
    return make_heldout_loss(NETWORK, data, sigma_data=0.9, dtype=jnp.float32)(params)["heldout_loss"]


def test_lora_lowers_the_loss_and_its_checkpoint_holds_only_the_adapter(
    lora_run: Path, finished_run: Path, tiny_shards: Path
) -> None:
    base, _ = run_params(finished_run)
    merged, meta = run_params(lora_run, params="raw")
    assert loss_of(merged, tiny_shards) < loss_of(base, tiny_shards)
    adapted = {name for name in base if name.endswith("attn.qkv.kernel")}
    for name, value in merged.items():
        assert np.array_equal(value, base[name]) is (name not in adapted), name
    saved = tiny.read_checkpoint(lora_run)
    shapes = LoRA(RANK, ALPHA, TARGETS).abstract(base)
    assert {name: value.shape for name, value in saved["params"].items()} == {n: s.shape for n, s in shapes.items()}
    assert saved["ema"].keys() == saved["opt"][1]["mu"].keys() == shapes.keys()
    assert meta["lora"]["rank"] == RANK


def test_base_and_adapter_predict_the_same_as_merged_weights(
    lora_run: Path, finished_run: Path, tmp_path: Path
) -> None:
    inputs = tiny.inputs(NETWORK)
    base, adapter = run_params(finished_run)[0], tiny.read_checkpoint(lora_run)["ema"]

    @jax.jit
    def unmerged(base: Any, adapter: Any) -> jax.Array:
        return bind(NETWORK, LoRA(RANK, ALPHA, TARGETS).merge(base, adapter))(*inputs)

    model = load(lora_run)
    about = {"sigma_data": 0.9, "vae": "noise", "text_encoder": "noise", "caption_tokens": 4,
             "caption_cleaning": "none", "source": ""}  # fmt: skip
    save_model_folder(tmp_path / "model", {n: np.asarray(v) for n, v in model.params.items()}, NETWORK, about)
    predict = jax.jit(lambda params: bind(NETWORK, params)(*inputs))
    np.testing.assert_array_equal(predict(load(tmp_path / "model").params), predict(model.params))
    np.testing.assert_allclose(predict(model.params), unmerged(base, adapter), rtol=1e-4, atol=1e-5)
    assert not np.allclose(predict(model.params), predict(base), atol=1e-3)


def test_an_interrupted_lora_run_resumes_bitwise(
    lora_run: Path, finished_run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = shutil.copytree(lora_run, tmp_path / "run")
    shutil.rmtree(cut / "checkpoints" / str(STEPS))
    train(finetune(finished_run, tiny_shards, RANK), cut)
    assert f"Resuming from step {STEPS // 2}" in capsys.readouterr().out
    tiny.assert_same_end(cut, lora_run)


def test_full_finetuning_starts_from_the_pretrained_weights_and_with_the_loss_of_lora(
    finished_run: Path, lora_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    base = run_params(finished_run)[0]
    about = {"sigma_data": 0.9, "vae": "noise", "text_encoder": "noise", "caption_tokens": 4,
             "caption_cleaning": "none", "source": ""}  # fmt: skip
    larger = tiny.network(input_size=16, pos_interp_scale=2.0)  # has the same parameter shapes
    save_model_folder(tmp_path / "model", base, larger, about)
    config = finetune(tmp_path / "model", tiny_shards, rank=0)
    config.phases = (config.phases[0] | dict(steps=1),)  # the first step has learning rate 0
    full = tiny.read_checkpoint(train(config, tmp_path / "full"))
    for part in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, full[part], base)
    first, lora = (read_metrics(run / "metrics.jsonl")[0]["loss"] for run in (tmp_path / "full", lora_run))
    assert first == pytest.approx(lora, rel=1e-5)
    shutil.rmtree(tmp_path / "model")  # a run with checkpoints does not read init_from
    train(config, tmp_path / "full")


def test_configs_that_do_not_match_the_pretrained_model_are_rejected(
    finished_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    def check_rejected(match: str, **fields: Any) -> None:
        config = finetune(finished_run, tiny_shards, RANK)
        config.update_from_flattened_dict(fields)
        with pytest.raises(UserError, match=match) as error:
            train(config, tmp_path / "run")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()

    check_rejected(r"differs from the config: depth \(model: 2, config: 3\)", **{"model.depth": 3})
    check_rejected("init_from: .* is neither the work directory of a run nor a model folder", init_from=str(tmp_path))
    check_rejected("lora.rank is 2, but init_from is empty", init_from="")
    check_rejected("matches no kernel", **{"lora.targets": "no_such_kernel"})


@pytest.mark.parametrize(
    ("field", "value"),
    [("sigma_data", 0.5), ("vae", "another"), ("text_encoder", "another"), ("caption_tokens", 77),
     ("vae_fingerprint", "9999"), ("text_fingerprint", "9999")],
)  # fmt: skip
def test_weights_trained_with_other_encoders_are_rejected(field: str, value: Any) -> None:
    about = {"sigma_data": 0.9, "vae": "noise", "text_encoder": "noise", "caption_tokens": 4}
    manifest = tiny.make_manifest((64,))
    Start(Path("model"), None, {}, NETWORK, about).check(NETWORK, manifest, 0.9, "noise", "noise")
    with pytest.raises(UserError, match=field.replace("fingerprint", "").strip("_").replace("text", "text_encoder")
                       if "fingerprint" in field else field):  # fmt: skip
        Start(Path("model"), None, {}, NETWORK, about | {field: value}).check(NETWORK, manifest, 0.9, "noise", "noise")


def test_an_adapter_without_its_base_weights_is_rejected(lora_run: Path, finished_run: Path, tmp_path: Path) -> None:
    """Loading fails if the base weights were moved or replaced."""
    about = tiny.read_checkpoint(lora_run)["meta"]["lora"]
    assert about["folder"] == str(finished_run)
    aside = finished_run.with_name("aside")
    finished_run.rename(aside)
    try:
        with pytest.raises(UserError, match=f"trained on the weights in .*{finished_run}, which can't be loaded"):
            load(lora_run)
        params = {name: value + 1 for name, value in load_start(aside).params.items()}
        about = {"sigma_data": 0.9, "vae": "noise", "text_encoder": "noise", "caption_tokens": 4,
                 "caption_cleaning": "none", "source": ""}  # fmt: skip
        save_model_folder(finished_run, params, NETWORK, about)
        with pytest.raises(UserError, match="have changed since"):
            load(lora_run)
        shutil.rmtree(finished_run)
    finally:
        aside.rename(finished_run)


def test_raw_and_ema_adapters_are_merged(lora_run: Path) -> None:
    raw, ema = run_params(lora_run, params="raw")[0], run_params(lora_run)[0]
    assert Checkpoints(lora_run).has_average(STEPS)
    assert any(not np.array_equal(raw[name], ema[name]) for name in raw)
    assert raw.keys() == ema.keys() == abstract_params(NETWORK).keys()


@pytest.mark.parametrize(("variant", "caption_channels"), [("lora", 384), ("xl", 1024)])
def test_adapters_of_the_configs_are_below_two_percent_of_the_model(variant: str, caption_channels: int) -> None:
    config = tiny.load_config_file(tiny.CONFIGS / "finetune.py", variant)
    network = make_config(config.model.size, input_size=32, in_channels=4, caption_channels=caption_channels)
    base = abstract_params(network)
    adapter = make_recipe(config).lora.abstract(base)
    sizes = [sum(np.prod(leaf.shape) for leaf in tree.values()) for tree in (adapter, base)]
    assert sizes[0] < 0.02 * sizes[1]
    assert json.loads(json.dumps(config.to_dict()))["lora"]["rank"] > 0
