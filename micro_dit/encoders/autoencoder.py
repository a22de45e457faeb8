"""The image autoencoder: diffusers' AutoencoderKL as a Flax module, in NHWC (Rombach et al. 2022, arXiv 2112.10752).

Modules and parameters have diffusers' names, so published weights load by transposing each array. Activations have the
dtype of the input, and each layer casts its float32 parameters to that dtype. Normalization statistics, the softmax and
the output layers are always float32.

Shapes: B images · H W latent rows, columns · C latent channels; pixels are (B, f·H, f·W, 3) with f the downsampling.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-6  # epsilon of every group norm in diffusers' autoencoder
DOWN_BLOCK, ATTENTION_DOWN_BLOCK = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP_BLOCK, ATTENTION_UP_BLOCK = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The configuration of an AutoencoderKL, with diffusers' field names and defaults."""

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
    down_block_types: tuple[str, ...] = ()  # if empty, DOWN_BLOCK at every level
    up_block_types: tuple[str, ...] = ()  # if empty, UP_BLOCK at every level

    @property
    def downsample(self) -> int:
        """Returns the downsampling factor: pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def block_types(self) -> tuple[list[str], list[str]]:
        """Returns the block type of each level, for the encoder and for the decoder."""
        levels = len(self.block_out_channels)
        return list(self.down_block_types) or [DOWN_BLOCK] * levels, list(self.up_block_types) or [UP_BLOCK] * levels


def uniform_parameter(shape: tuple[int, ...], inputs: int, rngs: nnx.Rngs) -> nnx.Param:
    """Returns a float32 parameter with PyTorch's default initialization for a layer with a fan-in of `inputs`."""
    bound = 1 / math.sqrt(inputs)
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))


class Conv(nnx.Module):
    """A convolution with a square kernel: (B, H, W, I) → (B, H, W, O), weight (size, size, I, O)."""

    def __init__(self, channels_in: int, channels_out: int, size: int, *, rngs: nnx.Rngs):
        inputs = size * size * channels_in
        self.weight = uniform_parameter((size, size, channels_in, channels_out), inputs, rngs)
        self.bias = uniform_parameter((channels_out,), inputs, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        around = (self.weight.shape[0] // 2,) * 2
        return convolve(x, self.weight[...], (around, around)) + self.bias[...].astype(x.dtype)


def convolve(x: jax.Array, weight: jax.Array, padding: Sequence[tuple[int, int]], stride: int = 1) -> jax.Array:
    """Convolves x (B, H, W, I) with weight (h, w, I, O) → (B, H', W', O).

    Args:
        x: (B, H, W, I), the input.
        weight: (h, w, I, O), the kernel.
        padding: Zeros (before, after) the rows, and (before, after) the columns.
        stride: Stride in both directions.
    """
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, weight.astype(x.dtype), (stride, stride), padding, dimension_numbers=layout)


class Linear(nnx.Module):
    """A linear layer: x @ weight + bias, weight (I, O)."""

    def __init__(self, channels_in: int, channels_out: int, *, rngs: nnx.Rngs):
        self.weight = uniform_parameter((channels_in, channels_out), channels_in, rngs)
        self.bias = uniform_parameter((channels_out,), channels_in, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        return x @ self.weight[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group normalization of (B, H, W, C), with statistics over pixels and the channels of a group in float32."""

    def __init__(self, channels: int, groups: int):
        self.weight = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""

        def group_mean(value: jax.Array) -> jax.Array:  # (B, H, W, C) -> (B, 1, 1, C), equal within a group
            per_channel = value.mean((1, 2))
            per_group = per_channel.reshape(value.shape[0], self.groups, -1).mean(-1)
            return jnp.repeat(per_group, value.shape[-1] // self.groups, -1)[:, None, None, :]

        h = x.astype(jnp.float32)
        h = h - group_mean(h)
        h = h * (jax.lax.rsqrt(group_mean(h * h) + EPSILON) * self.weight[...]) + self.bias[...]
        return h.astype(x.dtype)


class ResnetBlock(nnx.Module):
    """Two normalized convolutions with a residual connection (diffusers' ResnetBlock2D without a time embedding)."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(channels_in, groups)
        self.conv1 = Conv(channels_in, channels_out, 3, rngs=rngs)
        self.norm2 = GroupNorm(channels_out, groups)
        self.conv2 = Conv(channels_out, channels_out, 3, rngs=rngs)
        if channels_in != channels_out:
            self.conv_shortcut = Conv(channels_in, channels_out, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nnx.Module):
    """Single-head self-attention over all pixels (diffusers' Attention, as used in its autoencoder)."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups)
        self.to_q = Linear(channels, channels, rngs=rngs)
        self.to_k = Linear(channels, channels, rngs=rngs)
        self.to_v = Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        B, H, W, channels = x.shape
        h = self.group_norm(x).reshape(B, H * W, 1, channels)
        h = jax.nn.dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).reshape(x.shape)


class Downsample(nnx.Module):
    """A convolution of stride 2, padded on the right and at the bottom only."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        h = convolve(x, self.conv.weight[...], ((0, 1), (0, 1)), stride=2)
        return h + self.conv.bias[...].astype(x.dtype)


class Upsample(nnx.Module):
    """Nearest-neighbor upsampling by 2, then a 3×3 convolution.

    A 3×3 window of the upsampled image covers only 2×2 different pixels. The result therefore equals four 2×2
    convolutions of the small image, one for each parity of the output row and column. This needs 4/9 of the products,
    and a training step on CPU is four times as fast as with `repeat`, whose gradient is slow.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        weight = self.conv.weight[...]

        def fold(weight: jax.Array, axis: int, parity: int) -> jax.Array:
            """Sums the two of the three taps along `axis` that fall on the same pixel."""
            first, middle, last = jnp.split(weight, 3, axis)
            return jnp.concatenate([first + middle, last] if parity else [first, middle + last], axis)

        def convolve_parity(row: int, column: int) -> jax.Array:
            kernel = fold(fold(weight, 0, row), 1, column)
            return convolve(x, kernel, ((1 - row, row), (1 - column, column)))

        B, H, W, channels = x.shape
        rows = [jnp.stack([convolve_parity(row, column) for column in (0, 1)], axis=3) for row in (0, 1)]
        # Each of rows: (B, H, W, 2, channels).
        h = jnp.stack(rows, axis=2).reshape(B, 2 * H, 2 * W, channels)
        return h + self.conv.bias[...].astype(x.dtype)


class Level(nnx.Module):
    """A resolution level: residual blocks, with attention if `kind` includes it, then resampling by 2.

    The last level does not resample.
    """

    def __init__(
        self, channels_in: int, channels_out: int, layers: int, groups: int, kind: str, last: bool, *, rngs: nnx.Rngs
    ):
        widths = [channels_in] + [channels_out] * layers
        attentions = layers if kind in (ATTENTION_DOWN_BLOCK, ATTENTION_UP_BLOCK) else 0
        up = kind in (UP_BLOCK, ATTENTION_UP_BLOCK)
        self.resnets = nnx.List([ResnetBlock(widths[i], channels_out, groups, rngs=rngs) for i in range(layers)])
        self.attentions = nnx.List([Attention(channels_out, groups, rngs=rngs) for _ in range(attentions)])
        self.downsamplers = nnx.List([] if up or last else [Downsample(channels_out, rngs=rngs)])
        self.upsamplers = nnx.List([Upsample(channels_out, rngs=rngs)] if up and not last else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[i](x)
        for sampler in [*self.downsamplers, *self.upsamplers]:
            x = sampler(x)
        return x


def make_levels(
    widths: Sequence[int], layers: int, groups: int, kinds: Sequence[str], rngs: nnx.Rngs
) -> "nnx.List[Level]":
    """Returns one level for each width; the last level keeps its resolution."""
    pairs = zip([widths[0], *widths[:-1]], widths, strict=True)
    last = len(widths) - 1
    return nnx.List([Level(a, b, layers, groups, kinds[i], i == last, rngs=rngs) for i, (a, b) in enumerate(pairs)])


class MidBlock(nnx.Module):
    """A residual block, optional attention, and a residual block (diffusers' UNetMidBlock2D)."""

    def __init__(self, channels: int, groups: int, attention: bool, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, groups, rngs=rngs)] if attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """The encoder: pixels (B, f·H, f·W, 3) → mean and log-variance of the latents (B, H, W, 2·C)."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups, kinds = config.block_out_channels, config.norm_num_groups, config.block_types()[0]
        self.conv_in = Conv(config.in_channels, widths[0], 3, rngs=rngs)
        self.down_blocks = make_levels(widths, config.layers_per_block, groups, kinds, rngs)
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x).astype(jnp.float32))))


class Decoder(nnx.Module):
    """The decoder: latents (B, H, W, C) → pixels (B, f·H, f·W, 3)."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups, kinds = config.block_out_channels[::-1], config.norm_num_groups, config.block_types()[1]
        self.conv_in = Conv(config.latent_channels, widths[0], 3, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention, rngs=rngs)
        self.up_blocks = make_levels(widths, config.layers_per_block + 1, groups, kinds, rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (B, h, w, C)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x.astype(jnp.float32))))


class AutoencoderKL(nnx.Module):
    """diffusers' AutoencoderKL; its latents are not normalized."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        channels = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * channels, 2 * channels, 1, rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, channels, 1, rngs=rngs)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes images (B, f·H, f·W, 3) in [-1, 1] as the mean and log-variance, each (B, H, W, C) float32."""
        moments = self.encoder(images)
        if hasattr(self, "quant_conv"):
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes latents (B, H, W, C) to images (B, f·H, f·W, 3) float32, approximately in [-1, 1]."""
        if hasattr(self, "post_quant_conv"):
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)
