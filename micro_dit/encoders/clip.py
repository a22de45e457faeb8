"""CLIP text encoders: a small causal transformer as a Flax NNX module (Radford et al. 2021, arXiv 2103.00020).

Modules and parameters have the names of Hugging Face's CLIPTextModel; OpenCLIP weights are renamed when loaded.

Shapes: B captions · L caption tokens · Y caption channels · F hidden width of the MLP.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from micro_dit.encoders.autoencoder import Linear
from micro_dit.encoders.clip_tokenizer import ClipTokenizer
from micro_dit.encoders.devices import Devices
from micro_dit.encoders.hub import read_json
from micro_dit.encoders.tokens import cut_tokens, pad_tokens
from micro_dit.encoders.weights import Parameters, fingerprint_files, read_tensors, to_parameters
from micro_dit.errors import UserError

CONFIG_FILE = "config.json"
OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"
CAPTIONS_AT_ONCE = 64  # batch size per device
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
# OpenCLIP settings that do not affect the last hidden state.
OPEN_CLIP_HEADS = {
    "pad_id", "eos_id", "pool_type", "proj_type", "proj_bias", "output_tokens", "final_ln_after_pool",
    "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip
# Regular expressions for OpenCLIP's tensor names, and their replacements in Hugging Face's names.
OPEN_CLIP_NAMES = (
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
    (r"^ln_final\.", "final_layer_norm."),
)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """The configuration of a CLIPTextModel, with Hugging Face's field names and defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512  # Y
    intermediate_size: int = 2048  # F
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


class Embedding(nnx.Module):
    """An embedding table with a row for each token or position."""

    def __init__(self, rows: int, channels: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, channels)))


class Embeddings(nnx.Module):
    """The sum of token and position embeddings: token ids (B, L) → (B, L, Y)."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Embeds token ids (n, L)."""
        return self.token_embedding.weight[...][ids] + self.position_embedding.weight[...][: ids.shape[1]]


class LayerNorm(nnx.Module):
    """Layer normalization of each token over its channels, in float32."""

    def __init__(self, channels: int, epsilon: float):
        self.weight = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (n, L, D)."""
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weight[...] + self.bias[...]


class ClipAttention(nnx.Module):
    """Causal multi-head attention, with the softmax in float32."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj = Linear(width, width, rngs=rngs), Linear(width, width, rngs=rngs)
        self.v_proj, self.out_proj = Linear(width, width, rngs=rngs), Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (n, L, D)."""
        B, L, Y = x.shape
        q, k, v = (layer(x).reshape(B, L, self.heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(B, L, Y))


class Mlp(nnx.Module):
    """A two-layer MLP."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the module to (n, L, D)."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    """A pre-norm transformer layer: the residual stream stays float32, matrix products are in `dtype`."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = ClipAttention(config, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        """Applies the module to (n, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x).astype(dtype))
        return x + self.mlp(self.layer_norm2(x).astype(dtype))


class Layers(nnx.Module):
    """The stack of transformer layers."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        """Applies the module to (n, L, D)."""
        for layer in self.layers:
            x = layer(x, dtype)
        return x


class ClipTextModel(nnx.Module):
    """The text model: token ids (B, L) → last hidden state (B, L, Y) float32, after the final norm."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Layers(config, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, ids: jax.Array, dtype: str = "float32") -> jax.Array:
        """Embeds token ids (n, L)."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids), dtype))


class ClipText:
    """A CLIP text encoder with its tokenizer; implements `TextEncoder`.

    Padding positions have embeddings like all others, as in CLIP's training. Only an empty caption is zero at every
    position: it is the unconditional input of classifier-free guidance.
    """

    default_tokens = 77

    def __init__(
        self,
        folder: Path,
        weights: Sequence[Path],
        name: str,
        tokens: int,
        dtype: str = "float32",
        sharding: jax.sharding.Sharding | None = None,
    ):
        """Loads an encoder in Hugging Face's or OpenCLIP's format.

        Args:
            folder: Folder with the configuration; the tokenizer is in it or next to it.
            weights: The safetensors files.
            name: Name recorded in shards.
            tokens: Caption tokens L, including the start and end tokens.
            dtype: Dtype of matrix products, 'float32' or 'bfloat16'.
            sharding: How captions are split over the devices of this process.

        Raises:
            UserError: A file is missing or not supported, or `tokens` is out of range.
        """
        open_clip = (folder / OPEN_CLIP_CONFIG_FILE).is_file()
        config_file = folder / (OPEN_CLIP_CONFIG_FILE if open_clip else CONFIG_FILE)
        config = read_open_clip_config(config_file) if open_clip else read_clip_config(config_file)
        if not 3 <= tokens <= (limit := config.max_position_embeddings):
            raise UserError(
                f"The text encoder '{name}' supports 3 to {limit} caption tokens, not {tokens}. Choose a number in "
                "this range."
            )
        self._tokenizer = ClipTokenizer(folder, open_clip)
        if self._tokenizer.size > config.vocab_size:
            raise UserError(
                f"The tokenizer of '{name}' has {self._tokenizer.size} tokens, but 'vocab_size' in {config_file} is "
                f"{config.vocab_size}. Use the tokenizer that was published with these weights."
            )
        self.name, self.tokens, self.channels = name, tokens, config.hidden_size
        settings = f"tokens={tokens} padding={self._tokenizer.padding}"
        self.fingerprint = fingerprint_files([config_file, *weights, *self._tokenizer.files], settings)
        self._devices = Devices(dtype, sharding)
        self._parameters = self._devices.replicate(load_parameters(weights, config))
        graph = nnx.graphdef(nnx.eval_shape(lambda: ClipTextModel(config, rngs=nnx.Rngs(0))))
        self._apply = self._devices.compile(lambda parameters, ids: nnx.merge(graph, parameters)(ids, dtype))

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embeds captions as (B, L, Y) float32; longer captions keep their first L-1 tokens and the end token."""
        rows = [cut_tokens(ids, self.tokens) for ids in self._tokenizer(captions)]
        ids = pad_tokens(rows, self.tokens, self._tokenizer.padding)
        at_once = CAPTIONS_AT_ONCE * self._devices.count
        states = []
        for start in range(0, len(ids), at_once):
            batch = ids[start : start + at_once]
            size = min(at_once, 1 << (len(batch) - 1).bit_length())  # powers of 2, since each size is compiled
            states.append(self._apply(self._parameters, np.pad(batch, [(0, size - len(batch)), (0, 0)]))[: len(batch)])
        embeddings = np.zeros((len(ids), self.tokens, self.channels), np.float32)
        if states:
            np.concatenate([np.asarray(state) for state in states], out=embeddings)
        embeddings[[not caption.strip() for caption in captions]] = 0
        return embeddings

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Counts each caption's tokens, including start and end; `encode` truncates captions to `tokens`."""
        return [len(ids) for ids in self._tokenizer(captions)]


def load_parameters(weights: Sequence[Path], config: ClipTextConfig) -> Parameters:
    """Reads a text encoder in Hugging Face's or OpenCLIP's format into float32 arrays on the host.

    Raises:
        UserError: A file is corrupt, or its tensors do not match the configuration.
    """
    tensors = {}
    for name, tensor in read_tensors(weights, lambda name: present_name(name) is not None).items():
        current = present_name(name) or name
        if ".in_proj_" in current:  # queries, keys and values in one tensor
            for part, array in zip("qkv", np.split(tensor, 3), strict=True):
                tensors[current.replace(".in_proj_", f".{part}_proj.")] = array
        else:
            tensors[current] = tensor
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: ClipTextModel(config, rngs=nnx.Rngs(0)))))
    return to_parameters(tensors, shapes, weights[0])


def present_name(name: str) -> str | None:
    """Returns this module's name for a published tensor, or None if the text encoder does not use it."""
    name = re.sub(r"^text(_model)?\.", "", name)
    for pattern, replacement in OPEN_CLIP_NAMES:
        name = re.sub(pattern, replacement, name)
    ours = name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm."))
    return name if ours and not name.endswith("position_ids") else None


def read_clip_config(file: Path) -> ClipTextConfig:
    """Reads the `config.json` of a CLIPTextModel or CLIPModel; raises UserError if it is not supported."""
    fields = read_json(file)
    fields = fields.get("text_config") or fields
    known = {field.name for field in dataclasses.fields(ClipTextConfig)}
    return _checked(ClipTextConfig(**{name: value for name, value in fields.items() if name in known}), file)


def read_open_clip_config(file: Path) -> ClipTextConfig:
    """Reads OpenCLIP's `open_clip_config.json`; raises UserError if it is not supported."""
    model = read_json(file).get("model_cfg", {})
    fields = {name: value for name, value in model.get("text_cfg", {}).items() if value and name not in OPEN_CLIP_HEADS}
    width = fields.pop("width", 512)
    config = ClipTextConfig(
        vocab_size=fields.pop("vocab_size", 49408),
        hidden_size=width,
        intermediate_size=int(width * fields.pop("mlp_ratio", 4.0)),
        num_hidden_layers=fields.pop("layers", 12),
        num_attention_heads=fields.pop("heads", 8),
        max_position_embeddings=fields.pop("context_length", 77),
        hidden_act="quick_gelu" if model.get("quick_gelu") else "gelu",
        layer_norm_eps=fields.pop("norm_kwargs", {}).get("eps", 1e-5),
    )
    if fields:
        raise UserError(f"{file}, 'text_cfg': '{min(fields)}' is {fields[min(fields)]!r}, which is not supported.")
    return _checked(config, file)


def _checked(config: ClipTextConfig, file: Path) -> ClipTextConfig:
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{file}: activation '{config.hidden_act}' is not supported. Supported are {' and '.join(ACTIVATIONS)}."
        )
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{file}: width {config.hidden_size} is not a multiple of the {config.num_attention_heads} attention heads."
        )
    return config
