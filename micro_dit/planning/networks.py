"""Determines the networks of a run, even if its shards do not exist."""

from collections.abc import Sequence
from typing import Any

from micro_dit.data.mixture import parse_mix, read_mix
from micro_dit.data.shards import MANIFEST, shards_folder
from micro_dit.encoders.info import ImageEncoderInfo, TextEncoderInfo, known_image_encoder, known_text_encoder
from micro_dit.models.config import DiTConfig
from micro_dit.training.phases import Phase
from micro_dit.training.shards import SOURCE_CAPTION_TOKENS
from micro_dit.training.step import network_of

CLIP_CAPTION_TOKENS = 77  # assumed for shards that do not exist and are not prepared from data.source


def phase_networks(phases: Sequence[Phase], model: Any, data: Any) -> tuple[list[DiTConfig], int]:
    """Returns the network of each phase and the number of caption tokens.

    If the shards do not exist and `data.caption_tokens` is not set, SOURCE_CAPTION_TOKENS are assumed with a
    `data.source`, and CLIP_CAPTION_TOKENS otherwise.

    Args:
        phases: The phases of the run.
        model: `config.model`, the size and overridden fields of the network.
        data: `config.data`, the names of shards and encoders.

    Raises:
        UserError: A network is invalid, or the shards do not exist and their encoders are unknown.
    """
    encoders = [_encoders(phase.shards or data.shards, data) for phase in phases]
    networks = [network_of(phase, model, vae, text) for phase, (vae, text) in zip(phases, encoders, strict=True)]
    return networks, encoders[0][1].tokens


def _encoders(shards: str, data: Any) -> tuple[ImageEncoderInfo, TextEncoderInfo]:
    """Returns the encoders of the shards; if the shards do not exist, the known encoders with the config's names."""
    if shards and all((shards_folder(folder) / MANIFEST).exists() for folder, _ in parse_mix(shards)):
        manifest = read_mix(shards).manifest()
        return manifest.vae, manifest.text_encoder
    tokens = data.caption_tokens or (SOURCE_CAPTION_TOKENS if data.source else CLIP_CAPTION_TOKENS)
    return known_image_encoder(data.vae), known_text_encoder(data.text_encoder, tokens)
