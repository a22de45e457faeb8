"""Checks of a folder of shards: its files are those of its manifest, and its contents are the expected ones."""

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
STD_FACTOR = 2.0  # by which the latents may differ from sigma_data


@dataclasses.dataclass(frozen=True)
class ShardExpectations:
    """Properties that shards must have; None is not compared.

    Attributes:
        resolution: Side in pixels that must be among the manifest's.
        sigma_data: Standard deviation of the latents at `resolution`, within a factor of two.
        vae: Name of the image encoder; compared only where a fingerprint is not known.
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
    """Checks that a folder's files are those of its manifest, and that they hold what is expected.

    Sizes and record counts are always compared; with `checksums`, every file is read and its SHA-256 compared, too.

    Raises:
        UserError: The first difference found.
    """
    if expected is not None:
        _check_contents(manifest, shards, expected)
    folder = shards_folder(shards)
    files = itertools.chain.from_iterable(manifest.splits.values())
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:  # a set of millions has thousands of files, perhaps far away
        list(pool.map(lambda file: _check_file(folder / file.name, file, checksums), files))


def _check_contents(manifest: Manifest, shards: str | Path, expected: ShardExpectations) -> None:
    resolution, sigma_data = expected.resolution, expected.sigma_data
    if resolution is not None and resolution not in manifest.resolutions:
        sides = ", ".join(map(str, manifest.resolutions))
        raise UserError(f"{shards} holds latents for {sides} px, not {resolution} px: prepare those, or use {sides}.")
    image: tuple[str, str | None, str] = ("image encoder", expected.vae, manifest.vae.name)
    if expected.vae_fingerprint is not None and UNVERIFIED not in (expected.vae_fingerprint, manifest.vae.fingerprint):
        image = ("image encoder fingerprint", expected.vae_fingerprint, manifest.vae.fingerprint)
    for what, asked, held in (
        ("caption tokens", expected.caption_tokens, manifest.text_encoder.tokens),
        image,
        ("text encoder", expected.text_encoder, manifest.text_encoder.name),
    ):
        if asked is not None and asked != held:
            raise UserError(f"{shards} was made with {what} {held}, not {asked}: use {held}, or make the shards again.")
    if sigma_data is not None and resolution is not None:
        std = manifest.latent_std(resolution)
        if not sigma_data / STD_FACTOR <= std <= sigma_data * STD_FACTOR:
            raise UserError(
                f"{shards} holds latents of standard deviation {std:.2g} at {resolution} px, but sigma_data is "
                f"{sigma_data:.2g}: set sigma_data to about theirs, or make the shards again with other scaling."
            )


def _check_file(path: Path, file: ShardFile, checksums: bool) -> None:
    """Compares a file with what the manifest says of it."""
    again = "copy it again, or make the shards again"
    if not path.exists():
        raise UserError(f"The shard {path} is missing: {again}.")
    if path.stat().st_size != file.bytes:
        raise UserError(f"The shard {path} has {path.stat().st_size} bytes instead of {file.bytes}: {again}.")
    reader = ArrayRecordReader(str(path))
    records = reader.num_records()  # 0 if the file is damaged; only closing it would then raise
    with contextlib.suppress(RuntimeError):
        reader.close()
    if records != file.records:
        raise UserError(f"The shard {path} has {records} records instead of {file.records}: {again}.")
    if checksums and hash_file(path) != file.sha256:
        raise UserError(f"The shard {path} has been altered (its sha256 differs from the manifest's): {again}.")
