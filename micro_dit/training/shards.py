"""Prepares the shards of a run if they do not exist, and validates them against the config."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from micro_dit.data.mixture import check_alike, read_mix
from micro_dit.data.preparation.prepare import make_shards
from micro_dit.data.preparation.settings import PreparationSettings
from micro_dit.data.shard_checks import ShardExpectations
from micro_dit.data.shards import MANIFEST, Manifest, shards_folder
from micro_dit.training.phases import Phase

# Caption tokens of shards prepared from data.source, whose captions are short, if data.caption_tokens is not set.
SOURCE_CAPTION_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The data settings of a run, as in `config.data`.

    Attributes:
        shards: Folder of shards, or a mix of folders. A phase may override it.
        source: Source from which missing shards are prepared; empty to require existing shards.
        resolutions: Resolutions to prepare, in pixels.
        vae: Name of the image encoder.
        text_encoder: Name of the text encoder.
        caption_tokens: Tokens per caption that the shards must have; None accepts any number, and prepares missing
            shards with SOURCE_CAPTION_TOKENS.
        heldout: Split for the held-out loss; empty disables the held-out loss.
        heldout_images: Maximum number of images for the held-out loss.
    """

    shards: str
    source: str
    resolutions: Sequence[int]
    vae: str
    text_encoder: str
    caption_tokens: int | None
    heldout: str
    heldout_images: int


def prepare_shards(
    data: TrainingData, phases: Sequence[Phase], sigma_data: float, say: Callable[[str], None]
) -> list[Manifest]:
    """Prepares the shards from `data.source` if they do not exist, and validates them.

    Returns:
        The shard manifest of each phase.

    Raises:
        UserError: Shards are missing or damaged, lack a phase's resolution, or do not match the config or each other.
    """
    if data.source and "," not in data.shards and not (shards_folder(data.shards) / MANIFEST).exists():
        say(f"Preparing the shards {data.shards} from {data.source}. Later runs reuse them.")
        settings = PreparationSettings(
            data.source, tuple(data.resolutions), data.vae, data.text_encoder,
            caption_tokens=data.caption_tokens or SOURCE_CAPTION_TOKENS,
        )  # fmt: skip
        make_shards(settings, data.shards, report=say)
    names = [phase.shards or data.shards for phase in phases]
    mixes = [read_mix(name) for name in names]
    manifests = [mix.manifest() for mix in mixes]
    encoders = expected_encoders(data.vae, data.text_encoder)
    expected = dataclasses.replace(encoders, sigma_data=sigma_data, caption_tokens=data.caption_tokens)
    for phase, mix in zip(phases, mixes, strict=True):
        mix.check(dataclasses.replace(expected, resolution=phase.resolution))
    check_alike(names, manifests)
    return manifests


def expected_encoders(vae: str, text_encoder: str) -> ShardExpectations:
    """Returns the expected encoder names, and the fingerprint of the image encoder if it is a local folder."""
    from micro_dit.encoders.hub import ASSETS
    from micro_dit.encoders.image import load_image_encoder

    folder = Path(text_encoder).expanduser()
    text_name = folder.resolve().name if folder.is_dir() else text_encoder
    if Path(vae).expanduser().is_dir() or (ASSETS / vae).is_dir():
        encoder = load_image_encoder(vae)
        return ShardExpectations(vae=encoder.name, vae_fingerprint=encoder.fingerprint, text_encoder=text_name)
    return ShardExpectations(vae=vae, text_encoder=text_name)
