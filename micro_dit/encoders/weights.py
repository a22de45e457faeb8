"""Conversion of published weights: safetensors files in PyTorch's layout ↔ nested dictionaries in this package's."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.errors import UserError
from micro_dit.files import hash_file

Parameters = dict[str, Any]  # nested like the modules, with arrays as leaves


def read_tensors(files: Iterable[Path], wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """Reads tensors of safetensors files into float32 arrays, in the layout of the file.

    Args:
        files: The safetensors files.
        wanted: Returns whether to read the tensor with this name.

    Raises:
        UserError: A file cannot be read, or is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for name in filter(wanted, opened.keys()):
                    tensors[name] = np.asarray(opened.get_tensor(name), np.float32)
        except OSError as error:
            raise UserError(
                f"Cannot read the weights in {file} ({error.strerror or error}). Download the file again."
            ) from error
        except SafetensorError as error:
            raise UserError(f"{file} is not a valid safetensors file ({error}). Download it again.") from error
        except (AttributeError, TypeError) as error:  # not bfloat16, which jax registers with NumPy
            raise UserError(
                f"{name} in {file} has a dtype that is not supported ({error}). Use float weights."
            ) from error
    return tensors


def to_parameters(tensors: Mapping[str, np.ndarray], shapes: Parameters, source: object) -> Parameters:
    """Converts named tensors in PyTorch's layout to nested parameters in this package's layout.

    Args:
        tensors: Arrays by dotted name, in PyTorch's layout.
        shapes: Abstract parameters with the structure and shapes of the result.
        source: Origin of the tensors, for error messages.

    Raises:
        UserError: Tensors are missing, not expected, or have another shape; the message lists all of them.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    expected = {tensor_name(path): leaf.shape for path, leaf in leaves}
    arrays = {name: tensor.transpose(_axes(name, tensor.ndim)) for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in expected if name not in arrays]
    problems += [f"{name} is not expected" for name in arrays if name not in expected]
    problems += [
        f"{name} has shape {tensors[name].shape}, expected {to_torch(name, np.empty(shape)).shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if problems:
        raise UserError(
            f"{source} does not match its configuration: {'; '.join(problems)}. Use the weights and configuration of "
            "the same model."
        )
    return jax.tree_util.tree_unflatten(structure, [arrays[name] for name in expected])


def tensor_name(path: tuple[Any, ...]) -> str:
    """Returns the dotted name of a leaf at this path in the nested dictionary."""
    return ".".join(str(key.key) for key in path)


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Returns a contiguous array in PyTorch's layout, from one in this package's layout."""
    return np.ascontiguousarray(array.transpose(np.argsort(_axes(name, array.ndim))))


def _axes(name: str, dimensions: int) -> tuple[int, ...]:
    """Returns the order of PyTorch's axes in this package: (O, I, h, w) → (h, w, I, O), (O, I) → (I, O)."""
    if dimensions == 4:
        return 2, 3, 1, 0
    if dimensions == 2 and not name.endswith("embedding.weight"):  # embedding tables are not transposed
        return 1, 0
    return tuple(range(dimensions))


def fingerprint_files(files: Iterable[Path], extra: str) -> str:
    """Returns twelve hexadecimal digits of a hash of the files' contents and of `extra`."""
    digest = hashlib.sha256(extra.encode())
    for path in files:
        digest.update(bytes.fromhex(hash_file(path)))
    return digest.hexdigest()[:12]
