"""Image encoders: a trained AutoencoderKL, from diffusers' format, as the diffusion model sees it.

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
SUBFOLDER = "vae"  # of a whole pipeline


def load_image_encoder(
    name: str, dtype: str = "float32", sharding: jax.sharding.Sharding | None = None
) -> "ImageEncoder":
    """Loads diffusers' `config.json` and `diffusion_pytorch_model.safetensors`.

    Args:
        name: A folder, the name of one that comes with the package (`openmoji_vae`), or a repository on the Hugging
            Face hub, as in 'stabilityai/stable-diffusion-xl-base-1.0'; the subfolder `vae` of either is preferred.
        dtype: Dtype of convolutions and products, 'float32' or 'bfloat16'. Latents are float32 in any case.
        sharding: How batches are split over devices of this process; parameters are copied to all of them.

    Raises:
        UserError: A file is missing, or something in it is not supported.
    """
    files = [CONFIG_FILE, WEIGHTS_FILE]
    folder = resolve_folder(name, [*files, *(f"{SUBFOLDER}/{file}" for file in files)])
    known_as = folder.resolve().name if Path(name).is_dir() else name  # the hub's folders are named by their commit
    if (folder / SUBFOLDER / CONFIG_FILE).is_file():
        folder = folder / SUBFOLDER
    config = read_config(folder)
    return ImageEncoder(config, load_parameters(folder, config), known_as, dtype, sharding)


class ImageEncoder:
    """A trained autoencoder; latents are normalized as diffusers' pipelines do.

    The fingerprint is a short hash of configuration and weights, but not of the dtype of the products.
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
        """Encodes images (B, f·H, f·W, 3), uint8 or in [-1, 1]: mean and deviation of latents, (B, H, W, C) float32.

        Raises:
            UserError: Height or width is not a multiple of `downsample`.
        """
        height, width = images.shape[1:3]
        if height % self.downsample or width % self.downsample:
            raise UserError(
                f"Images of {height}×{width} pixels cannot be encoded by '{self.name}': "
                f"resize or crop them so that both sides are multiples of {self.downsample}."
            )
        if images.dtype != np.uint8:
            images = np.asarray(images, np.float32) if isinstance(images, np.ndarray) else images.astype(jnp.float32)
        return self._encode(self._parameters, images)

    def decode(self, latents: jax.Array | np.ndarray) -> jax.Array:
        """Images (B, f·H, f·W, 3) float32 in [-1, 1] of normalized latents (B, H, W, C)."""
        return self._decode(self._parameters, latents.astype(np.float32))


def latent_scaling(config: AutoencoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """(shift, scale), float32 (C,) or (): normalized = (latent - shift) · scale, as in diffusers' pipelines."""
    if config.latents_mean is not None and config.latents_std is not None:
        shift, scale = np.asarray(config.latents_mean), config.scaling_factor / np.asarray(config.latents_std)
    else:
        shift, scale = np.asarray(config.shift_factor or 0.0), np.asarray(config.scaling_factor)
    return shift.astype(np.float32), scale.astype(np.float32)


def fingerprint(config: AutoencoderConfig, parameters: Parameters) -> str:
    """Twelve hexadecimal digits that change with the configuration or any weight."""
    settings = dataclasses.asdict(config)
    for kinds in ("down_block_types", "up_block_types"):  # the usual blocks are not mentioned, as in old shards
        if not settings[kinds]:
            del settings[kinds]
    leaves = jax.tree_util.tree_flatten_with_path(parameters)[0]
    return hash_arrays(((tensor_name(path), leaf) for path, leaf in leaves), json.dumps(settings, sort_keys=True))[:12]


def read_config(folder: str | Path) -> AutoencoderConfig:
    """Reads diffusers' `config.json`; fields that are not known here are passed over if they are off or empty.

    Raises:
        UserError: The file is missing or broken, or asks for something that AutoencoderKL here does not do.
    """
    file = Path(folder) / CONFIG_FILE
    fields = read_json(file)
    for name, only in {"_class_name": "AutoencoderKL", "act_fn": "silu"}.items():
        value = fields.pop(name, only)
        if value != only:
            raise UserError(f"{file}: '{name}' is {value!r}, but only {only!r} is supported here.")
    known = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    notes = {name for name in fields if name.startswith("_") or (name not in known and not fields[name])}
    if unknown := sorted(set(fields) - known - notes):
        raise UserError(f"{file}: field '{unknown[0]}' is not supported; AutoencoderKL has {', '.join(sorted(known))}.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k not in notes}
    for name, usual, other in (
        ("down_block_types", DOWN_BLOCK, ATTENTION_DOWN_BLOCK),
        ("up_block_types", UP_BLOCK, ATTENTION_UP_BLOCK),
    ):
        kinds = values.get(name, ())
        if kinds and (len(kinds) != len(values.get("block_out_channels", (64,))) or set(kinds) - {usual, other}):
            raise UserError(f"{file}: '{name}' must be {usual} or {other}, one for each of 'block_out_channels'.")
        values[name] = () if set(kinds) == {usual} else kinds
    config = AutoencoderConfig(**values)
    if (config.latents_mean is None) != (config.latents_std is None):
        raise UserError(f"{file}: 'latents_mean' and 'latents_std' must be given together.")
    for width in config.block_out_channels:
        if width % config.norm_num_groups:
            raise UserError(f"{file}: 'norm_num_groups' ({config.norm_num_groups}) does not divide width {width}.")
    return config


def load_parameters(folder: str | Path, config: AutoencoderConfig) -> Parameters:
    """Reads diffusers' weights into float32 arrays on the host; raises UserError if they do not fit `config`."""
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(
            f"No weights in {folder}: there is no {WEIGHTS_FILE}; if there is a .bin file, run "
            f"python -m micro_dit.encoders.convert_weights FILE FOLDER."
        )
    tensors = {present_name(name): tensor for name, tensor in read_tensors([file]).items()}
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))))
    return to_parameters(tensors, shapes, file)


def save_autoencoder(
    folder: str | Path, config: AutoencoderConfig, parameters: Parameters, dtype: np.typing.DTypeLike = np.float32
) -> None:
    """Writes a folder that `load_image_encoder` and diffusers' `AutoencoderKL.from_pretrained` read."""
    from safetensors.numpy import save

    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters)
    named = {tensor_name(path): np.asarray(leaf, dtype) for path, leaf in leaves}
    tensors = {name: to_torch(name, array) for name, array in named.items()}
    fields = {"_class_name": "AutoencoderKL", "act_fn": "silu"} | dataclasses.asdict(config)
    fields["down_block_types"], fields["up_block_types"] = config.block_types()
    write_atomically(Path(folder) / WEIGHTS_FILE, save(tensors, {"format": "pt"}))
    write_atomically(Path(folder) / CONFIG_FILE, json.dumps(fields, indent=2) + "\n")


def present_name(name: str) -> str:
    """Today's name of a tensor that old diffusers files call by another one."""
    today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(?<=\.attentions\.)(\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{today[m[2]]}.", name)
