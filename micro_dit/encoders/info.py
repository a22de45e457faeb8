"""What encoders give, by their names: enough to plan a run before any of its shards, or its encoders, are there."""

import dataclasses
from pathlib import Path
from typing import Protocol

from micro_dit.encoders.hub import ASSETS, read_json
from micro_dit.errors import UserError

UNVERIFIED = "unverified"  # fingerprint of an encoder known by name only

IMAGE_ENCODERS = {  # latent channels, pixels per latent
    "stabilityai/stable-diffusion-xl-base-1.0": (4, 8),
    "madebyollin/sdxl-vae-fp16-fix": (4, 8),
    "ostris/vae-kl-f8-d16": (16, 8),
}
TEXT_ENCODERS = {  # caption channels
    "minilm": 384,
    "apple/DFN5B-CLIP-ViT-H-14-378": 1024,
    "openai/clip-vit-large-patch14": 768,
    "DeepFloyd/t5-v1_1-xxl": 4096,
}


@dataclasses.dataclass(frozen=True)
class ImageEncoderInfo:
    """The image encoder that made the latents; `downsample` is pixels per latent, along each side."""

    name: str
    fingerprint: str
    channels: int
    downsample: int


@dataclasses.dataclass(frozen=True)
class TextEncoderInfo:
    """The text encoder that made the caption embeddings."""

    name: str
    fingerprint: str
    tokens: int
    channels: int


class EncoderIdentity(Protocol):
    """An encoder, or what a manifest says of one."""

    @property
    def name(self) -> str:
        """Returns the name that shards record."""

    @property
    def fingerprint(self) -> str:
        """Returns the hash of weights and settings."""


def same_encoder(one: EncoderIdentity, other: EncoderIdentity) -> bool:
    """Whether two encoders have the same fingerprint, or, if one is not known, the same name."""
    if UNVERIFIED in (one.fingerprint, other.fingerprint):
        return one.name == other.name
    return one.fingerprint == other.fingerprint


def known_image_encoder(name: str) -> ImageEncoderInfo:
    """Returns what is known of one of IMAGE_ENCODERS or a folder in diffusers' format; raises UserError for others."""
    if name in IMAGE_ENCODERS:
        channels, downsample = IMAGE_ENCODERS[name]
        return ImageEncoderInfo(name, "", channels, downsample)
    for folder in (Path(name).expanduser(), ASSETS / name):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            return ImageEncoderInfo(name, "", config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1))
    raise UserError(
        f"nothing is known of the image encoder {name!r} and the config's shards are not there; make the shards first, "
        f"or set --config.data.vae to one of {', '.join(IMAGE_ENCODERS)}."
    )


def known_text_encoder(name: str, tokens: int) -> TextEncoderInfo:
    """Returns what is known of one of TEXT_ENCODERS with `tokens` tokens per caption; raises UserError for others."""
    if name not in TEXT_ENCODERS:
        raise UserError(
            f"nothing is known of the text encoder {name!r} and the config's shards are not there; make the shards "
            f"first, or set --config.data.text_encoder to one of {', '.join(TEXT_ENCODERS)}."
        )
    return TextEncoderInfo(name, "", tokens, TEXT_ENCODERS[name])
