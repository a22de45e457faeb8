"""Provides random weights and input images for the FID network."""

import zlib

import numpy as np

from micro_dit.evaluation.inception import layers


def random_tensors() -> dict[str, np.ndarray]:
    """Returns random weights by PyTorch names, scaled so that activations neither vanish nor explode."""
    tensors = {}
    for name, shape in layers().items():
        generator = np.random.RandomState(zlib.crc32(name.encode()))  # RandomState has a stable stream
        tensors[f"{name}.conv.weight"] = generator.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        for part, around in (("weight", 1), ("bias", 0), ("running_mean", 0)):
            tensors[f"{name}.bn.{part}"] = around + 0.1 * generator.randn(shape[0])
        tensors[f"{name}.bn.running_var"] = 1 + 0.2 * generator.rand(shape[0])
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def images() -> np.ndarray:
    """Returns two images, (2, 96, 128, 3) uint8, whose rows and columns are resized by different factors."""
    generator = np.random.RandomState(0)
    coarse = generator.rand(2, 6, 8, 3).repeat(16, 1).repeat(16, 2)
    return np.clip(256 * (0.8 * coarse + 0.2 * generator.rand(2, 96, 128, 3)), 0, 255).astype(np.uint8)
