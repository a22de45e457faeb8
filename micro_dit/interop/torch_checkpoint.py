"""Lossless conversion between the public PyTorch release's state dict and this package's parameters.

The release stores Linear weights as (out, in) and images as NCHW; this package uses (in, out) and NHWC. The release
also stores two buffers, the position table and a mask token of zeros, which this package computes.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from micro_dit.errors import UserError
from micro_dit.models.config import SIZES, DiTConfig, make_config
from micro_dit.models.dit import abstract_params
from micro_dit.models.embeddings import position_table

# Applied in order to this package's names; the order matters only where one pattern is a prefix of another.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^patch_embedding\.", "x_embedder."),
    (r"^noise_embedding\.fc1\.", "t_embedder.mlp.0."),
    (r"^noise_embedding\.fc2\.", "t_embedder.mlp.2."),
    (r"^caption_projection\.", "y_embedder.y_proj."),
    (r"^caption_block\.", "y_emb_preprocess."),
    (r"^pooled_caption\.", "pooled_y_emb_process."),
    (r"^mixer_in\.", "patch_mixer_map_xin."),
    (r"^mixer_caption_in\.", "patch_mixer_map_y."),
    (r"^mixer_out\.", "patch_mixer_map_xout."),
    (r"^mixer\.", "patch_mixer."),
    (r"(?<=^patch_mixer_map_)(xin|y|xout)\.norm\.", r"\1.0."),
    (r"(?<=^patch_mixer_map_)(xin|y|xout)\.linear\.", r"\1.1."),
    (r"\.cross_attn\.(q|kv)\.", r".cross_attn.\1_linear."),
    (r"\.adaln\.", ".adaLN_modulation.1."),
    (r"^final_layer\.norm\.", "final_layer.norm_final."),
    (r"\.(kernel|scale)$", ".weight"),
)
# Components that PyTorch's wrappers and trainers add to names.
WRAPPERS = ("dit", "module", "_orig_mod")
POSITION_SCALES = (1.0, 2.0, 4.0)  # pos_interp_scale at 256, 512 and 1024 px


def release_name(name: str) -> str:
    """Returns the release's name of a parameter: 'mixer.1.attn.qkv.kernel' → 'patch_mixer.1.attn.qkv.weight'."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def to_release_layout(name: str, value: np.ndarray, config: DiTConfig) -> np.ndarray:
    """Converts an array to the release's layout; `name` is this package's name."""
    if name == "patch_embedding.proj.kernel":  # (p·p·C, D) → (D, C, p, p)
        p = config.patch_size
        return value.reshape(p, p, config.in_channels, -1).transpose(3, 2, 0, 1)
    return value.T if name.endswith(".kernel") else value


def from_release_layout(name: str, value: np.ndarray) -> np.ndarray:
    """Converts the release's array to this package's layout; `name` is this package's name."""
    if name == "patch_embedding.proj.kernel":  # (D, C, p, p) → (p·p·C, D)
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value.T if name.endswith(".kernel") else value


def release_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the release's state dict for this network, including buffers."""
    p, C = config.patch_size, config.in_channels
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, config.tokens, config.dim), "mask_token": (1, 1, p * p * C)}
    for name, leaf in abstract_params(config).items():
        shapes[release_name(name)] = to_release_layout(name, np.broadcast_to(np.float32(0), leaf.shape), config).shape
    return shapes


def without_wrappers(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Strips WRAPPERS from the names: 'module.dit._orig_mod.pos_embed' becomes 'pos_embed'.

    Raises:
        UserError: Two tensors would have the same name.
    """
    plain: dict[str, str] = {}
    for name in state_dict:
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise UserError(f"The state dict has both {plain[short]} and {name}. Remove one of them.")
        plain[short] = name
    return {short: state_dict[name] for short, name in plain.items()}


def recognize(state_dict: Mapping[str, np.ndarray]) -> tuple[str, DiTConfig]:
    """Infers the network's configuration from a state dict.

    The width determines the size; shapes determine the patch size and the latent and caption channels; and the position
    table determines the grid and the position scale, one of POSITION_SCALES.

    Returns:
        The size, one of SIZES, and the configuration.

    Raises:
        UserError: The state dict is not from a MicroDiT, or has an unknown width or position scale.
    """
    for name, axes in (("x_embedder.proj.weight", 4), ("y_embedder.y_proj.fc1.weight", 2), ("pos_embed", 3)):
        if name not in state_dict or state_dict[name].ndim != axes:
            begin = ", ".join(list(state_dict)[:3])
            raise UserError(
                f"The weights are not those of a MicroDiT: no {name} with {axes} dimensions among {begin}, …. Pass "
                "weights of the public release."
            )
    dim, channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    size = next((size for size, row in SIZES.items() if row["dim"] == dim), None)
    if size is None:
        known = ", ".join(f"{row['dim']} ({size})" for size, row in SIZES.items())
        raise UserError(
            f"The network has width {dim}, but the known widths are {known}. Set --model to a config.json with its "
            "configuration."
        )
    config = make_config(
        size,
        input_size=math.isqrt(state_dict["pos_embed"].shape[1]) * patch_size,
        patch_size=patch_size,
        in_channels=channels,
        caption_channels=state_dict["y_embedder.y_proj.fc1.weight"].shape[1],
    )
    for scale in POSITION_SCALES:
        if is_position_table(state_dict["pos_embed"], scaled := dataclasses.replace(config, pos_interp_scale=scale)):
            scaled.check()
            return size, scaled
    tried = ", ".join(map(str, POSITION_SCALES))
    raise UserError(
        f"pos_embed does not match the position table for any of the scales {tried}. Set --model to a config.json with "
        "the network's configuration."
    )


def is_position_table(stored: np.ndarray, config: DiTConfig) -> bool:
    """Returns whether a stored table equals the configuration's position table, up to the rounding of its dtype."""
    table = position_table(config.dim, config.grid, config.pos_interp_scale)[None]
    tolerance = max(1e-5, float(jnp.finfo(stored.dtype).eps))
    return stored.shape == table.shape and bool(np.abs(stored.astype(np.float32) - table).max(initial=0.0) <= tolerance)


def from_state_dict(state_dict: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Converts the release's state dict to this package's parameters, as views.

    Raises:
        UserError: Tensors are missing, not expected or have another shape (the message lists all of them), or the
            buffers do not match the configuration.
    """
    expected = release_shapes(config)
    problems = [f"missing {name}" for name in expected if name not in state_dict]
    problems += [f"unexpected {name}" for name in state_dict if name not in expected]
    problems += [
        f"{name} has shape {tuple(state_dict[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != tuple(shape)
    ]
    if problems:
        raise UserError(f"The state dict does not match the network: {'; '.join(problems)}.")
    if not is_position_table(state_dict["pos_embed"], config):
        raise UserError(
            f"The state dict's pos_embed is not the position table for pos_interp_scale {config.pos_interp_scale}. Set "
            "'pos_interp_scale' to the value used in training (2.0 for the released 512 px checkpoints)."
        )
    if np.any(state_dict["mask_token"]):
        raise UserError(
            "The state dict's mask_token is not zero. Such weights are not supported, because this network replaces "
            "dropped patches with zeros."
        )
    return {name: from_release_layout(name, state_dict[release_name(name)]) for name in abstract_params(config)}


def to_state_dict(params: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Converts parameters to the release's state dict, including buffers; returns views, some not contiguous."""
    table = position_table(config.dim, config.grid, config.pos_interp_scale)
    mask_token = np.zeros((1, 1, config.patch_size**2 * config.in_channels), np.float32)
    arrays = {release_name(k): to_release_layout(k, np.asarray(v), config) for k, v in params.items()}
    return {"pos_embed": table[None], "mask_token": mask_token} | arrays
