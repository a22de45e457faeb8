"""The FID network: Inception-v3 of 2015-12-05 (Szegedy et al. 2015, arXiv 1512.00567), from pixels to 2048 features.

FID (Heusel et al. 2017, arXiv 1706.08500) is defined by one TensorFlow graph, which differs from later Inception
networks in three ways: average pooling excludes the padding, the last block uses max pooling, and images are resized
with the bilinear interpolation of TensorFlow 1. The weights are those published for PyTorch as
`pt_inception-2015-12-05-6726825d.pth`. Layers have the same names as in this file; batch norms are folded into kernels.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from micro_dit.errors import UserError
from micro_dit.files import hash_file
from micro_dit.interop.tensor_files import read_tensors

SIDE = 299  # pixels
FEATURES = 2048
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
NORM, NORM_EPSILON = ("weight", "bias", "running_mean", "running_var"), 0.001
PREPROCESSING = "uint8 → float32, bilinear to 299×299 as TensorFlow 1 (no antialiasing), (x - 128) / 128"

Shape = tuple[int, int, int, int]  # kernel in PyTorch layout: (outputs, inputs, rows, columns)
Params = Mapping[str, tuple[jax.Array, jax.Array]]  # layer name → (kernel (rows, columns, inputs, outputs), bias)
Conv = Callable[..., jax.Array]


def layers() -> dict[str, Shape]:
    """Returns the kernel shape of each layer by name."""
    shapes: dict[str, Shape] = {
        "Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3),
    }  # fmt: skip
    for block, inputs, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        _add(shapes, block, branch1x1=(64, inputs, 1, 1))
        _add(shapes, block, branch5x5_1=(48, inputs, 1, 1), branch5x5_2=(64, 48, 5, 5))
        _add(shapes, block, branch3x3dbl_1=(64, inputs, 1, 1), branch3x3dbl_2=(96, 64, 3, 3))
        _add(shapes, block, branch3x3dbl_3=(96, 96, 3, 3), branch_pool=(pool, inputs, 1, 1))
    _add(shapes, "Mixed_6a", branch3x3=(384, 288, 3, 3), branch3x3dbl_1=(64, 288, 1, 1))
    _add(shapes, "Mixed_6a", branch3x3dbl_2=(96, 64, 3, 3), branch3x3dbl_3=(96, 96, 3, 3))
    for block, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        _add(shapes, block, branch1x1=(192, 768, 1, 1), branch7x7_1=(width, 768, 1, 1))
        _add(shapes, block, branch7x7_2=(width, width, 1, 7), branch7x7_3=(192, width, 7, 1))
        _add(shapes, block, branch7x7dbl_1=(width, 768, 1, 1), branch7x7dbl_2=(width, width, 7, 1))
        _add(shapes, block, branch7x7dbl_3=(width, width, 1, 7), branch7x7dbl_4=(width, width, 7, 1))
        _add(shapes, block, branch7x7dbl_5=(192, width, 1, 7), branch_pool=(192, 768, 1, 1))
    _add(shapes, "Mixed_7a", branch3x3_1=(192, 768, 1, 1), branch3x3_2=(320, 192, 3, 3))
    _add(shapes, "Mixed_7a", branch7x7x3_1=(192, 768, 1, 1), branch7x7x3_2=(192, 192, 1, 7))
    _add(shapes, "Mixed_7a", branch7x7x3_3=(192, 192, 7, 1), branch7x7x3_4=(192, 192, 3, 3))
    for block, inputs in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        _add(shapes, block, branch1x1=(320, inputs, 1, 1), branch3x3_1=(384, inputs, 1, 1))
        _add(shapes, block, branch3x3_2a=(384, 384, 1, 3), branch3x3_2b=(384, 384, 3, 1))
        _add(shapes, block, branch3x3dbl_1=(448, inputs, 1, 1), branch3x3dbl_2=(384, 448, 3, 3))
        _add(shapes, block, branch3x3dbl_3a=(384, 384, 1, 3), branch3x3dbl_3b=(384, 384, 3, 1))
        _add(shapes, block, branch_pool=(192, inputs, 1, 1))
    return shapes


def _add(shapes: dict[str, Shape], block: str, **branches: Shape) -> None:
    shapes.update({f"{block}.{name}": shape for name, shape in branches.items()})


def features(params: Params, images: jax.Array) -> jax.Array:
    """Computes features (B, 2048) float32 of images (B, H, W, 3) uint8, averaged over positions."""

    def conv(x: jax.Array, name: str, stride: int = 1, padding: str = "SAME") -> jax.Array:
        kernel, bias = params[name]
        x = lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )  # fmt: skip
        return jax.nn.relu(x + bias)

    def within(block: str) -> Conv:
        return lambda x, name, *how: conv(x, f"{block}.{name}", *how)

    x = (resize(images) - 128) / 128
    x = conv(x, "Conv2d_1a_3x3", 2, "VALID")  # 149 × 149
    x = conv(x, "Conv2d_2a_3x3", 1, "VALID")
    x = maximum(conv(x, "Conv2d_2b_3x3"), 2)  # 73 × 73
    x = conv(x, "Conv2d_3b_1x1")
    x = maximum(conv(x, "Conv2d_4a_3x3", 1, "VALID"), 2)  # 35 × 35
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _block_35(within(block), x)
    x = _shrink_to_17(within("Mixed_6a"), x)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = _block_17(within(block), x)
    x = _shrink_to_8(within("Mixed_7a"), x)
    x = _block_8(within("Mixed_7b"), x, average)
    return _block_8(within("Mixed_7c"), x, maximum).mean((1, 2))


def _block_35(conv: Conv, x: jax.Array) -> jax.Array:
    five = conv(conv(x, "branch5x5_1"), "branch5x5_2")
    three = conv(conv(conv(x, "branch3x3dbl_1"), "branch3x3dbl_2"), "branch3x3dbl_3")
    return jnp.concatenate([conv(x, "branch1x1"), five, three, conv(average(x), "branch_pool")], -1)


def _shrink_to_17(conv: Conv, x: jax.Array) -> jax.Array:
    once = conv(x, "branch3x3", 2, "VALID")
    twice = conv(conv(conv(x, "branch3x3dbl_1"), "branch3x3dbl_2"), "branch3x3dbl_3", 2, "VALID")
    return jnp.concatenate([once, twice, maximum(x, 2)], -1)


def _block_17(conv: Conv, x: jax.Array) -> jax.Array:
    once, twice = x, x
    for number in (1, 2, 3):
        once = conv(once, f"branch7x7_{number}")
    for number in (1, 2, 3, 4, 5):
        twice = conv(twice, f"branch7x7dbl_{number}")
    return jnp.concatenate([conv(x, "branch1x1"), once, twice, conv(average(x), "branch_pool")], -1)


def _shrink_to_8(conv: Conv, x: jax.Array) -> jax.Array:
    three = conv(conv(x, "branch3x3_1"), "branch3x3_2", 2, "VALID")
    seven = conv(conv(conv(x, "branch7x7x3_1"), "branch7x7x3_2"), "branch7x7x3_3")
    seven = conv(seven, "branch7x7x3_4", 2, "VALID")
    return jnp.concatenate([three, seven, maximum(x, 2)], -1)


def _block_8(conv: Conv, x: jax.Array, pool: Callable[[jax.Array], jax.Array]) -> jax.Array:
    once = conv(x, "branch3x3_1")
    twice = conv(conv(x, "branch3x3dbl_1"), "branch3x3dbl_2")
    parts = [conv(x, "branch1x1"), conv(once, "branch3x3_2a"), conv(once, "branch3x3_2b")]
    parts += [conv(twice, "branch3x3dbl_3a"), conv(twice, "branch3x3dbl_3b"), conv(pool(x), "branch_pool")]
    return jnp.concatenate(parts, -1)


def maximum(x: jax.Array, stride: int = 1) -> jax.Array:
    """Applies 3×3 max pooling, with padding only at stride 1."""
    padding = "SAME" if stride == 1 else "VALID"
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def average(x: jax.Array) -> jax.Array:
    """Applies 3×3 average pooling that excludes the padding."""
    inside = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    total, count = (lax.reduce_window(a, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") for a in (x, inside))
    return total / count


def resize(images: jax.Array) -> jax.Array:
    """Resizes (B, H, W, 3) → (B, 299, 299, 3) float32 like TensorFlow 1's `resize_bilinear`: row i is at i·H/299."""
    rows, columns = (jnp.asarray(_bilinear(size)) for size in images.shape[1:3])
    highest = lax.Precision.HIGHEST
    x = jnp.einsum("rh,bhwc->brwc", rows, images.astype(jnp.float32), precision=highest)
    return jnp.einsum("cw,brwd->brcd", columns, x, precision=highest)


def _bilinear(size: int) -> np.ndarray:
    """Returns (299, size) float32, interpolation weights of the input pixels for each output pixel."""
    at = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
    low = np.minimum(np.floor(at).astype(int), size - 1)
    weights, new = np.zeros((SIDE, size), np.float32), np.arange(SIDE)
    np.add.at(weights, (new, low), 1 - (at - low))
    np.add.at(weights, (new, np.minimum(low + 1, size - 1)), at - low)
    return weights


def find_weights(path: str = "") -> Path:
    """Returns the path of the weights, by default in PyTorch's hub cache; raises UserError if the file is missing."""
    cache = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch") / "hub" / "checkpoints" / WEIGHTS
    file = Path(path).expanduser() if path else cache
    if not file.is_file():
        raise UserError(
            f"Weights of the FID network not found at {file}. Download {URL} to this path, or set --inception to the "
            "downloaded file."
        )
    return file


def load_params(path: str | Path) -> tuple[dict[str, tuple[jax.Array, jax.Array]], str]:
    """Reads the weights file.

    Returns:
        The parameters (float32), and the fingerprint of the file (12 hexadecimal digits).

    Raises:
        UserError: The file can't be read or does not contain this network.
    """
    return fold(read_tensors(path), str(path)), hash_file(path)[:12]


def fold(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Folds batch norms into kernels and biases.

    Args:
        tensors: PyTorch tensors by name.
        where: Name of the file, for error messages.

    Raises:
        UserError: A tensor is missing or has the wrong shape.
    """
    params = {}
    for name, shape in layers().items():
        parts = [f"{name}.conv.weight", *(f"{name}.bn.{part}" for part in NORM)]
        for part, expected in zip(parts, [shape, *[shape[:1]] * len(NORM)], strict=True):
            found = tensors[part].shape if part in tensors else None
            if found != expected:
                problem = "is missing" if found is None else f"has the shape {found}, not {expected}"
                raise UserError(
                    f"The weights in {where} are not the FID network: {part} {problem}. Download {URL} and set "
                    "--inception to it."
                )
        kernel, scale, bias, mean, variance = (np.asarray(tensors[part], np.float64) for part in parts)
        scale = scale / np.sqrt(variance + NORM_EPSILON)
        folded = (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0)
        params[name] = jnp.asarray(folded, jnp.float32), jnp.asarray(bias - mean * scale, jnp.float32)
    return params
