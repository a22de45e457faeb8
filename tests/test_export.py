"""The export command: the model folder, its model card, and its programs, which run without this package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from flax import nnx
from jax import export as jax_export
from PIL import Image
from safetensors.numpy import load_file

from micro_dit.api import Model, load
from micro_dit.diffusion.generate import Sampling
from micro_dit.diffusion.samplers import SAMPLERS, noise_levels
from micro_dit.encoders import text
from micro_dit.encoders.autoencoder import AutoencoderConfig, AutoencoderKL
from micro_dit.encoders.image import load_image_encoder, save_autoencoder
from micro_dit.errors import UserError
from micro_dit.export import ExportSettings, export
from micro_dit.interop.stablehlo import write_programs
from tests.helpers.tiny import Words

ROOT = Path(__file__).parent.parent
ATTRIBUTION = "All emojis designed by OpenMoji, license CC BY-SA 4.0"


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "load_text_encoder", lambda name, tokens: Words())


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of an autoencoder with random weights."""
    config = AutoencoderConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    folder = tmp_path_factory.mktemp("encoders") / "small_vae"
    parameters = nnx.to_pure_dict(nnx.state(AutoencoderKL(config, rngs=nnx.Rngs(0)), nnx.Param))
    save_autoencoder(folder, config, parameters, np.float16)
    (folder / "README.md").write_text("An autoencoder of a test, CC0.")
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def run(finished_run: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the finished run, edited as if trained with that autoencoder, with a file of samples."""
    run = tmp_path_factory.mktemp("export") / "mask75"
    shutil.copytree(finished_run, run)
    fields = json.loads((run / "config.json").read_text())
    fields["config"]["data"] |= {"vae": str(vae), "source": "openmoji:smileys"}
    fields["config"]["sampling"] |= {"steps": 3, "guidance": 2.5}
    fields["shards"] |= {"vae": load_image_encoder(str(vae)).fingerprint, "attribution": ATTRIBUTION}
    (run / "config.json").write_text(json.dumps(fields))
    losses = [{"step": 80, "heldout_loss": 0.5, "heldout_loss_ema": 0.4375}, {"step": 84, "loss": 0.1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(loss) + "\n" for loss in losses))
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples" / "step_00000084.png").write_bytes(b"a grid")
    return run


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports the run with programs, and moves the folder."""
    made, moved = tmp_path_factory.mktemp("made") / "emoji", tmp_path_factory.mktemp("elsewhere") / "emoji"
    export(run, made, ExportSettings(stablehlo=True), report=lambda line: None)
    shutil.move(made, moved)
    return moved


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return load(run)


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


# ---- The folder ------------------------------------------------------------------------------------------------------


def test_folder_samples_match_the_run(model: Model, folder: Path) -> None:
    again = load(folder)
    latents = again.latents(["one", "two"])
    np.testing.assert_array_equal(latents, model.latents(["one", "two"]))
    for ours, theirs in zip(again.decode(latents), model.decode(latents), strict=True):
        assert ours.size == (64, 64)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    about = again.about
    assert (about.step, about.steps, about.guidance) == (84, 3, 2.5)
    assert (about.source, about.vae, about.text_encoder) == (ATTRIBUTION, "small_vae", "noise")
    assert (about.vae_fingerprint, about.text_fingerprint) == (model.about.vae_fingerprint, "4567")
    vae = ("config.json", "diffusion_pytorch_model.safetensors", "README.md")
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {
        "config.json", "model.safetensors", "README.md", "samples.png", *(f"vae/{name}" for name in vae),
        *(f"stablehlo/{name}" for name in ("denoiser.bin", "decoder.bin", "signature.json")),
    }  # fmt: skip


def test_model_card_has_recipe_data_and_license(folder: Path) -> None:
    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "cc-by-sa-4.0"
    assert (fields["library_name"], fields["pipeline_tag"]) == ("micro_dit", "text-to-image")
    assert "diffusion" in fields["tags"]
    parameters = sum(array.size for array in load_file(folder / "model.safetensors").values())
    for expected in (
        "# emoji", f"{parameters:,} parameters", "64×64 pixels", "(samples.png)", f"{ATTRIBUTION}. Keep this",
        "`openmoji:smileys`", "3 steps", "scale 2.5", "`small_vae` (in the folder `vae`)", "4 tokens",
        "| masked | 64×64 | 75% | 48 of 48 | 4 | 0.003 |", "| unmasked | 64×64 | 0% | 36 of 36 | 4 | 0.001 |",
        "step 84, after 336 training images", "the EMA weights", "Held-out loss at step 80: 0.4375",
    ):  # fmt: skip
        assert expected in card, expected


def test_exports_raw_parameters_of_an_earlier_step(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "m", step=80, params="raw", report=lambda line: None)
    raw, expected = load(tmp_path / "m"), load(run, 80, params="raw")
    assert np.abs(
        expected.params["final_layer.linear.kernel"] - load(run, 80).params["final_layer.linear.kernel"]
    ).max()
    for name, value in expected.params.items():
        np.testing.assert_array_equal(raw.params[name], value, err_msg=name)
    assert (raw.about.step, raw.about.params) == (80, "raw")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "32 of 36" in card
    assert "raw parameters" in card
    assert "at step 80: 0.5000" in card
    assert "samples.png" not in card


def test_exports_bfloat16_weights(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "m", ExportSettings(dtype="bfloat16"), report=lambda line: None)
    size, narrow = ((f / "model.safetensors").stat().st_size for f in (folder, tmp_path / "m"))
    assert narrow < 0.6 * size
    again = load(tmp_path / "m")
    for name, value in load(folder).params.items():
        assert again.params[name].dtype == np.float32
        np.testing.assert_array_equal(again.params[name], np.asarray(value).astype(ml_dtypes.bfloat16))
    assert again.about.step == 84
    assert "rounded to bfloat16" in (tmp_path / "m" / "README.md").read_text()


def test_hub_encoders_are_named_and_not_copied(run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    names = {"vae": "somebody/vae", "text_encoder": "somebody/clip", "license": "mit"}
    export(run, tmp_path / "m", ExportSettings(**names), report=lines.append)
    assert not (tmp_path / "m" / "vae").exists()
    about = load(tmp_path / "m").about
    assert (about.vae, about.vae_folder, about.text_encoder) == ("somebody/vae", "", "somebody/clip")
    assert "somebody/vae, on the Hub, not copied" in lines[1]
    assert lines[-1].endswith("README.md: mit")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "64×64 pixels" in card
    assert "`somebody/vae` (not included)" in card


def test_rejects_invalid_settings_and_writes_nothing(run: Path, folder: Path, tmp_path: Path, vae: Path) -> None:
    other = tmp_path / "other_vae"
    shutil.copytree(vae, other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"scaling_factor": 0.5}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "untrained").mkdir()
    shutil.copy(run / "config.json", tmp_path / "untrained")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"out": tmp_path / "full"}, "already exists and is not an empty folder. Set --out to a new folder"),
        ({"out": tmp_path / "full" / "config.json"}, "already exists and is not an empty folder"),
        ({"out": tmp_path / "full" / "config.json" / "m"}, "Cannot create"),
        ({"workdir": tmp_path / "untrained"}, "has no checkpoints yet"),
        ({"workdir": tmp_path / "nowhere"}, "is neither the work directory of a run nor a model folder"),
        ({"workdir": run, "step": 7}, r"no checkpoint of step 7\. Set --step to one of 48, 80, 84"),
        ({"workdir": run, "params": "ema", "step": 48}, r"has no EMA weights\. Set --params=raw"),
        ({"dtype": "int8"}, "Set --dtype to one of float32, bfloat16, float16"),
        ({"vae": "nowhere"}, "nor a repository name on the Hugging Face Hub. Set --vae"),
        ({"vae": str(other)}, "was trained with another version of other_vae"),
        ({"stablehlo": True, "steps": 0}, "number of sampling steps is 0"),
        ({"stablehlo": True, "sampler": "dpmpp_2m", "steps": 1}, "dpmpp_2m needs at least 2 steps"),
    ]
    there = sorted(tmp_path.rglob("*"))
    for settings, message in wrong:
        places = {name: settings.pop(name) for name in ("workdir", "out", "step", "params") if name in settings}
        with pytest.raises(UserError, match=message):
            export(**{"workdir": folder, "out": tmp_path / "m"} | places, settings=ExportSettings(**settings))
        assert sorted(tmp_path.rglob("*")) == there, settings


def test_missing_flatbuffers_is_reported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match="pip install flatbuffers"):
        export(folder, tmp_path / "m", ExportSettings(stablehlo=True))
    assert not list(tmp_path.iterdir())


def test_command_reports_errors_in_one_line(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "micro_dit.export", f"--workdir={folder}", f"--out={tmp_path / 'm'}", "--steps=5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --sampler and --steps only affect StableHLO programs")
    assert "Traceback" not in done.stderr


# ---- The programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_program_samples_match_without_this_package(folder: Path, tmp_path: Path, sampler: str) -> None:
    model, prompts = load(folder), ["one", "two", ""]
    if sampler != "heun":
        folder = Path(shutil.copytree(folder, tmp_path / sampler))
        signature = json.loads((folder / "stablehlo" / "signature.json").read_text())
        (folder / "stablehlo" / "signature.json").write_text(json.dumps(signature | {"sampler": sampler}))
    np.save(tmp_path / "captions.npy", model.embed(prompts))
    (script,) = re.findall(r'```python\n("""python draw\.py.*?)```', (ROOT / "docs/export.md").read_text(), re.DOTALL)
    script += "\nassert not [name for name in sys.modules if name.partition('.')[0] in ('micro_dit', 'flax')]\n"
    (tmp_path / "draw.py").write_text(script)
    subprocess.run(
        [sys.executable, "draw.py", str(folder), "captions.npy"], cwd=tmp_path, check=True, env=dict(os.environ)
    )
    latents = np.load(tmp_path / "latents.npy")
    # The script uses seeds 0, 1 and 2.
    same_seed = [model.latents(prompts, seed=seed, sampler=sampler)[seed] for seed in range(3)]
    assert_close(latents, np.stack(same_seed))
    assert np.abs(latents[0] - latents[1]).max() > 0.1
    for number, image in enumerate(model.decode(latents)):
        with Image.open(tmp_path / f"{number}.png") as saved:
            assert np.abs(np.asarray(saved).astype(int) - np.asarray(image)).max() <= 1


def test_programs_are_portable_and_match_their_signature(folder: Path) -> None:
    signature = json.loads((folder / "stablehlo" / "signature.json").read_text())
    for name, weights in (
        ("denoiser", "model.safetensors"),
        ("decoder", "vae/diffusion_pytorch_model.safetensors"),
    ):
        entry = signature[name]
        exported = jax_export.deserialize(bytearray((folder / "stablehlo" / entry["file"]).read_bytes()))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        # MLIR bytecode written by StableHLO's portable serialization, with a dialect version.
        assert re.match(rb"ML\xefR.StableHLO_v\d+\.\d+\.\d+\0", exported.mlir_module_serialized, re.DOTALL)
        module = exported.mlir_module()
        assert set(re.findall(r"custom_call @(\w+)", module)) <= {"shape_assertion"}
        assert [(str(a.dtype), [str(n) for n in a.shape]) for a in exported.in_avals] == [
            (i["dtype"], [str(n) for n in i["shape"]]) for i in entry["inputs"]
        ]
        assert list(exported.module_kept_var_idx) == list(range(len(entry["inputs"])))
        main = module.split("func.func public @main(")[1].split(") -> ")[0]
        assert main.count("%arg") == len(entry["inputs"]) + 1  # the first input is the platform
        assert (folder / "stablehlo" / entry["params"]).resolve() == (folder / weights).resolve()
        names = [re.fullmatch(r"params\['(.*)'\]", i["name"]) for i in entry["inputs"]]
        assert [match[1] for match in names if match] == sorted(load_file(folder / weights))
    others = [i["name"] for i in signature["denoiser"]["inputs"] if not i["name"].startswith("params")]
    assert others == ["captions", "negative", "guidance", "x", "sigma"]
    assert signature["version"] == 2
    np.testing.assert_array_equal(signature["noise_levels"], noise_levels(3))


def test_program_with_bfloat16_weights_and_another_sampler(model: Model, tmp_path: Path) -> None:
    write_programs(
        tmp_path / "programs", model.config, "bfloat16", caption_tokens=4, sigma_data=0.9,
        sampling=Sampling(3, 2.5, "dpmpp_2m"), weights="../model.safetensors",
    )  # fmt: skip
    assert {file.name for file in (tmp_path / "programs").iterdir()} == {"denoiser.bin", "signature.json"}
    signature = json.loads((tmp_path / "programs" / "signature.json").read_text())
    inputs = signature["denoiser"]["inputs"]
    assert {i["dtype"] for i in inputs if i["name"].startswith("params")} == {"bfloat16"}
    assert {i["dtype"] for i in inputs if not i["name"].startswith("params")} == {"float32"}
    assert [o["shape"] for o in signature["denoiser"]["outputs"]] == [["B", 8, 8, 4]]
    assert (signature["sampler"], len(signature["noise_levels"]), "decoder" in signature) == ("dpmpp_2m", 4, False)
