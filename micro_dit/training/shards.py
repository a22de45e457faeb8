"""The shards that a run trains on: made if they are missing and can be, and checked against its config."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from micro_dit.data.mixture import check_alike, read_mix
from micro_dit.data.preparation.prepare import make_shards
from micro_dit.data.preparation.settings import PreparationSettings
from micro_dit.data.shards import MANIFEST, Manifest, shards_folder
from micro_dit.training.phases import Phase


def prepare_shards(config: Any, phases: Sequence[Phase], say: Callable[[str], None]) -> list[Manifest]:
    """The manifest of each phase's shards; those of the embedded data are made first if they are missing.

    Raises:
        UserError: shards are missing, damaged, lack the phase's resolution, or contradict the config or each other.
    """
    data = config.data
    if data.source and "," not in data.shards and not (shards_folder(data.shards) / MANIFEST).exists():
        say(f"preparing {data.shards} from {data.source} (once)")
        settings = PreparationSettings(
            data.source, tuple(data.resolutions), data.vae, data.text_encoder, caption_tokens=data.caption_tokens
        )
        make_shards(settings, data.shards, report=say)
    names = [phase.shards or data.shards for phase in phases]
    mixes = [read_mix(name) for name in names]
    manifests = [mix.manifest() for mix in mixes]
    encoders = asked_encoders(data.vae, data.text_encoder)
    for phase, mix in zip(phases, mixes, strict=True):
        mix.check(
            resolution=phase.resolution, sigma_data=config.diffusion.sigma_data, caption_tokens=data.caption_tokens,
            **encoders,
        )  # fmt: skip
    check_alike(names, manifests)
    return manifests


def asked_encoders(vae: str, text_encoder: str) -> dict[str, str]:
    """What `check_shards` shall find of the config's encoders: names, and a fingerprint of what is there to be read."""
    from micro_dit.encoders.hub import ASSETS
    from micro_dit.encoders.image import load_image_encoder

    local = Path(text_encoder).expanduser().is_dir()
    asked = {"vae": vae, "text_encoder": Path(text_encoder).expanduser().resolve().name if local else text_encoder}
    if Path(vae).expanduser().is_dir() or (ASSETS / vae).is_dir():
        encoder = load_image_encoder(vae)
        asked |= {"vae": encoder.name, "vae_fingerprint": encoder.fingerprint}
    return asked
