"""Reading golden tensors: a folder of .npz files with a .json beside each (computed by the public release)."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from micro_dit.models.config import DiTConfig
from micro_dit.models.masking import TokenMask


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of an .npz, and its .json."""
    with np.load(path) as arrays:
        return dict(arrays), json.loads(path.with_suffix(".json").read_text())


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays of one folder, by their names in it."""
    return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}


def config_of(arguments: dict[str, Any]) -> DiTConfig:
    """The release's constructor arguments as our configuration."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return DiTConfig(**fields)


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def caption(y: np.ndarray) -> np.ndarray:
    """(B, 1, L, Y) → (B, L, Y)."""
    return y[:, 0] if y.ndim == 4 else y


def mask_of(case: dict[str, np.ndarray]) -> TokenMask | None:
    if "ids_keep" not in case:
        return None
    return TokenMask(jnp.asarray(case["ids_keep"], jnp.int32), jnp.asarray(case["ids_restore"], jnp.int32))


def assert_close(ours: Any, golden: np.ndarray, tolerance: float, what: str) -> None:
    """Relative L2 and the largest difference over the largest value, both within `tolerance`."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    assert ours.shape == golden.shape, f"{what}: shape {ours.shape}, golden {golden.shape}"
    difference, scale = np.abs(ours - golden), np.abs(golden).max(initial=0.0)
    if scale == 0.0:
        assert difference.max(initial=0.0) <= 1e-7, f"{what}: golden is zero, ours reaches {difference.max()}"
        return
    relative_l2 = np.linalg.norm(difference) / np.linalg.norm(golden)
    assert relative_l2 <= tolerance, f"{what}: relative L2 {relative_l2:.1e}"
    assert difference.max() / scale <= tolerance, f"{what}: relative maximum {difference.max() / scale:.1e}"


def draw(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normals of the full-size cases, seeded by name."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    return generator.standard_normal(shape, dtype=np.float32)


def draw_parameter(seed: int, name: str, shape: tuple[int, ...], recipe: dict[str, Any]) -> np.ndarray:
    """A parameter of the full-size cases, by the recipe in their .json."""
    z = draw(seed, name, shape)
    if len(shape) == 1:
        return 1 + np.float32(0.1) * z if name.endswith(".weight") else np.float32(0.05) * z
    gain = recipe["default_gain"]
    for substring, value in recipe["gains_last_substring_match_wins"]:
        gain = value if substring in name else gain
    fan_in = shape[1] if len(shape) == 3 else int(np.prod(shape[1:]))
    return z * np.float32(gain / np.sqrt(fan_in))
