"""Reading tensors from untrusted files: only tensors are loaded, and no code is executed."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from micro_dit.errors import UserError
from micro_dit.interop.tensor_files import read_tensors, write_safetensors, write_torch


def test_reads_both_formats_bitwise(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": table, "half": table.half() / 3, "brain": table.bfloat16() / 3, "scalar": torch.tensor(3.0)}
    torch.save(tensors | {"view": table.T, "trained": torch.nn.Parameter(table)}, tmp_path / "w.pt")
    save_file(tensors, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        read = read_tensors(tmp_path / name)
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(read[key].astype(np.float32), tensor.float().numpy(), err_msg=key)
        assert read["brain"].dtype == ml_dtypes.bfloat16
        assert read["half"].dtype == np.float16
    both = read_tensors(tmp_path / "w.pt")
    np.testing.assert_array_equal(both["view"], table.numpy().T)
    np.testing.assert_array_equal(both["trained"], table.numpy())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="requires Linux")
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_maps_files_into_memory(tmp_path: Path, name: str) -> None:
    tensors = {"a": torch.arange(1024.0), "b": torch.arange(1024.0)}
    torch.save(tensors, tmp_path / name) if name == "w.pt" else save_file(tensors, tmp_path / name)
    a = read_tensors(tmp_path / name)["a"]
    assert str(tmp_path / name) in Path("/proc/self/maps").read_text()
    np.testing.assert_array_equal(a, np.arange(1024))


def test_narrow_dtypes_round_and_reject_overflow(tmp_path: Path) -> None:
    arrays = {"a": np.float32([1 / 3, 70000.0, np.inf])}
    write_safetensors(tmp_path / "w.safetensors", arrays, "bfloat16")
    np.testing.assert_array_equal(read_tensors(tmp_path / "w.safetensors")["a"], arrays["a"].astype(ml_dtypes.bfloat16))
    before = (tmp_path / "w.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"a has values too large for float16\. Set --dtype=bfloat16 or"):
        write_safetensors(tmp_path / "w.safetensors", {"a": arrays["a"][:2]}, "float16")
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_writes_contiguous_float32_files_atomically(tmp_path: Path) -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    value.flags.writeable = False
    half = value.astype(ml_dtypes.bfloat16)
    arrays = {"turned": value.T, "plain": value, "half": half, "scalar": np.array(2, np.float32)}
    write_torch(tmp_path / "w.pt", arrays)
    write_safetensors(tmp_path / "w.safetensors", arrays)
    for written in (torch.load(tmp_path / "w.pt", weights_only=True), load_file(tmp_path / "w.safetensors")):
        for name, array in arrays.items():
            assert written[name].dtype == torch.float32
            assert written[name].is_contiguous()
            np.testing.assert_array_equal(written[name].numpy(), array.astype(np.float32))
            assert written[name].shape == array.shape
    assert {file.name for file in tmp_path.iterdir()} == {"w.pt", "w.safetensors"}
    (tmp_path / "other").touch()
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1  # the default permissions
    (tmp_path / "other").unlink()
    for write in (write_torch, write_safetensors):
        with pytest.raises(ValueError, match="wide is float64"):
            write(tmp_path / "w.pt", {"wide": np.zeros(2)})
        assert {file.name for file in tmp_path.iterdir()} == {"w.pt", "w.safetensors"}
    assert torch.load(tmp_path / "w.pt", weights_only=True).keys() == arrays.keys()  # the previous file is kept


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s}, lambda s: {"model": {"state_dict": s}, "epoch": 3}])
def test_finds_nested_state_dicts(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap({"a": torch.ones(2)}), tmp_path / "w.pt")
    assert read_tensors(tmp_path / "w.pt").keys() == {"a"}


class Runs:
    """An object whose pickle runs a program when loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def write_raw_pickle(path: Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value))


def write_zipped_pickle(path: Path, value: Any) -> None:
    """Writes an archive like torch.save's, with a pickle protocol whose names PyTorch cannot list."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=4))
        archive.writestr("archive/version", "3\n")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, bad: torch.save({"a": torch.ones(1), "b": bad}, path), r"other than tensors \(\w+\.system"),
        (lambda path, bad: torch.save(bad, path), r"objects other than tensors \(\w+\.system\), which were not loaded"),
        (lambda path, bad: torch.save({"model": {"a": torch.ones(1)}, "x": bad}, path), "objects other than tensors"),
        (lambda path, bad: torch.save(bad, path, _use_new_zipfile_serialization=False), "was not written by"),
        (write_zipped_pickle, r"objects other than tensors \(not a plain pickle\)"),
        (write_raw_pickle, r"was not written by `torch\.save`"),
    ],
    ids=["next to a tensor", "only object", "next to a model", "old format", "other protocol", "raw pickle"],
)
def test_rejects_code_without_running_it(tmp_path: Path, write: Any, message: str) -> None:
    mark = tmp_path / "mark"
    write(tmp_path / "bad.pt", Runs(mark))
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / "bad.pt")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Runs(mark)))
    assert mark.exists()  # a plain pickle.loads would have run it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "contains a list instead of named tensors"),
        (torch.zeros(2), "contains a Tensor"),
        ({}, "contains no tensors"),
        ({3: torch.zeros(2)}, "its keys must be names, but one is 3"),
        ({"a": torch.zeros(2), "steps": 3}, r"contains 'steps' \(int\), which is not a tensor"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "a in .* is int64"),
        ({"a": torch.zeros(2, dtype=torch.float64)}, "a in .* is float64"),
        ({"a": torch.zeros(2, device="meta")}, "on meta"),
        ({"a": torch.eye(2).to_sparse()}, "Only dense float32"),
        ({"model": {"a": torch.zeros(2)}, "state_dict": {"a": torch.ones(2)}}, "model in addition to 'state_dict'"),
        ({"model": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}}, "ema in addition to 'model'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "file",
)
def test_rejects_anything_but_named_float_tensors(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_rejects_missing_and_corrupt_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(UserError, match="does not exist"):
        read_tensors(path)
    tensors = {"a": torch.zeros(1000)}
    torch.save(tensors, path) if name == "w.pt" else save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"is truncated|is not a complete safetensors file"):
        read_tensors(path)
    path.write_text("an error page")
    with pytest.raises(UserError, match=r"was not written by `torch\.save`|is not a complete safetensors file"):
        read_tensors(path)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme", "no weights")
    with pytest.raises(UserError, match="is not a state dict written by"):
        read_tensors(tmp_path / "zip.pt")
