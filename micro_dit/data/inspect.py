"""Shows what a folder of shards holds: `python -m micro_dit.data.inspect PATH [--verify] [--sheet=FILE.png]`.

Prints the manifest, compares the files with it (with --verify by their checksums, and the rejects with their counts),
compares the latents' standard deviation with sigma_data, and draws a contact sheet: images decoded from the latents,
with their captions. Of a folder that is still being made, it says how far that is.
"""

import collections
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from micro_dit.cli import run_command
from micro_dit.data.pipeline import load_split
from micro_dit.data.preparation.journal import PARTS, PLAN
from micro_dit.data.shard_checks import STD_FACTOR, check_shards
from micro_dit.data.shards import MANIFEST, REJECTS, Manifest, Tally, read_manifest, shards_folder
from micro_dit.encoders.info import UNVERIFIED
from micro_dit.errors import UserError

IDS_SHOWN = 5
IMAGES_AT_ONCE = 8


def describe(manifest: Manifest, sigma_data: float) -> str:
    """Returns the manifest in words, a few lines for each of its parts."""
    vae, text = manifest.vae, manifest.text_encoder
    kept = sum(map(manifest.records, manifest.splits))
    dropped = sum(tally.count for tally in manifest.dropped.values())
    rows = [
        ("source", manifest.source),
        ("attribution", manifest.attribution),
        ("format", f"{manifest.format_version}, fingerprint {manifest.fingerprint}"),
        ("image encoder", f"{vae.name} ({vae.fingerprint}), {vae.channels} channels, {vae.downsample} px per latent"),
        ("text encoder", f"{text.name} ({text.fingerprint}), {text.tokens} tokens of {text.channels} channels"),
        ("captions", f"cleaning: {manifest.caption_cleaning}"),
        ("inputs", f"{kept + dropped:,} seen, {kept:,} kept, {dropped:,} dropped"),
    ]
    rows += [("dropped", _tally(reason, tally)) for reason, tally in manifest.dropped.items()]
    rows += [("altered", _tally(reason, tally)) for reason, tally in manifest.altered.items()]
    for split, files in manifest.splits.items():
        size = sum(file.bytes for file in files) / 1e6
        rows.append((f"split {split}", f"records {manifest.records(split):,}, files {len(files):,}, {size:,.1f} MB"))
    for field in manifest.fields:
        rows.append(("array", f"{field.name} {field.dtype} {field.shape}{' for each caption' * field.per_caption}"))
    for resolution in manifest.resolutions:
        rows.append((f"latents, {resolution} px", _scale(manifest, resolution, sigma_data)))
        for moment, values in manifest.statistics[str(resolution)].items():
            rows.append((f"  {moment} by channel", " ".join(f"{value:.3f}" for value in values)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _tally(reason: str, tally: Tally) -> str:
    more = ", …" if tally.count > IDS_SHOWN else ""
    return f"{tally.count:,}: {reason}: {', '.join(tally.ids[:IDS_SHOWN])}{more}"


def _scale(manifest: Manifest, resolution: int, sigma_data: float) -> str:
    std = manifest.latent_std(resolution)
    fits = sigma_data / STD_FACTOR <= std <= sigma_data * STD_FACTOR
    verdict = "fits" if fits else f"off by more than {STD_FACTOR:g} times: training refuses it"
    return f"{manifest.posterior}, deviation {std:.3f}, {std / sigma_data:.2f} × sigma_data {sigma_data:g}: {verdict}"


def check_rejects(folder: str | Path, manifest: Manifest) -> None:
    """Counts the rejects on file; raises UserError if the counts are not the manifest's or the file is damaged."""
    path = shards_folder(folder) / REJECTS
    expected = {reason: tally.count for reason, tally in manifest.dropped.items() if tally.count}
    if not path.exists() and not expected:
        return
    try:
        with path.open(encoding="utf-8") as file:
            found = collections.Counter(json.loads(line)["reason"] for line in file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): copy it again, or make the shards again.") from error
    for reason in expected | found:
        if expected.get(reason, 0) != found[reason]:
            raise UserError(
                f"{path} names {found[reason]} inputs for '{reason}', and the manifest {expected.get(reason, 0)}: copy "
                "both again, or make the shards again."
            )


def contact_sheet(folder: str | Path, out: str | Path, split: str, images: int, vae: str | None = None) -> int:
    """Decodes up to `images` examples of a split at the lowest resolution, and draws them with captions into `out`.

    Returns:
        The number of examples.

    Raises:
        UserError: The encoder, by default the manifest's, is not the one that computed the latents or cannot be loaded;
            or the shards are damaged.
    """
    from micro_dit.encoders.image import load_image_encoder
    from micro_dit.images import caption_grid, save_png

    manifest = read_manifest(folder)
    encoder = load_image_encoder(vae or manifest.vae.name)
    if manifest.vae.fingerprint not in (UNVERIFIED, encoder.fingerprint):
        raise UserError(
            f"{folder} was made with image encoder {manifest.vae.name} ({manifest.vae.fingerprint}), and "
            f"{vae or manifest.vae.name} is {encoder.fingerprint}: give theirs with --vae."
        )
    examples = load_split(folder, split, min(manifest.resolutions), images)
    latents, pictures = examples["latent_mean"], []
    for start in range(0, len(latents), IMAGES_AT_ONCE):
        # Always a full batch: the decoder compiles once for each shape.
        rows = np.arange(start, start + IMAGES_AT_ONCE) % len(latents)
        decoded = np.asarray(encoder.decode(latents[rows].astype(np.float32)))
        pictures.append(np.clip(np.round((decoded + 1) * 127.5), 0, 255).astype(np.uint8))
    shown = np.concatenate(pictures)[: len(latents)]
    title = f"{Path(folder).name}: {split}, {len(latents)} of {manifest.records(split):,}"
    about = {"attribution": manifest.attribution, "shards": manifest.fingerprint}
    save_png(caption_grid(shown, examples["text"], title=title), out, about)
    return len(latents)


def progress(folder: str | Path) -> str:
    """Describes how much of an unfinished folder is there; raises UserError if nothing is being made there."""
    path = shards_folder(folder)
    if not (path / PLAN).exists():
        read_manifest(folder)  # says what is missing
    try:
        plan = json.loads((path / PLAN).read_text(encoding="utf-8"))
        planned = {split: len(parts) for split, parts in plan["parts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / PLAN} is damaged ({error!r}): delete {folder} and make the shards again.") from error
    lines = [f"{folder} is not finished: it has no {MANIFEST}; to go on, run the same precompute command again."]
    for split, count in planned.items():
        done = len(list((path / PARTS).glob(f"{split}-*.json")))
        lines.append(f"split {split}: {done:,} of {count:,} parts are done")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Prints, checks and draws what the flags ask for."""
    values = flags.FLAGS
    if len(argv) != 2:
        raise UserError("give one folder of shards: python -m micro_dit.data.inspect PATH; see --help.")
    folder = argv[1]
    if not (shards_folder(folder) / MANIFEST).exists():
        print(progress(folder))
        return
    manifest = read_manifest(folder)
    print(describe(manifest, values.sigma_data))
    check_shards(manifest, folder, checksums=values.verify)
    if values.verify:
        check_rejects(folder, manifest)
    print("all files have " + ("the checksums" if values.verify else "the sizes and counts") + " of the manifest")
    if values.sheet:
        drawn = contact_sheet(folder, values.sheet, values.split, values.images, values.vae)
        print(f"{drawn} images of {values.split}: {values.sheet}")


def define_flags() -> None:
    """Defines the command's flags; not at import, where they could collide with those of another command."""
    flags.DEFINE_boolean("verify", False, "Read every file and compare its checksum.")
    flags.DEFINE_string("sheet", None, "Draw a contact sheet into this PNG.")
    flags.DEFINE_integer("images", 24, "Images on the contact sheet.", lower_bound=1)
    flags.DEFINE_string("split", "train", "Split that the contact sheet shows.")
    flags.DEFINE_string("vae", None, "Image encoder that decodes the latents; default: the one the manifest names.")
    flags.DEFINE_float("sigma_data", 0.9, "diffusion.sigma_data of the recipe that the shards are meant for.")


if __name__ == "__main__":
    run_command(main, define_flags, takes_arguments=True)
