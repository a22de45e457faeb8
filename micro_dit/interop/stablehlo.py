"""Exports the guided denoiser and the image decoder as StableHLO programs, which run without this package (jax.export).

Parameters are inputs, with the names and dtypes of their safetensors files, so one program works for all models of the
same architecture. SIGNATURE lists inputs and outputs. The sampling loop is left to the caller (docs/export.md).
Shapes: B images · L caption tokens · Y caption channels.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export

from micro_dit.diffusion.generate import Generator, Inputs, Sampling
from micro_dit.encoders.autoencoder import AutoencoderConfig, AutoencoderKL
from micro_dit.encoders.image import latent_scaling, present_name
from micro_dit.encoders.weights import to_parameters
from micro_dit.errors import UserError
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import abstract_params

PLATFORMS = ("cpu", "cuda", "tpu")
SIGNATURE, DENOISER, DECODER = "signature.json", "denoiser.bin", "decoder.bin"
FORMAT, VERSION = "micro_dit programs", 2


def write_programs(
    folder: Path,
    config: DiTConfig,
    dtype: str,
    *,
    caption_tokens: int,
    sigma_data: float,
    sampling: Sampling,
    weights: str,
    decoder: tuple[Mapping[str, Any], AutoencoderConfig] | None = None,
    decoder_weights: str = "",
) -> None:
    """Writes DENOISER, SIGNATURE and optionally DECODER to a new folder.

    Args:
        folder: The folder to create.
        config: Configuration of the network.
        dtype: Dtype of the parameters in the weights file.
        caption_tokens: Number of caption tokens L.
        sigma_data: Standard deviation of the training latents.
        sampling: Default sampler settings in the signature.
        weights: Path of the weights file, relative to the folder.
        decoder: Tensors of the image encoder's weights file (only shapes and dtypes are used), and its configuration.
        decoder_weights: Path of that file, relative to the folder.

    Raises:
        UserError: The package flatbuffers, which jax.export requires, is not installed.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError("--stablehlo requires the package flatbuffers. Run `pip install flatbuffers`.") from error
    folder.mkdir(parents=True)
    arguments = denoiser_arguments(config, dtype, caption_tokens)
    signature = {
        "format": FORMAT, "version": VERSION, "jax": jax.__version__, "platforms": list(PLATFORMS),
        "latents": [config.input_size, config.input_size, config.in_channels],
        "captions": [caption_tokens, config.caption_channels],
        "sampler": sampling.sampler, "guidance": sampling.guidance, "steps": sampling.steps,
        "noise_levels": sampling.sigmas.tolist(),
        "denoiser": _write(folder / DENOISER, weights, guided_denoiser(config, sigma_data), arguments),
    }  # fmt: skip
    if decoder is not None:
        tensors, vae = decoder
        shapes = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        arguments = {"params": shapes, "latents": arguments["x"]}
        signature["decoder"] = _write(folder / DECODER, decoder_weights, image_decoder(vae), arguments)
    (folder / SIGNATURE).write_text(json.dumps(signature, indent=1) + "\n", encoding="utf-8")


def guided_denoiser(config: DiTConfig, sigma_data: float) -> Callable[..., jax.Array]:
    """Returns the guided denoiser, a function of `denoiser_arguments` that returns D(x; sigma).

    It evaluates both guidance branches for every guidance scale.
    """
    generator = Generator(config, sigma_data=sigma_data)

    def denoise(params: Any, captions: Any, negative: Any, guidance: Any, x: Any, sigma: Any) -> jax.Array:
        inputs = Inputs({name: value.astype(jnp.float32) for name, value in params.items()}, captions, negative)
        return generator.denoise(inputs, guidance, x, sigma[None], branches="both")

    return denoise


def image_decoder(config: AutoencoderConfig) -> Callable[..., Any]:
    """Returns the decoder: (tensors in diffusers' layout, latents (B, H, W, C)) → images (B, f·H, f·W, 3) uint8."""
    graph, state = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0))))
    shapes, (shift, scale) = nnx.to_pure_dict(state), latent_scaling(config)

    def decode(params: Any, latents: Any) -> Any:
        tensors = {present_name(name): value.astype(jnp.float32) for name, value in params.items()}
        with jax.default_matmul_precision("highest"):  # as in encoders/devices.py
            images = nnx.merge(graph, to_parameters(tensors, shapes, "the file")).decode(latents / scale + shift)
        return jnp.clip(jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5), 0, 255).astype(jnp.uint8)

    return decode


def denoiser_arguments(config: DiTConfig, dtype: str, caption_tokens: int) -> dict[str, Any]:
    """Returns shapes and dtypes of the denoiser's arguments, by name and in order; the batch size is symbolic."""
    (B,) = export.symbolic_shape("B")
    side, L, Y = config.input_size, caption_tokens, config.caption_channels
    params = abstract_params(config).items()
    shapes = {
        "captions": (B, L, Y), "negative": (L, Y), "guidance": (), "x": (B, side, side, config.in_channels), "sigma": ()
    }  # fmt: skip
    arguments = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return {"params": {name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) for name, leaf in params}} | arguments


def _write(path: Path, weights: str, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Writes a program and returns its entry in the signature."""
    # Unused arguments are kept, so that the program's inputs match the signature.
    exported = export.export(jax.jit(function, keep_unused=True), platforms=PLATFORMS)(*arguments.values())
    path.write_bytes(exported.serialize())
    inputs = [
        {"name": name + jax.tree_util.keystr(at)} | _shape_and_dtype(leaf)
        for name, argument in arguments.items()
        for at, leaf in jax.tree_util.tree_flatten_with_path(argument)[0]
    ]
    outputs = [_shape_and_dtype(leaf) for leaf in exported.out_avals]
    return {"file": path.name, "params": weights, "inputs": inputs, "outputs": outputs}


def _shape_and_dtype(leaf: Any) -> dict[str, Any]:
    shape = [length if isinstance(length, int) else str(length) for length in leaf.shape]
    return {"shape": shape, "dtype": str(leaf.dtype)}
