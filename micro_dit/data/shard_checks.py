"""Checks a folder of shards against its manifest and against the expectations of a training run."""

import contextlib
import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from micro_dit.data.shards import Manifest, ShardFile, shards_folder
from micro_dit.encoders.info import UNVERIFIED
from micro_dit.errors import UserError
from micro_dit.files import hash_file

FILES_AT_ONCE = 16
STD_FACTOR = 2.0  # tolerated ratio between the standard deviation of the latents and sigma_data


@dataclasses.dataclass(frozen=True)
class ShardExpectations:
    """Properties that shards must have; None skips the comparison.

    Attributes:
        resolution: Side of the images in pixels, which must be one of the resolutions of the manifest.
        sigma_data: Standard deviation of the latents at `resolution`, up to a factor of two.
        caption_tokens: Tokens per caption embedding.
        vae: Name of the image encoder; compared only if one of the fingerprints is unknown.
        vae_fingerprint: Fingerprint of the image encoder.
        text_encoder: Name of the text encoder.
    """

    resolution: int | None = None
    sigma_data: float | None = None
    caption_tokens: int | None = None
    vae: str | None = None
    vae_fingerprint: str | None = None
    text_encoder: str | None = None


def check_shards(
    manifest: Manifest, shards: str | Path, expected: ShardExpectations | None = None, *, checksums: bool = False
) -> None:
    """Checks that the files of a folder match the manifest and have the expected properties.

    Args:
        manifest: Manifest of the folder.
        shards: Path of the folder.
        expected: Properties that the shards must have.
        checksums: Whether to compare SHA-256 checksums in addition to sizes and record counts; reads every file.

    Raises:
        UserError: Describes the first difference found.
    """
    if expected is not None:
        _check_contents(manifest, shards, expected)
    folder = shards_folder(shards)
    files = itertools.chain.from_iterable(manifest.splits.values())
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:  # a large data set has thousands of files
        list(pool.map(lambda file: _check_file(folder / file.name, file, checksums), files))


def _check_contents(manifest: Manifest, shards: str | Path, expected: ShardExpectations) -> None:
    resolution, sigma_data = expected.resolution, expected.sigma_data
    if resolution is not None and resolution not in manifest.resolutions:
        sides = ", ".join(map(str, manifest.resolutions))
        raise UserError(
            f"Shards in {shards} have latents for {sides} px, but {resolution} px is requested. Set the resolution (in "
            f"training, --config.phases[i].resolution) to one of {sides}, or rebuild the shards with precompute "
            f"--resolutions={resolution}."
        )
    vae, text = manifest.vae, manifest.text_encoder
    image: tuple[str, str | None, str] = (f"image encoder {vae.name}", expected.vae, vae.name)
    if expected.vae_fingerprint is not None and UNVERIFIED not in (expected.vae_fingerprint, vae.fingerprint):
        image = (f"image encoder fingerprint {vae.fingerprint}", expected.vae_fingerprint, vae.fingerprint)
    for what, asked, held, fix in (
        (f"{text.tokens} caption tokens", expected.caption_tokens, text.tokens, f"caption_tokens={text.tokens}"),
        (*image, f"vae to the image encoder of the shards ({vae.name})"),
        (f"text encoder {text.name}", expected.text_encoder, text.name, f"text_encoder={text.name}"),
    ):
        if asked is not None and asked != held:
            raise UserError(
                f"Shards in {shards} have {what}, but the config asks for {asked}. Set --config.data.{fix}, or rebuild "
                "the shards."
            )
    if sigma_data is not None and resolution is not None:
        std = manifest.latent_std(resolution)
        if not sigma_data / STD_FACTOR <= std <= sigma_data * STD_FACTOR:
            raise UserError(
                f"Latents in {shards} have standard deviation {std:.2g} at {resolution} px, but sigma_data is "
                f"{sigma_data:.2g}. Set --config.diffusion.sigma_data to about {std:.2g}, or rebuild the shards with a "
                "different scaling factor."
            )


def _check_file(path: Path, file: ShardFile, checksums: bool) -> None:
    """Compares a file with its entry in the manifest."""
    fix = "Copy it again, or rebuild the shards"
    if not path.exists():
        raise UserError(f"The shard {path} is missing. {fix}.")
    if path.stat().st_size != file.bytes:
        raise UserError(f"The shard {path} has {path.stat().st_size} bytes instead of {file.bytes}. {fix}.")
    reader = ArrayRecordReader(str(path))
    records = reader.num_records()  # 0 if the file is damaged, in which case close() raises RuntimeError
    with contextlib.suppress(RuntimeError):
        reader.close()
    if records != file.records:
        raise UserError(f"The shard {path} has {records} records instead of {file.records}. {fix}.")
    if checksums and hash_file(path) != file.sha256:
        raise UserError(f"The shard {path} has changed: its SHA-256 differs from the manifest. {fix}.")
