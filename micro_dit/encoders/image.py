"""Image encoders: a trained AutoencoderKL in diffusers' format, with normalized latents.

Shapes: B images · H W latent rows, columns · C latent channels; pixels are (B, f·H, f·W, 3) with f the downsampling.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from micro_dit.encoders.autoencoder import (
    ATTENTION_DOWN_BLOCK,
    ATTENTION_UP_BLOCK,
    DOWN_BLOCK,
    UP_BLOCK,
    AutoencoderConfig,
    AutoencoderKL,
)
from micro_dit.encoders.devices import Devices
from micro_dit.encoders.hub import read_json, resolve_folder
from micro_dit.encoders.weights import Parameters, read_tensors, tensor_name, to_parameters, to_torch
from micro_dit.errors import UserError
from micro_dit.files import hash_arrays, write_atomically

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SUBFOLDER = "vae"  # folder of the autoencoder in a diffusers pipeline


def load_image_encoder(
    name: str, dtype: str = "float32", sharding: jax.sharding.Sharding | None = None
) -> "ImageEncoder":
    """Loads an image encoder from diffusers' `config.json` and `diffusion_pytorch_model.safetensors`.

    Args:
        name: A folder, the name of an encoder included in the package (`openmoji_vae`), or a repository on the Hugging
            Face Hub such as 'stabilityai/stable-diffusion-xl-base-1.0'. Its subfolder `vae` is used if there is one.
        dtype: Dtype of convolutions and matrix products, 'float32' or 'bfloat16'. Latents are always float32.
        sharding: How batches are split over the devices of this process; parameters are replicated.

    Raises:
        UserError: A file is missing, or a setting in it is not supported.
    """
    files = [CONFIG_FILE, WEIGHTS_FILE]
    folder = resolve_folder(name, [*files, *(f"{SUBFOLDER}/{file}" for file in files)])
    known_as = folder.resolve().name if Path(name).is_dir() else name  # folders in the Hub's cache are named by commit
    if (folder / SUBFOLDER / CONFIG_FILE).is_file():
        folder = folder / SUBFOLDER
    config = read_config(folder)
    return ImageEncoder(config, load_parameters(folder, config), known_as, dtype, sharding)


class ImageEncoder:
    """A trained autoencoder whose latents are normalized as in diffusers' pipelines.

    The fingerprint is a short hash of the configuration and the weights; it does not depend on the compute dtype.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        parameters: Parameters,
        name: str,
        dtype: str = "float32",
        sharding: jax.sharding.Sharding | None = None,
    ):
        self.name, self.config = name, config
        self.channels, self.downsample = config.latent_channels, config.downsample  # C, pixels per latent
        self.fingerprint = fingerprint(config, parameters)
        self._devices = Devices(dtype, sharding)
        self._parameters = self._devices.replicate(parameters)
        graph = nnx.graphdef(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0))))
        shift, scale = latent_scaling(config)

        def encode(parameters: Parameters, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            pixels = images / 127.5 - 1.0 if images.dtype == jnp.uint8 else images
            mean, log_variance = nnx.merge(graph, parameters).encode(pixels.astype(dtype))
            return (mean - shift) * scale, jnp.exp(0.5 * log_variance) * scale

        def decode(parameters: Parameters, latents: jax.Array) -> jax.Array:
            images = nnx.merge(graph, parameters).decode((latents / scale + shift).astype(dtype))
            return jnp.clip(images, -1.0, 1.0)

        self._encode, self._decode = self._devices.compile(encode), self._devices.compile(decode)

    def encode(self, images: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Encodes images as Gaussian distributions over normalized latents.

        Args:
            images: (B, f·H, f·W, 3), uint8, or float in [-1, 1].

        Returns:
            Mean and standard deviation of the latents, each (B, H, W, C) float32.

        Raises:
            UserError: Height or width is not a multiple of `downsample`.
        """
        height, width = images.shape[1:3]
        if height % self.downsample or width % self.downsample:
            raise UserError(
                f"Images of {height}×{width} pixels cannot be encoded by '{self.name}'. "
                f"Resize or crop them so that both sides are multiples of {self.downsample}."
            )
        if images.dtype != np.uint8:
            images = np.asarray(images, np.float32) if isinstance(images, np.ndarray) else images.astype(jnp.float32)
        return self._encode(self._parameters, images)

    def decode(self, latents: jax.Array | np.ndarray) -> jax.Array:
        """Decodes normalized latents (B, H, W, C) to images (B, f·H, f·W, 3) float32 in [-1, 1]."""
        return self._decode(self._parameters, latents.astype(np.float32))


def latent_scaling(config: AutoencoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the normalization of diffusers' pipelines, normalized = (latent - shift) · scale.

    Returns:
        shift and scale, each float32 of shape (C,) or ().
    """
    if config.latents_mean is not None and config.latents_std is not None:
        shift, scale = np.asarray(config.latents_mean), config.scaling_factor / np.asarray(config.latents_std)
    else:
        shift, scale = np.asarray(config.shift_factor or 0.0), np.asarray(config.scaling_factor)
    return shift.astype(np.float32), scale.astype(np.float32)


def fingerprint(config: AutoencoderConfig, parameters: Parameters) -> str:
    """Returns twelve hexadecimal digits of a hash of the configuration and all weights."""
    settings = dataclasses.asdict(config)
    for kinds in ("down_block_types", "up_block_types"):  # without default blocks, so old fingerprints stay valid
        if not settings[kinds]:
            del settings[kinds]
    leaves = jax.tree_util.tree_flatten_with_path(parameters)[0]
    return hash_arrays(((tensor_name(path), leaf) for path, leaf in leaves), json.dumps(settings, sort_keys=True))[:12]


def read_config(folder: str | Path) -> AutoencoderConfig:
    """Reads diffusers' `config.json`, ignoring unknown fields that are false or empty.

    Raises:
        UserError: The file is missing or invalid, or sets an option that `AutoencoderKL` does not support.
    """
    file = Path(folder) / CONFIG_FILE
    fields = read_json(file)
    for name, only in {"_class_name": "AutoencoderKL", "act_fn": "silu"}.items():
        value = fields.pop(name, only)
        if value != only:
            raise UserError(f"{file}: '{name}' is {value!r}, but only {only!r} is supported.")
    known = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    notes = {name for name in fields if name.startswith("_") or (name not in known and not fields[name])}
    if unknown := sorted(set(fields) - known - notes):
        raise UserError(f"{file}: field '{unknown[0]}' is not supported. Supported are {', '.join(sorted(known))}.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k not in notes}
    for name, usual, other in (
        ("down_block_types", DOWN_BLOCK, ATTENTION_DOWN_BLOCK),
        ("up_block_types", UP_BLOCK, ATTENTION_UP_BLOCK),
    ):
        kinds = values.get(name, ())
        if kinds and (len(kinds) != len(values.get("block_out_channels", (64,))) or set(kinds) - {usual, other}):
            raise UserError(f"{file}: '{name}' must list {usual} or {other} for each entry of 'block_out_channels'.")
        values[name] = () if set(kinds) == {usual} else kinds
    config = AutoencoderConfig(**values)
    if (config.latents_mean is None) != (config.latents_std is None):
        raise UserError(f"{file}: 'latents_mean' and 'latents_std' must be set together.")
    for width in config.block_out_channels:
        if width % config.norm_num_groups:
            raise UserError(f"{file}: 'norm_num_groups' ({config.norm_num_groups}) does not divide width {width}.")
    return config


def load_parameters(folder: str | Path, config: AutoencoderConfig) -> Parameters:
    """Reads diffusers' weights into float32 arrays on the host; raises UserError if they do not match `config`."""
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has no weights ({WEIGHTS_FILE}). If it has a .bin file, run "
            f"`python -m micro_dit.encoders.convert_weights FILE FOLDER`."
        )
    tensors = {present_name(name): tensor for name, tensor in read_tensors([file]).items()}
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))))
    return to_parameters(tensors, shapes, file)


def save_autoencoder(
    folder: str | Path, config: AutoencoderConfig, parameters: Parameters, dtype: np.typing.DTypeLike = np.float32
) -> None:
    """Writes a folder that `load_image_encoder` and diffusers' `AutoencoderKL.from_pretrained` can read."""
    from safetensors.numpy import save

    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters)
    named = {tensor_name(path): np.asarray(leaf, dtype) for path, leaf in leaves}
    tensors = {name: to_torch(name, array) for name, array in named.items()}
    fields = {"_class_name": "AutoencoderKL", "act_fn": "silu"} | dataclasses.asdict(config)
    fields["down_block_types"], fields["up_block_types"] = config.block_types()
    write_atomically(Path(folder) / WEIGHTS_FILE, save(tensors, {"format": "pt"}))
    write_atomically(Path(folder) / CONFIG_FILE, json.dumps(fields, indent=2) + "\n")


def present_name(name: str) -> str:
    """Returns the current name of a tensor that may have its name in old diffusers files."""
    current = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = r"(?<=\.attentions\.)(\d+)\.(query|key|value|proj_attn)\."
    return re.sub(pattern, lambda match: f"{match[1]}.{current[match[2]]}.", name)
