"""Defines simple encoders that load instantly and whose outputs are easy to check.

Also runs precompute with these encoders: `python -m tests.helpers.stub_encoders --source=… --vae=SECONDS …`.
"""

import time
from typing import Any

import numpy as np


class MeanColor:
    """An image encoder whose latent mean is the mean color of each 8×8 patch and whose latent std is 0.5."""

    name, fingerprint, channels, downsample = "mean-color", "0123", 3, 8

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds  # delay per batch

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(self.seconds)
        count, height, width, _ = images.shape
        patches = images.astype(np.float32).reshape(count, height // 8, 8, width // 8, 8, 3)
        mean = patches.mean((2, 4)) / 127.5 - 1
        return mean, np.full_like(mean, 0.5)


class Letters:
    """A text encoder with one token per letter."""

    name, fingerprint, tokens, channels = "letters", "4567", 5, 2

    def encode(self, captions: list[str]) -> np.ndarray:
        embeddings = np.zeros((len(captions), self.tokens, self.channels), np.float32)
        for row, caption in enumerate(captions):
            for token, letter in enumerate(caption[: self.tokens]):
                embeddings[row, token] = ord(letter)
        return embeddings

    def count_tokens(self, captions: list[str]) -> list[int]:
        return list(map(len, captions))


def install(image: Any = None, text: Any = None) -> dict[str, Any]:
    """Returns replacements for the two functions that load encoders, by their qualified names."""
    return {
        "micro_dit.encoders.image.load_image_encoder": lambda *arguments: image or MeanColor(),
        "micro_dit.encoders.text.load_text_encoder": lambda *arguments: text or Letters(),
    }


if __name__ == "__main__":
    from unittest import mock

    from micro_dit import precompute
    from micro_dit.cli import run_command

    def main() -> None:
        seconds = float(precompute.flags.FLAGS.vae)
        for name, stub in install(MeanColor(seconds)).items():
            mock.patch(name, stub).start()
        precompute.main()

    run_command(main, precompute.define_flags)
