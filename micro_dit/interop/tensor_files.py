"""Files of named tensors, as PyTorch (`.pt`) and safetensors keep them; nothing in a file is ever run.

What is read is mapped into memory, so that a file of many gigabytes costs only the tensors in use.
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

WRAPPERS = ("state_dict", "model")  # under which trainers put the network's state dict


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Maps the tensors of a `.safetensors` file or of a state dict that `torch.save` wrote into memory, read-only.

    They are float32, float16 or (`ml_dtypes`) bfloat16. A state dict inside a dictionary, under 'state_dict' or
    'model', is found if only plain values are beside it.

    Raises:
        UserError: The file can't be read, or holds anything but float tensors by name.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give one of weights, .pt or .safetensors.")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _state_dict(_read_pickle(path), path)
    arrays = {}
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path} holds {name!r} ({type(tensor).__name__}), where only tensors by name may be.")
        arrays[name] = _as_array(tensor, f"{name} in {path}")
    if not arrays:
        raise UserError(f"{path} holds no tensors; give a file of weights.")
    return arrays


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download it again.") from error


def _read_pickle(path: Path) -> Any:
    """What `torch.save` wrote; only tensors and plain containers of them are made from it."""
    import torch

    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a file of torch.save (of PyTorch 1.6 or later), or is cut short.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to switch the check off.
        raise UserError(
            f"{path} holds other things than tensors ({_code_in(path)}): nothing of it was run, and it can't be "
            "converted; get a file of plain tensors, best as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a state dict that torch.save wrote ({reason}).") from error


def _code_in(path: Path) -> str:
    """Names the functions and classes that a pickle asks for, without running any."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        names = []
    return ", ".join(sorted(names)) or "it is no plain pickle"


def _state_dict(loaded: Any, path: Path) -> Mapping[str, Any]:
    """The one state dict in what was loaded."""
    while isinstance(loaded, Mapping):
        inside = [key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if not inside:
            if odd := [key for key in loaded if not isinstance(key, str)]:
                raise UserError(f"{path} is no state dict: its tensors must have names, and one is {odd[0]!r}.")
            return loaded
        beside = [str(k) for k, v in loaded.items() if k != inside[0] and not isinstance(v, int | float | str | None)]
        if beside:
            raise UserError(
                f"{path} holds {', '.join(beside[:5])} beside {inside[0]!r}, so that it isn't clear which are the "
                "network's weights: save their state dict alone."
            )
        loaded = loaded[inside[0]]
    raise UserError(f"{path} holds a {type(loaded).__name__}, where tensors by name should be.")


def _as_array(tensor: Any, where: str) -> np.ndarray:
    """A view of a tensor's memory."""
    import torch

    kinds = (torch.float32, torch.float16, torch.bfloat16)
    if tensor.dtype not in kinds or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{where} is of {kind}, on {tensor.device}: only plain float32, float16 and bfloat16 are read.")
    if tensor.dtype == torch.bfloat16:  # NumPy knows it only through ml_dtypes
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def write_safetensors(path: str | Path, arrays: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
    """Writes float arrays as `dtype` to a safetensors file, whole; raises UserError if a value is too large for it."""
    from safetensors.numpy import save_file

    written = _as_float32(arrays)
    if dtype != "float32":
        with np.errstate(over="ignore"):
            written = {name: array.astype(dtype) for name, array in written.items()}  # ml_dtypes adds bfloat16
        for name, array in written.items():
            if not np.isfinite(array).all() and np.isfinite(arrays[name]).all():
                raise UserError(f"{name} has values too large for {dtype}: write it as bfloat16 or float32.")
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(written, temporary, {"format": "pt"})
        temporary.chmod(mode)  # safetensors lets only the owner read its files


def write_torch(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes float arrays as a float32 state dict with `torch.save`, replacing the file only when all is written."""
    import torch

    with warnings.catch_warnings(), replacing(path) as temporary:
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor will it be written
        torch.save({name: torch.from_numpy(array) for name, array in _as_float32(arrays).items()}, temporary)


def _as_float32(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Contiguous; arrays that are so already are not copied. Exact, as nothing wider comes in."""
    if wide := [f"{name} is {array.dtype}" for name, array in arrays.items() if array.dtype.itemsize > 4]:
        raise ValueError(f"{wide[0]}: float32 would round it")
    # Not ascontiguousarray, which makes a vector of a scalar.
    return {name: np.require(array, np.float32, "C") for name, array in arrays.items()}
