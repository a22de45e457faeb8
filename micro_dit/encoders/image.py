"""The image autoencoder: diffusers' AutoencoderKL as a Flax NNX module, in NHWC.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.1. Modules and
parameters carry diffusers' names, so that a published `config.json` + `diffusion_pytorch_model.safetensors` loads by
transposing each array, and what is saved here loads in diffusers.

Shapes: B images · H W latent rows, columns · C latent channels; pixels are (B, f·H, f·W, 3) with f the downsampling.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from micro_dit.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
EPSILON = 1e-6  # of every group norm in diffusers' autoencoder

Parameters = dict[str, Any]  # nested as the modules are, with jax arrays as leaves


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """diffusers' configuration of an AutoencoderKL, same names and same defaults."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def downsample(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


def uniform_parameter(shape: tuple[int, ...], inputs: int, rngs: nnx.Rngs) -> nnx.Param:
    """A float32 parameter initialized as PyTorch does by default, for a layer that adds up so many inputs."""
    bound = 1 / math.sqrt(inputs)
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))


class Conv(nnx.Module):
    """Square convolution of (B, H, W, I) with a weight of (size, size, I, O)."""

    def __init__(self, channels_in: int, channels_out: int, size: int, *, rngs: nnx.Rngs):
        inputs = size * size * channels_in
        self.weight = uniform_parameter((size, size, channels_in, channels_out), inputs, rngs)
        self.bias = uniform_parameter((channels_out,), inputs, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        around = (self.weight.shape[0] // 2,) * 2
        return convolve(x, self.weight[...], (around, around)) + self.bias[...]


def convolve(x: jax.Array, weight: jax.Array, padding: Sequence[tuple[int, int]], stride: int = 1) -> jax.Array:
    """(B, H, W, I) with (h, w, I, O), padded by (before, after) zeros in both directions, to (B, H', W', O)."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, weight, (stride, stride), padding, dimension_numbers=layout)


class Linear(nnx.Module):
    """x @ weight + bias, with a weight of (I, O)."""

    def __init__(self, channels_in: int, channels_out: int, *, rngs: nnx.Rngs):
        self.weight = uniform_parameter((channels_in, channels_out), channels_in, rngs)
        self.bias = uniform_parameter((channels_out,), channels_in, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...] + self.bias[...]


class GroupNorm(nnx.Module):
    """Group normalization of (B, H, W, C) over the pixels and the channels of a group."""

    def __init__(self, channels: int, groups: int):
        self.weight = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        def group_mean(value: jax.Array) -> jax.Array:  # (B, H, W, C) -> (B, 1, 1, C), equal within a group
            per_channel = value.mean((1, 2))
            per_group = per_channel.reshape(len(value), self.groups, -1).mean(-1)
            return jnp.repeat(per_group, value.shape[-1] // self.groups, -1)[:, None, None, :]

        x = x - group_mean(x)
        return x * (jax.lax.rsqrt(group_mean(x * x) + EPSILON) * self.weight[...]) + self.bias[...]


class ResnetBlock(nnx.Module):
    """Two normalized convolutions around a shortcut (diffusers' ResnetBlock2D without a time embedding)."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(channels_in, groups)
        self.conv1 = Conv(channels_in, channels_out, 3, rngs=rngs)
        self.norm2 = GroupNorm(channels_out, groups)
        self.conv2 = Conv(channels_out, channels_out, 3, rngs=rngs)
        if channels_in != channels_out:
            self.conv_shortcut = Conv(channels_in, channels_out, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nnx.Module):
    """Single-head self-attention over all pixels (diffusers' Attention as its autoencoder uses it)."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups)
        self.to_q = Linear(channels, channels, rngs=rngs)
        self.to_k = Linear(channels, channels, rngs=rngs)
        self.to_v = Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, channels = x.shape
        h = self.group_norm(x).reshape(B, H * W, 1, channels)
        h = jax.nn.dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).reshape(x.shape)


class Downsample(nnx.Module):
    """Convolution of stride 2; the padding is on the right and at the bottom only."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return convolve(x, self.conv.weight[...], ((0, 1), (0, 1)), stride=2) + self.conv.bias[...]


class Upsample(nnx.Module):
    """Each pixel twice in both directions, then a 3×3 convolution.

    Among doubled pixels a 3×3 window sees only 2×2 different ones, so the same numbers come from four 2×2
    convolutions of the small image, one for each parity of the row and column that is written: 4/9 of the products,
    and a training step on a CPU four times as fast as through `repeat`, whose gradient is slow.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.conv.weight[...]

        def fold(weight: jax.Array, axis: int, parity: int) -> jax.Array:
            """Add up the two of three taps along `axis` that fall on the same pixel."""
            first, middle, last = jnp.split(weight, 3, axis)
            return jnp.concatenate([first + middle, last] if parity else [first, middle + last], axis)

        def written(row: int, column: int) -> jax.Array:
            kernel = fold(fold(weight, 0, row), 1, column)
            return convolve(x, kernel, ((1 - row, row), (1 - column, column)))

        B, H, W, channels = x.shape
        rows = [jnp.stack([written(row, 0), written(row, 1)], axis=3) for row in (0, 1)]  # (B, H, W, 2, channels) each
        return jnp.stack(rows, axis=2).reshape(B, 2 * H, 2 * W, channels) + self.conv.bias[...]


class DownBlock(nnx.Module):
    """Residual blocks, then half the size unless it is the last level (diffusers' DownEncoderBlock2D)."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, last: bool, *, rngs: nnx.Rngs):
        widths = [channels_in] + [channels_out] * layers
        self.resnets = nnx.List([ResnetBlock(widths[i], channels_out, groups, rngs=rngs) for i in range(layers)])
        self.downsamplers = nnx.List([] if last else [Downsample(channels_out, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """Residual blocks, then twice the size unless it is the last level (diffusers' UpDecoderBlock2D)."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, last: bool, *, rngs: nnx.Rngs):
        widths = [channels_in] + [channels_out] * layers
        self.resnets = nnx.List([ResnetBlock(widths[i], channels_out, groups, rngs=rngs) for i in range(layers)])
        self.upsamplers = nnx.List([] if last else [Upsample(channels_out, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class MidBlock(nnx.Module):
    """Residual block, attention where the configuration asks for it, residual block (diffusers' UNetMidBlock2D)."""

    def __init__(self, channels: int, groups: int, attention: bool, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, groups, rngs=rngs)] if attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Pixels (B, f·H, f·W, 3) to the mean and log-variance of the latents, (B, H, W, 2·C)."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], 3, rngs=rngs)
        self.down_blocks: nnx.List[DownBlock] = nnx.List()
        for i, width in enumerate(widths):
            before, last = widths[max(i - 1, 0)], i == len(widths) - 1
            self.down_blocks.append(DownBlock(before, width, config.layers_per_block, groups, last, rngs=rngs))
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents (B, H, W, C) to pixels (B, f·H, f·W, 3)."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], 3, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention, rngs=rngs)
        self.up_blocks: nnx.List[UpBlock] = nnx.List()
        for i, width in enumerate(widths):
            before, last = widths[max(i - 1, 0)], i == len(widths) - 1
            self.up_blocks.append(UpBlock(before, width, config.layers_per_block + 1, groups, last, rngs=rngs))
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """diffusers' AutoencoderKL: unscaled latents in, unscaled latents out."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        channels = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * channels, 2 * channels, 1, rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, channels, 1, rngs=rngs)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance, each (B, H, W, C) float32, of images (B, f·H, f·W, 3) in [-1, 1]."""
        moments = self.encoder(images)
        if hasattr(self, "quant_conv"):
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images (B, f·H, f·W, 3), about [-1, 1], of latents (B, H, W, C)."""
        if hasattr(self, "post_quant_conv"):
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


def read_config(folder: str | Path) -> AutoencoderConfig:
    """Reads diffusers' `config.json`.

    Raises:
        UserError: The file is missing or broken, or asks for something that AutoencoderKL here does not do.
    """
    file = Path(folder) / CONFIG_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"No image autoencoder in {folder}: cannot read {file} ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); download the autoencoder again.") from error
    fields = {name: value for name, value in fields.items() if not (name.startswith("_") and name != "_class_name")}
    levels = len(fields.get("block_out_channels", (64,)))
    fixed = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for name, only in fixed.items():
        value = fields.pop(name, only)
        if value != only:
            raise UserError(f"{file}: '{name}' is {value!r}, but only {only!r} is supported here.")
    known = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    if unknown := sorted(set(fields) - known):
        raise UserError(f"{file}: field '{unknown[0]}' is not supported; AutoencoderKL has {', '.join(sorted(known))}.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    config = AutoencoderConfig(**values)
    if (config.latents_mean is None) != (config.latents_std is None):
        raise UserError(f"{file}: 'latents_mean' and 'latents_std' must be given together.")
    for width in config.block_out_channels:
        if width % config.norm_num_groups:
            raise UserError(f"{file}: 'norm_num_groups' ({config.norm_num_groups}) does not divide width {width}.")
    return config


def parameter_shapes(config: AutoencoderConfig) -> Parameters:
    """The nested dictionary of parameters, as shapes only."""
    model = nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model))


def load_parameters(folder: str | Path, config: AutoencoderConfig) -> Parameters:
    """Reads diffusers' weights into float32 arrays, nested as the modules are.

    Raises:
        UserError: The file is missing or broken, or its tensors are not exactly those of the configuration.
    """
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    file = Path(folder) / WEIGHTS_FILE
    try:
        tensors = {_present_name(name): np.asarray(value, np.float32) for name, value in load_file(file).items()}
    except OSError as error:
        raise UserError(f"No image autoencoder in {folder}: cannot read {file} ({error.strerror or error}).") from error
    except SafetensorError as error:
        raise UserError(f"{file} is not a valid safetensors file ({error}); download it again.") from error
    leaves, structure = jax.tree_util.tree_flatten_with_path(parameter_shapes(config))
    expected = {_tensor_name(path): leaf.shape for path, leaf in leaves}
    arrays = {name: _to_ours(tensor) for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in expected if name not in arrays]
    problems += [f"{name} is not expected" for name in arrays if name not in expected]
    problems += [
        f"{name} has shape {tensors[name].shape}, expected {_to_theirs(np.empty(shape)).shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if problems:
        raise UserError(f"{file} does not fit {CONFIG_FILE} beside it: {'; '.join(problems)}.")
    return jax.tree_util.tree_unflatten(structure, [jnp.asarray(arrays[name]) for name in expected])


def save_autoencoder(
    folder: str | Path, config: AutoencoderConfig, parameters: Parameters, dtype: np.typing.DTypeLike = np.float32
) -> None:
    """Writes a folder that `load_image_encoder` and diffusers' `AutoencoderKL.from_pretrained` read.

    Files that are there are replaced whole: a reader sees the old or the new one.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters)
    tensors = {_tensor_name(path): _to_theirs(np.asarray(leaf)).astype(dtype) for path, leaf in leaves}
    levels = len(config.block_out_channels)
    fields = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **dataclasses.asdict(config),
    }
    text = json.dumps(fields, indent=2) + "\n"
    for name, data in ((WEIGHTS_FILE, save(tensors, {"format": "pt"})), (CONFIG_FILE, text.encode())):
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_bytes(data)
        temporary.replace(folder / name)


def _tensor_name(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in path)


def _present_name(name: str) -> str:
    """Today's name of a tensor that old diffusers files call by another one."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def _to_ours(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's (O, I, h, w) or (O, I) to (h, w, I, O) or (I, O)."""
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_theirs(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)


def load_image_encoder(path: str) -> "ImageEncoder":
    """Loads a folder with diffusers' `config.json` and `diffusion_pytorch_model.safetensors`.

    Args:
        path: The folder, or the name of one that comes with the package: `openmoji_vae`.

    Raises:
        UserError: A file is missing, or something in it is not supported.
    """
    shipped = Path(__file__).parent.parent / "assets" / path
    folder = shipped if not Path(path).exists() and shipped.exists() else Path(path)
    config = read_config(folder)
    return ImageEncoder(config, load_parameters(folder, config), name=folder.resolve().name)


class ImageEncoder:
    """A trained autoencoder as the diffusion model sees it: latents are normalized as diffusers' pipelines do.

    Attributes:
        name: Name of the folder it came from.
        channels: C, channels of the latents.
        downsample: Pixels per latent along each side.
        fingerprint: Short hash of configuration and weights.
    """

    def __init__(self, config: AutoencoderConfig, parameters: Parameters, name: str):
        self.name = name
        self.config = config
        self.channels = config.latent_channels
        self.downsample = config.downsample
        self.fingerprint = fingerprint(config, parameters)
        self._parameters = parameters
        graph = nnx.graphdef(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0))))
        shift, scale = latent_scaling(config)

        def encode(parameters: Parameters, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            mean, log_variance = nnx.merge(graph, parameters).encode(images)
            return (mean - shift) * scale, jnp.exp(0.5 * log_variance) * scale

        def decode(parameters: Parameters, latents: jax.Array) -> jax.Array:
            return jnp.clip(nnx.merge(graph, parameters).decode(latents / scale + shift), -1.0, 1.0)

        self._encode, self._decode = jax.jit(encode), jax.jit(decode)

    def encode(self, images: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of the normalized latents, each (B, H, W, C) float32.

        Args:
            images: (B, f·H, f·W, 3) float32 in [-1, 1].

        Raises:
            UserError: Height or width is not a multiple of `downsample`.
        """
        height, width = images.shape[1:3]
        if height % self.downsample or width % self.downsample:
            raise UserError(
                f"Images of {height}×{width} pixels cannot be encoded by '{self.name}': "
                f"resize or crop them so that both sides are multiples of {self.downsample}."
            )
        return self._encode(self._parameters, jnp.asarray(images, jnp.float32))

    def decode(self, latents: jax.Array | np.ndarray) -> jax.Array:
        """Images (B, f·H, f·W, 3) float32 in [-1, 1] of normalized latents (B, H, W, C)."""
        return self._decode(self._parameters, jnp.asarray(latents, jnp.float32))


def latent_scaling(config: AutoencoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """(shift, scale), float32 (C,) or (): normalized = (latent - shift) · scale, as in diffusers' pipelines."""
    if config.latents_mean is not None and config.latents_std is not None:
        shift, scale = np.asarray(config.latents_mean), config.scaling_factor / np.asarray(config.latents_std)
    else:
        shift, scale = np.asarray(config.shift_factor or 0.0), np.asarray(config.scaling_factor)
    return shift.astype(np.float32), scale.astype(np.float32)


def fingerprint(config: AutoencoderConfig, parameters: Parameters) -> str:
    """Twelve hexadecimal digits that change with the configuration or any weight."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]:
        digest.update(_tensor_name(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:12]
