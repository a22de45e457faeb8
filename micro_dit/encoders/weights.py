"""Published weights: safetensors files with PyTorch's names and layouts, to and from nested dictionaries of ours."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.errors import UserError
from micro_dit.files import hash_file

Parameters = dict[str, Any]  # nested as the modules are, with arrays as leaves


def read_tensors(files: Iterable[Path], wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """Reads the wanted tensors of safetensors files into float32 arrays, in the layout of the file.

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
            raise UserError(f"Cannot read the weights in {file} ({error.strerror or error}).") from error
        except SafetensorError as error:
            raise UserError(f"{file} is not a valid safetensors file ({error}); download it again.") from error
        except (AttributeError, TypeError) as error:  # bfloat16 is known, since jax teaches it to numpy
            raise UserError(f"{name} in {file} has a dtype that can't be read ({error}); use float weights.") from error
    return tensors


def to_parameters(tensors: Mapping[str, np.ndarray], shapes: Parameters, source: object) -> Parameters:
    """Nests tensors, in PyTorch's layout by dotted names, as the abstract `shapes` are, transposed to our layout.

    Raises:
        UserError: Tensors in `source` are missing, not expected, or have another shape; all are listed.
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
        raise UserError(f"{source} does not fit the configuration beside it: {'; '.join(problems)}.")
    return jax.tree_util.tree_unflatten(structure, [arrays[name] for name in expected])


def tensor_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, from its path in the nested dictionary."""
    return ".".join(str(key.key) for key in path)


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """An array of ours in PyTorch's layout, contiguous."""
    return np.ascontiguousarray(array.transpose(np.argsort(_axes(name, array.ndim))))


def _axes(name: str, dimensions: int) -> tuple[int, ...]:
    """How PyTorch's axes are ordered here: (O, I, h, w) becomes (h, w, I, O), (O, I) becomes (I, O)."""
    if dimensions == 4:
        return 2, 3, 1, 0
    if dimensions == 2 and not name.endswith("embedding.weight"):  # a table of embeddings has a row for each token
        return 1, 0
    return tuple(range(dimensions))


def fingerprint_files(files: Iterable[Path], extra: str) -> str:
    """Twelve hexadecimal digits that change with the contents of any of the files or with `extra`."""
    digest = hashlib.sha256(extra.encode())
    for path in files:
        digest.update(bytes.fromhex(hash_file(path)))
    return digest.hexdigest()[:12]
