"""The convert command; tests/interop tests files and names, tests/parity/test_converted.py the network's outputs."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from micro_dit import convert
from micro_dit.errors import UserError
from micro_dit.interop.model_folder import load_model_folder
from micro_dit.interop.torch_checkpoint import from_state_dict, to_state_dict
from micro_dit.models.config import make_config
from micro_dit.models.dit import abstract_params
from tests.helpers import tiny

# The smallest known size, otherwise like the release's weights with 16 channels, at a quarter of their resolution.
CONFIG = make_config("Nano", input_size=16, in_channels=16, caption_channels=1024, pos_interp_scale=2.0)
FLAGS = ("from_torch", "out", "to_torch", "workdir", "step", "model", *convert.ENCODERS)


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    shapes = {name: leaf.shape for name, leaf in abstract_params(CONFIG).items()}
    params = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {name: torch.tensor(value) for name, value in to_state_dict(params, CONFIG).items()}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that runs the command with the given flags."""

    def run(**given: Any) -> None:
        assert set(given) <= set(FLAGS)
        monkeypatch.setattr(convert, "FLAGS", SimpleNamespace(**dict.fromkeys(FLAGS) | given))
        convert.main()

    return run


def assert_bitwise_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        assert torch.equal(ours[name].view(torch.int32), value.view(torch.int32)), name


def test_release_weights_are_recognized_and_round_trip_bitwise(
    state_dict: dict[str, torch.Tensor], tmp_path: Path, run: Any, capsys: pytest.CaptureFixture
) -> None:
    odd = dict(state_dict)
    odd["blocks.0.mlp.w1.weight"] = state_dict["blocks.0.mlp.w1.weight"].clone()
    odd["blocks.0.mlp.w1.weight"][0, :3] = torch.tensor([-0.0, float("nan"), 1e-42])  # changed by arithmetic
    torch.save(odd, tmp_path / "dit.pt")
    run(from_torch=str(tmp_path / "dit.pt"), out=str(tmp_path / "model"))
    assert capsys.readouterr().out.splitlines() == [
        "Nano: 4,904,768 parameters, float32",
        "latents 16 × 16 × 16 from ostris/vae-kl-f8-d16; position scale 2.0",
        "captions 77 × 1024 from apple/DFN5B-CLIP-ViT-H-14-378",
        f"wrote {tmp_path / 'model'}",
    ]
    params, config, about = load_model_folder(tmp_path / "model")
    assert config == CONFIG
    assert about == {
        "sigma_data": 0.9, "vae": "ostris/vae-kl-f8-d16", "text_encoder": "apple/DFN5B-CLIP-ViT-H-14-378",
        "caption_tokens": 77, "caption_cleaning": "none", "source": "dit.pt, float32",
    }  # fmt: skip
    assert params["blocks.0.attn.qkv.kernel"].shape == state_dict["blocks.0.attn.qkv.weight"].shape[::-1]
    for name, read in (("back.pt", lambda path: torch.load(path, weights_only=True)), ("back.safetensors", load_file)):
        run(to_torch=str(tmp_path / "new" / name), workdir=str(tmp_path / "model"))
        assert_bitwise_equal(read(tmp_path / "new" / name), odd)
    # A safetensors file converts to the same model folder.
    run(from_torch=str(tmp_path / "new" / "back.safetensors"), out=str(tmp_path / "again"))
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "model"))
    assert ours == theirs


def test_converts_half_precision_trainer_checkpoints_to_float32(
    state_dict: dict[str, torch.Tensor], tmp_path: Path, run: Any
) -> None:
    narrow = {f"module.dit._orig_mod.{name}": value.bfloat16() for name, value in state_dict.items()}
    torch.save({"model": narrow, "epoch": 3}, tmp_path / "trainer.pt")
    run(from_torch=str(tmp_path / "trainer.pt"), out=str(tmp_path / "model"))
    params, config, about = load_model_folder(tmp_path / "model")
    assert config == CONFIG
    assert about["source"] == "trainer.pt, bfloat16, widened to float32"
    rounded = {name: value.bfloat16().float().numpy() for name, value in state_dict.items()}
    rounded["pos_embed"] = state_dict["pos_embed"].numpy()
    for name, value in from_state_dict(rounded, CONFIG).items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)
    run(to_torch=str(tmp_path / "back.pt"), workdir=str(tmp_path / "model"))
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert torch.equal(back["blocks.1.mlp.w1"], state_dict["blocks.1.mlp.w1"].bfloat16().float())
    assert torch.equal(back["pos_embed"], state_dict["pos_embed"])  # computed, not stored


def test_other_encoders(state_dict: dict[str, torch.Tensor], tmp_path: Path, run: Any) -> None:
    torch.save(state_dict, tmp_path / "dit.pt")
    given = dict(
        vae="folder/vae", text_encoder="folder/text", caption_tokens=20, caption_cleaning="deepfloyd-2", sigma_data=0.5
    )
    run(from_torch=str(tmp_path / "dit.pt"), out=str(tmp_path / "model"), **given)
    assert load_model_folder(tmp_path / "model")[2] == given | {"source": "dit.pt, float32"}
    with pytest.raises(UserError, match="its number of caption tokens is not known"):
        run(from_torch=str(tmp_path / "dit.pt"), out=str(tmp_path / "other"), text_encoder="folder/text")
    with pytest.raises(UserError, match=r"xl-base-1\.0 does not have the network's 16 latent channels"):
        run(from_torch=str(tmp_path / "dit.pt"), out=str(tmp_path / "other"), vae=convert.VAES[4])
    assert not (tmp_path / "other").exists()


def test_converts_a_run_to_pytorch_and_back(finished_run: Path, tmp_path: Path, run: Any) -> None:
    """Checks that the EMA weights are converted if the checkpoint has them, and the parameters otherwise."""
    end = tiny.read_checkpoint(finished_run)
    (tmp_path / "network.json").write_text(json.dumps({"model": end["meta"]["model"]}))
    given = dict(vae="noise", text_encoder="noise", caption_tokens=4, model=str(tmp_path / "network.json"))
    torch_file = str(tmp_path / "run.pt")
    for step, expected in ((None, end["ema"]), (48, tiny.read_checkpoint(finished_run, 48)["params"])):
        run(to_torch=torch_file, workdir=str(finished_run), step=step)
        run(from_torch=torch_file, out=str(tmp_path / "m"), **given)
        params, _, _ = load_model_folder(tmp_path / "m")
        assert params.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(params[name], value, err_msg=name)
    before = (finished_run / "config.json").read_text()
    with pytest.raises(UserError, match=r"has a config\.json but is not a model folder"):
        run(from_torch=torch_file, out=str(finished_run), **given)
    assert (finished_run / "config.json").read_text() == before
    with pytest.raises(UserError, match=r"no checkpoint of step 7\. Set --step to one of"):
        run(to_torch=torch_file, workdir=str(finished_run), step=7)
    with pytest.raises(UserError, match="width 32, but the known widths are 128"):
        run(from_torch=torch_file, out=str(tmp_path / "new"))


def test_lists_mismatched_tensors(state_dict: dict[str, torch.Tensor], tmp_path: Path, run: Any) -> None:
    wrong = {name: value for name, value in state_dict.items() if name != "blocks.3.mlp.w1"}
    wrong |= {"mystery": torch.zeros(3), "blocks.0.attn.qkv.weight": torch.zeros(4, 4)}
    torch.save(wrong, tmp_path / "dit.pt")
    message = r"missing blocks\.3\.mlp\.w1; unexpected mystery; blocks\.0\.attn\.qkv\.weight has shape \(4, 4\), "
    with pytest.raises(UserError, match=message):
        run(from_torch=str(tmp_path / "dit.pt"), out=str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


class Runs:
    """An object whose pickle runs a program when loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_command_rejects_code_in_one_line_without_running_it(
    state_dict: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(state_dict | {"bad": Runs(tmp_path / "mark")}, tmp_path / "bad.pt")
    arguments = [f"--from_torch={tmp_path / 'bad.pt'}", f"--out={tmp_path / 'm'}"]
    command = [sys.executable, "-m", "micro_dit.convert", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "objects other than tensors" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["bad.pt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(), "Set either --from_torch=FILE and --out=FOLDER, or"),
        (dict(from_torch="a.pt", to_torch="b.pt"), "Set either --from_torch"),
        (dict(from_torch="a.pt"), "--from_torch requires --out=FOLDER"),
        (dict(to_torch="a.pt"), "--to_torch requires --workdir=FOLDER"),
        (dict(from_torch="a.pt", out="m", step=3), "--step cannot be combined with --from_torch"),
        (dict(to_torch="a.pt", workdir="m", vae="x", sigma_data=1.0), "--vae, --sigma_data cannot be combined"),
        (dict(to_torch="a.bin", workdir="m"), r"--to_torch=a\.bin must end in \.pt or \.pth or \.safetensors"),
        (dict(to_torch="a.pt", workdir="missing"), "missing is neither the work directory of a run nor a model folder"),
        (dict(from_torch="missing.pt", out="m"), r"missing\.pt does not exist"),
    ],
)
def test_rejects_missing_and_conflicting_flags(given: dict[str, Any], message: str, run: Any) -> None:
    with pytest.raises(UserError, match=message):
        run(**given)


def test_full_disk_is_reported_before_writing(
    state_dict: dict[str, torch.Tensor], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state_dict, tmp_path / "dit.pt")
    run(from_torch=str(tmp_path / "dit.pt"), out=str(tmp_path / "model"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**7))
    with pytest.raises(UserError, match=r"model requires 0\.02 GB, but the disk has only 0\.01 GB free"):
        run(from_torch=str(tmp_path / "dit.pt"), out=str(tmp_path / "other" / "model"))
    with pytest.raises(UserError, match=r"back\.pt requires 0\.02 GB"):
        run(to_torch=str(tmp_path / "back.pt"), workdir=str(tmp_path / "model"))
    assert {path.name for path in tmp_path.iterdir()} == {"dit.pt", "model"}
