"""Shapes and identities of encoders, known without loading them: runs can be planned before any shard exists."""

import dataclasses
from pathlib import Path
from typing import Protocol

from micro_dit.encoders.hub import ASSETS, read_json
from micro_dit.errors import UserError

UNVERIFIED = "unverified"  # fingerprint of an encoder if only its name is known

IMAGE_ENCODERS = {  # name: (latent channels, pixels per latent along each side)
    "stabilityai/stable-diffusion-xl-base-1.0": (4, 8),
    "madebyollin/sdxl-vae-fp16-fix": (4, 8),
    "ostris/vae-kl-f8-d16": (16, 8),
}
TEXT_ENCODERS = {  # name: caption channels
    "minilm": 384,
    "apple/DFN5B-CLIP-ViT-H-14-378": 1024,
    "openai/clip-vit-large-patch14": 768,
    "DeepFloyd/t5-v1_1-xxl": 4096,
}


@dataclasses.dataclass(frozen=True)
class ImageEncoderInfo:
    """The identity and shapes of an image encoder; `downsample` is pixels per latent along each side."""

    name: str
    fingerprint: str
    channels: int
    downsample: int


@dataclasses.dataclass(frozen=True)
class TextEncoderInfo:
    """The identity and shapes of a text encoder."""

    name: str
    fingerprint: str
    tokens: int
    channels: int


class EncoderIdentity(Protocol):
    """An encoder, or its description in a manifest."""

    @property
    def name(self) -> str:
        """Returns the name recorded in shards."""

    @property
    def fingerprint(self) -> str:
        """Returns the hash of the weights and settings."""


def same_encoder(one: EncoderIdentity, other: EncoderIdentity) -> bool:
    """Returns whether two encoders have the same fingerprint, or the same name if either fingerprint is unknown."""
    if UNVERIFIED in (one.fingerprint, other.fingerprint):
        return one.name == other.name
    return one.fingerprint == other.fingerprint


def known_image_encoder(name: str) -> ImageEncoderInfo:
    """Returns the description of one of IMAGE_ENCODERS or of a folder in diffusers' format.

    Raises:
        UserError: The encoder is not known.
    """
    if name in IMAGE_ENCODERS:
        channels, downsample = IMAGE_ENCODERS[name]
        return ImageEncoderInfo(name, "", channels, downsample)
    for folder in (Path(name).expanduser(), ASSETS / name):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            return ImageEncoderInfo(name, "", config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1))
    raise UserError(
        f"The image encoder {name!r} is not known, and the config's shards do not exist. Build the shards first, or "
        f"set --config.data.vae to one of {', '.join(IMAGE_ENCODERS)}."
    )


def known_text_encoder(name: str, tokens: int) -> TextEncoderInfo:
    """Returns the description of one of TEXT_ENCODERS with `tokens` tokens per caption.

    Raises:
        UserError: The encoder is not known.
    """
    if name not in TEXT_ENCODERS:
        raise UserError(
            f"The text encoder {name!r} is not known, and the config's shards do not exist. Build the shards first, or "
            f"set --config.data.text_encoder to one of {', '.join(TEXT_ENCODERS)}."
        )
    return TextEncoderInfo(name, "", tokens, TEXT_ENCODERS[name])
