"""Converts a golden network from a .pt file to a model folder and back, and compares outputs and weights."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import torch

from micro_dit.convert import to_torch
from micro_dit.interop.model_folder import load_model_folder
from micro_dit.interop.torch_checkpoint import from_state_dict, recognize
from micro_dit.models.config import make_config
from micro_dit.models.dit import bind
from micro_dit.models.embeddings import position_table
from tests.helpers.golden import assert_close, caption, config_of, nhwc, read, under

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4


def test_converted_weights_give_the_release_outputs(network_file: Path, tmp_path: Path) -> None:
    arrays, about = read(network_file)
    config = config_of(json.loads(str(arrays["config_json"])))
    state_dict = {name: torch.from_numpy(value) for name, value in under(arrays, "params/").items()}
    torch.save(state_dict, tmp_path / "release.pt")
    # Not a published size, so --model is required.
    (tmp_path / "network.json").write_text(json.dumps({"model": dataclasses.asdict(config)}))
    arguments = [
        f"--from_torch={tmp_path / 'release.pt'}", f"--out={tmp_path / 'model'}",
        f"--model={tmp_path / 'network.json'}", "--vae=vae", "--text_encoder=words", "--caption_tokens=7",
    ]  # fmt: skip
    command = [sys.executable, "-m", "micro_dit.convert", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    params, converted, _ = load_model_folder(tmp_path / "model")
    assert converted == config

    case = next(name for name in about["cases"] if name.startswith("fwd_m0"))
    golden = under(arrays, f"{case}/")
    x, y, t = nhwc(arrays["in/x"]), caption(arrays["in/y"]), golden.get("t", arrays["in/t"])
    ours = jax.jit(lambda params, x, t, y: bind(config, params)(x, t, y))(params, x, t, y)
    assert_close(ours, nhwc(golden["sample"]), TOLERANCE, case)

    to_torch(tmp_path / "model", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state_dict.keys()
    for name, value in state_dict.items():
        np.testing.assert_array_equal(back[name].numpy().view(np.int32), value.numpy().view(np.int32), err_msg=name)


def test_recognizes_and_converts_published_sizes(size_file: Path) -> None:
    golden = json.loads(size_file.read_text())
    zero = np.zeros((), np.float32)
    state_dict = {name: np.broadcast_to(zero, shape) for name, shape in golden["state_dict"]}  # allocates no memory
    expected = make_config(golden["arch"], **golden["ctor"])
    state_dict["pos_embed"] = position_table(expected.dim, expected.grid, expected.pos_interp_scale)[None]
    size, config = recognize(state_dict)
    assert (size, config) == (golden["arch"], expected)
    assert sum(value.size for value in from_state_dict(state_dict, config).values()) == golden["total_params"]
