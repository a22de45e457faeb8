"""Compares the encoders of the paper's recipe, at full size with random weights, with their reference libraries.

Run with `-s` to print the errors.
"""

import time
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from micro_dit.encoders.autoencoder import AutoencoderConfig, AutoencoderKL
from micro_dit.encoders.clip import ClipTextConfig, ClipTextModel, present_name
from micro_dit.encoders.image import ImageEncoder
from micro_dit.encoders.weights import Parameters, to_parameters

PIXELS = 64


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Fills a model with random weights that preserve the scale of activations, including norms and biases."""
    torch.manual_seed(0)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name:
                parameter.normal_(std=0.02)
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.1)
    return model.eval().requires_grad_(False)


def parameters_of(model: torch.nn.Module, tensors: dict[str, torch.Tensor], module: nnx.Module) -> Parameters:
    named = {name: tensor.numpy() for name, tensor in tensors.items()}
    return to_parameters(named, nnx.to_pure_dict(nnx.state(module)), type(model).__name__)


def errors(ours: jax.Array, theirs: np.ndarray) -> tuple[float, float]:
    """Returns the maximum error relative to the maximum value, and the RMS error relative to the RMS value."""
    difference = np.asarray(ours, np.float32) - theirs
    return np.abs(difference).max() / np.abs(theirs).max(), np.sqrt((difference**2).mean() / (theirs**2).mean())


def test_sdxl_autoencoder() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=0.13025)
    started = time.process_time()
    down, up = config.block_types()
    with torch.device("meta"):
        reference = diffusers.AutoencoderKL(
            block_out_channels=config.block_out_channels, layers_per_block=2, down_block_types=down, up_block_types=up
        )
    fill(reference)
    tensors = reference.state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == 83_653_863
    module = nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))
    parameters = parameters_of(reference, tensors, module)
    images = np.random.default_rng(0).uniform(-1, 1, (1, PIXELS, PIXELS, 3)).astype(np.float32)
    posterior = reference.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
    mean, std = (value.numpy().transpose(0, 2, 3, 1) * 0.13025 for value in (posterior.mean, posterior.std))
    decoded = reference.decode(posterior.mean).sample.clamp(-1, 1).numpy().transpose(0, 2, 3, 1)
    assert (np.abs(decoded) < 1).mean() > 0.5
    for dtype, largest, typical in (("float32", 1e-4, 2e-5), ("bfloat16", 0.1, 0.03)):
        encoder = ImageEncoder(config, parameters, "sdxl", dtype)
        our_mean, our_std = encoder.encode(images)
        found = {
            "mean": errors(our_mean, mean),
            "standard deviation": errors(our_std, std),
            "decoded": errors(encoder.decode(mean), decoded),
        }
        for name, (maximum, rms) in found.items():
            print(f"SDXL autoencoder {dtype} {name}: maximum error {maximum:.1e}, RMS error {rms:.1e}")
            assert maximum < largest
            assert rms < typical
    print(f"{time.process_time() - started:.0f} CPU-seconds")


def test_vit_h_text_encoder() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, Any] = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "quick_gelu",
    }  # fmt: skip
    started = time.process_time()
    with torch.device("meta"):
        reference = CLIPTextModel(CLIPTextConfig(**sizes))
    fill(reference)
    tensors = {present_name(name) or name: tensor for name, tensor in reference.state_dict().items()}
    assert sum(tensor.numel() for tensor in tensors.values()) == 352_984_064  # without the text projection
    config = ClipTextConfig(**sizes)
    module = nnx.eval_shape(lambda: ClipTextModel(config, rngs=nnx.Rngs(0)))
    parameters, graph = parameters_of(reference, tensors, module), nnx.graphdef(module)
    ids = np.random.default_rng(0).integers(0, 49408, (1, 77))
    positions = torch.arange(77)[None]  # a buffer, which has no value after `to_empty`
    expected = reference(torch.tensor(ids), position_ids=positions).last_hidden_state.numpy()
    apply = jax.jit(lambda parameters, ids, dtype: nnx.merge(graph, parameters)(ids, dtype), static_argnums=2)
    for dtype, largest, typical in (("float32", 1e-4, 2e-5), ("bfloat16", 0.1, 0.03)):
        maximum, rms = errors(apply(parameters, ids, dtype), expected)
        print(f"ViT-H text encoder {dtype}: maximum error {maximum:.1e}, RMS error {rms:.1e}")
        assert maximum < largest
        assert rms < typical
    print(f"{time.process_time() - started:.0f} CPU-seconds")
