"""Reads and writes files of named tensors, PyTorch's (`.pt`) and safetensors; no code in a file is executed.

Files are memory-mapped, so a large file only needs memory for the tensors in use.
"""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from micro_dit.errors import UserError
from micro_dit.files import replacing

WRAPPERS = ("state_dict", "model")  # keys under which trainers store the network's state dict


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Memory-maps the tensors of a `.safetensors` file or of a state dict written by `torch.save`.

    A state dict nested in a dictionary, under 'state_dict' or 'model', is found if all other entries are plain values.

    Returns:
        Read-only float32, float16 or bfloat16 (`ml_dtypes`) arrays, by name.

    Raises:
        UserError: The file cannot be read, or contains anything other than named float tensors.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Pass a .pt or .safetensors file of weights.")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _state_dict(_read_pickle(path), path)
    arrays = {}
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path} contains {name!r} ({type(tensor).__name__}), which is not a tensor. Save only the network's "
                "state dict."
            )
        arrays[name] = _as_array(tensor, f"{name} in {path}")
    if not arrays:
        raise UserError(f"{path} contains no tensors. Pass a file of weights.")
    return arrays


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}). Download it again.") from error


def _read_pickle(path: Path) -> Any:
    """Loads a file written by `torch.save`, restricted to tensors and plain containers."""
    import torch

    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} was not written by `torch.save` of PyTorch 1.6 or later, or is truncated. Download it again."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message suggests disabling the check.
        raise UserError(
            f"{path} contains objects other than tensors ({_code_in(path)}), which were not loaded or executed. Use a "
            "file of plain tensors, preferably safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{path} is not a state dict written by `torch.save` ({reason}). Pass a file of weights."
        ) from error


def _code_in(path: Path) -> str:
    """Lists the functions and classes that a pickle refers to, without executing any."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        names = []
    return ", ".join(sorted(names)) or "not a plain pickle"


def _state_dict(loaded: Any, path: Path) -> Mapping[str, Any]:
    """Returns the only state dict in a loaded object."""
    while isinstance(loaded, Mapping):
        inside = [key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if not inside:
            if odd := [key for key in loaded if not isinstance(key, str)]:
                raise UserError(f"{path} is not a state dict: its keys must be names, but one is {odd[0]!r}.")
            return loaded
        beside = [str(k) for k, v in loaded.items() if k != inside[0] and not isinstance(v, int | float | str | None)]
        if beside:
            raise UserError(
                f"{path} contains {', '.join(beside[:5])} in addition to {inside[0]!r}, so the network's weights are "
                "ambiguous. Save only the network's state dict."
            )
        loaded = loaded[inside[0]]
    raise UserError(
        f"{path} contains a {type(loaded).__name__} instead of named tensors. Save the network's state dict."
    )


def _as_array(tensor: Any, where: str) -> np.ndarray:
    """Returns a NumPy view of a tensor."""
    import torch

    kinds = (torch.float32, torch.float16, torch.bfloat16)
    if tensor.dtype not in kinds or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{where} is {kind} on {tensor.device}. Only dense float32, float16 and bfloat16 tensors on the CPU are "
            "supported."
        )
    if tensor.dtype == torch.bfloat16:  # NumPy supports it only through ml_dtypes
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def write_safetensors(path: str | Path, arrays: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
    """Writes float arrays as `dtype` to a safetensors file, atomically; raises UserError if a value overflows."""
    from safetensors.numpy import save_file

    written = _as_float32(arrays)
    if dtype != "float32":
        with np.errstate(over="ignore"):
            written = {name: array.astype(dtype) for name, array in written.items()}  # ml_dtypes adds bfloat16
        for name, array in written.items():
            if not np.isfinite(array).all() and np.isfinite(arrays[name]).all():
                raise UserError(f"{name} has values too large for {dtype}. Set --dtype=bfloat16 or --dtype=float32.")
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(written, temporary, {"format": "pt"})
        temporary.chmod(mode)  # safetensors makes its files readable only by the owner


def write_torch(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes float arrays as a float32 state dict with `torch.save`, atomically."""
    import torch

    with warnings.catch_warnings(), replacing(path) as temporary:
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # torch.save only reads it
        torch.save({name: torch.from_numpy(array) for name, array in _as_float32(arrays).items()}, temporary)


def _as_float32(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns contiguous float32 arrays, without rounding; contiguous float32 arrays are not copied."""
    if wide := [f"{name} is {array.dtype}" for name, array in arrays.items() if array.dtype.itemsize > 4]:
        raise ValueError(f"{wide[0]}, which float32 would round.")
    # Not ascontiguousarray, which turns a scalar into a vector.
    return {name: np.require(array, np.float32, "C") for name, array in arrays.items()}
