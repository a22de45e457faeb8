import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from micro_dit.encoders.convert_weights import convert_weights, safetensors_name
from micro_dit.encoders.text import load_text_encoder
from micro_dit.errors import UserError
from tests.helpers.published import open_clip_tensors, write_clip, write_open_clip, write_t5


def test_converted_weights_give_equal_embeddings(tmp_path: Path) -> None:
    model = write_clip(tmp_path / "reference")
    write_open_clip(tmp_path / "safe", model)
    pickled = tmp_path / "pickled"
    write_open_clip(pickled, model)
    (pickled / "open_clip_model.safetensors").unlink()
    torch.save(open_clip_tensors(model), pickled / "open_clip_pytorch_model.bin")
    (pickled / "notes.md").write_text("not copied")
    command = [sys.executable, "-m", "micro_dit.encoders.convert_weights"]
    arguments = [str(pickled / "open_clip_pytorch_model.bin"), str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "open_clip_model.safetensors" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "open_clip_model.safetensors", "open_clip_config.json", "vocab.json", "merges.txt",
    }  # fmt: skip
    ours, theirs = (load_text_encoder(str(tmp_path / name), 20).encode(["a cat"]) for name in ("out", "safe"))
    np.testing.assert_array_equal(ours, theirs)


def test_converts_several_files_and_their_index(tmp_path: Path) -> None:
    write_t5(tmp_path / "t5")
    tensors = load_file(tmp_path / "t5" / "model.safetensors")
    (tmp_path / "t5" / "model.safetensors").unlink()
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]  # shared memory
    names = sorted(tensors)
    parts = {f"pytorch_model-0000{part}-of-00002.bin": names[part - 1 :: 2] for part in (1, 2)}
    for file, chosen in parts.items():
        torch.save({name: tensors[name] for name in chosen}, tmp_path / "t5" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (tmp_path / "t5" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    written = convert_weights(tmp_path / "t5", tmp_path / "out", report=lambda line: None)
    assert [file.name for file in written] == [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    mapped = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {(tmp_path / "out" / file) for file in mapped.values()} == set(written)
    assert load_text_encoder(str(tmp_path / "out"), 12).encode(["a cat"]).any()


def test_shared_and_strided_tensors_of_any_dtype_keep_their_values(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    state = {"a": table, "b": table.T, "c": table[1:], "half": table.bfloat16(), "count": torch.tensor(3)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "vae.pt")
    (converted,) = convert_weights(tmp_path / "vae.pt", tmp_path, report=lambda line: None)
    assert converted.name == "vae.safetensors"
    found = load_file(converted)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_safetensors_names_follow_the_hub() -> None:
    assert safetensors_name("pytorch_model.bin") == "model.safetensors"
    assert safetensors_name("open_clip_pytorch_model.bin") == "open_clip_model.safetensors"
    assert safetensors_name("diffusion_pytorch_model.bin") == "diffusion_pytorch_model.safetensors"
    assert safetensors_name("pytorch_model-00001-of-00002.bin") == "model-00001-of-00002.safetensors"


class Runs:
    """An object whose pickle runs a program when loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo bad",)


def test_rejects_pickles_with_code_and_files_without_tensors(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    torch.save({"a": torch.zeros(2), "b": Runs()}, tmp_path / "bad.bin")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("text")
    for name in ("bad.bin", "text.pt"):
        with pytest.raises(UserError, match=f"{name} is not a file of PyTorch weights, or contains objects"):
            convert_weights(tmp_path / name, tmp_path / "out")
    with pytest.raises(UserError, match=r"list\.pt contains no named tensors"):
        convert_weights(tmp_path / "list.pt", tmp_path / "out")
    with pytest.raises(UserError, match="no weights to convert"):
        convert_weights(tmp_path / "missing.bin", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert "bad\n" not in capfd.readouterr().out
