"""A call of the sampler, and the image decoder, as StableHLO programs that run without this package (jax.export).

Parameters are inputs, by the names and with the dtypes of their safetensors files: a program is some hundred kilobytes,
and serves every model of its architecture. What goes in and comes out is told in SIGNATURE.

B images, any number · H W latent rows, columns · C latent channels · L caption tokens · Y caption channels.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from micro_dit.diffusion import edm
from micro_dit.diffusion.guidance import extrapolate
from micro_dit.diffusion.samplers import SAMPLERS, noise_levels
from micro_dit.encoders.autoencoder import AutoencoderConfig, AutoencoderKL
from micro_dit.encoders.image import latent_scaling, present_name
from micro_dit.encoders.weights import to_parameters
from micro_dit.errors import UserError
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import abstract_params, bind

PLATFORMS = ("cpu", "cuda", "tpu")
SIGNATURE, SAMPLER_STEP, DECODER = "signature.json", "sampler_step.bin", "decoder.bin"
FORMAT, VERSION = "micro_dit programs", 1


def write_programs(
    folder: Path,
    config: DiTConfig,
    dtype: str,
    *,
    caption_tokens: int,
    sigma_data: float,
    guidance: float,
    sampler: str,
    steps: int,
    weights: str,
    decoder: tuple[Mapping[str, Any], AutoencoderConfig] | None = None,
    decoder_weights: str = "",
) -> None:
    """Writes SAMPLER_STEP, SIGNATURE and, if there are its tensors, DECODER.

    Args:
        folder: where to; it is made.
        config: the network's.
        dtype: of the parameters in their file.
        caption_tokens: L.
        sigma_data: as in training.
        guidance: its usual scale, to be told.
        sampler: one of SAMPLERS; the program is a call of it.
        steps: of the table of noise levels that is told.
        weights: path of the parameters' file from the folder, to be told.
        decoder: tensors of the image encoder's file (shapes and dtypes are enough), and its configuration.
        decoder_weights: path of that file from the folder, to be told.

    Raises:
        UserError: the package flatbuffers, which jax.export writes with, is not installed.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError("StableHLO programs are written with flatbuffers: pip install flatbuffers.") from error
    folder.mkdir(parents=True)
    columns = SAMPLERS[sampler].columns(noise_levels(steps))
    start = SAMPLERS[sampler].start(jnp.ones(()))
    arguments = step_arguments(config, dtype, caption_tokens, start, columns)
    told = {
        "format": FORMAT, "version": VERSION, "jax": jax.__version__, "platforms": list(PLATFORMS),
        "latents": [config.input_size, config.input_size, config.in_channels],
        "captions": [caption_tokens, config.caption_channels],
        "sampler": sampler, "guidance": guidance, "steps": steps,
        "start": ["x" if value else "zeros" for value in start],
        "table": [[value.item() for value in row] for row in zip(*columns, strict=True)],
        "sampler_step": _write(
            folder / SAMPLER_STEP, weights, sampler_step(config, sampler, sigma_data), arguments
        ),
    }  # fmt: skip
    if decoder is not None:
        tensors, vae = decoder
        shapes = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        arguments = {"params": shapes, "latents": arguments["carry"][0]}
        told["decoder"] = _write(folder / DECODER, decoder_weights, image_decoder(vae), arguments)
    (folder / SIGNATURE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def sampler_step(config: DiTConfig, sampler: str, sigma_data: float) -> Callable[..., Any]:
    """(params, captions, negative, guidance, carry, row) → the carry after a call of the sampler, as in generator.py.

    Captions are (B, L, Y) and negative (L, Y) float32, guidance () float32; carry and row are those of
    diffusion/samplers.py. Both branches of guidance are computed at every scale.
    """

    def step(params: Any, captions: Any, negative: Any, guidance: Any, carry: Any, row: Any) -> Any:
        network = bind(config, {name: value.astype(jnp.float32) for name, value in params.items()})
        F = extrapolate(network, guidance, negative)
        return SAMPLERS[sampler].call(lambda x, sigma: edm.denoise(F, x, sigma, captions, sigma_data), carry, row)

    return step


def image_decoder(config: AutoencoderConfig) -> Callable[..., Any]:
    """(tensors of diffusers' file, latents (B, H, W, C) float32) → pictures (B, f·H, f·W, 3) uint8."""
    graph, state = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0))))
    shapes, (shift, scale) = nnx.to_pure_dict(state), latent_scaling(config)

    def decode(params: Any, latents: Any) -> Any:
        tensors = {present_name(name): value.astype(jnp.float32) for name, value in params.items()}
        with jax.default_matmul_precision("highest"):  # as encoders/devices.py does
            images = nnx.merge(graph, to_parameters(tensors, shapes, "the file")).decode(latents / scale + shift)
        return jnp.clip(jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5), 0, 255).astype(jnp.uint8)

    return decode


def step_arguments(
    config: DiTConfig, dtype: str, caption_tokens: int, start: tuple[Any, ...], columns: tuple[np.ndarray, ...]
) -> dict[str, Any]:
    """The arguments of a sampler's step by name, in order: shapes and dtypes, with the number of images left open."""
    (B,) = export.symbolic_shape("B")
    side, L, Y = config.input_size, caption_tokens, config.caption_channels
    x = jax.ShapeDtypeStruct((B, side, side, config.in_channels), jnp.float32)
    shapes = {name: leaf.shape for name, leaf in abstract_params(config).items()}
    return {
        "params": {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape in shapes.items()},
        "captions": jax.ShapeDtypeStruct((B, L, Y), jnp.float32),
        "negative": jax.ShapeDtypeStruct((L, Y), jnp.float32),
        "guidance": jax.ShapeDtypeStruct((), jnp.float32),
        "carry": (x,) * len(start),
        "row": tuple(jax.ShapeDtypeStruct((), column.dtype) for column in columns),
    }


def _write(path: Path, weights: str, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Writes a program; returns what the signature tells of it."""
    # What the function does not use is an input all the same: the order in the file is that of the signature.
    exported = export.export(jax.jit(function, keep_unused=True), platforms=PLATFORMS)(*arguments.values())
    path.write_bytes(exported.serialize())
    inputs = [
        {"name": name + jax.tree_util.keystr(at), "shape": _json(leaf.shape), "dtype": str(leaf.dtype)}
        for name, argument in arguments.items()
        for at, leaf in jax.tree_util.tree_flatten_with_path(argument)[0]
    ]
    outputs = [{"shape": _json(leaf.shape), "dtype": str(leaf.dtype)} for leaf in exported.out_avals]
    return {"file": path.name, "params": weights, "inputs": inputs, "outputs": outputs}


def _json(shape: tuple[Any, ...]) -> list[int | str]:
    return [length if isinstance(length, int) else str(length) for length in shape]
