"""Shows the contents of a folder of shards.

    python -m micro_dit.data.inspect PATH [--verify] [--sheet=FILE.png]

Prints the manifest, compares the standard deviation of the latents with sigma_data, and checks the sizes and record
counts of the files. --verify also checks the checksums and the number of rejects. --sheet writes a contact sheet of
images decoded from the latents, with their captions. For an unfinished folder, prints the progress instead.
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
    """Returns a readable summary of a manifest, with one property per line."""
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
        rows.append(("array", f"{field.name} {field.dtype} {field.shape}{' per caption' * field.per_caption}"))
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
    verdict = "OK" if fits else f"differs by more than a factor of {STD_FACTOR:g}, so training will refuse these shards"
    return f"{manifest.posterior}, std {std:.3f}, {std / sigma_data:.2f} × sigma_data {sigma_data:g}: {verdict}"


def check_rejects(folder: str | Path, manifest: Manifest) -> None:
    """Compares the rejects file with the manifest; raises UserError if the counts differ or the file is damaged."""
    path = shards_folder(folder) / REJECTS
    expected = {reason: tally.count for reason, tally in manifest.dropped.items() if tally.count}
    if not path.exists() and not expected:
        return
    try:
        with path.open(encoding="utf-8") as file:
            found = collections.Counter(json.loads(line)["reason"] for line in file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"Cannot read {path} ({error!r}). Copy it again, or rebuild the shards.") from error
    for reason in expected | found:
        if expected.get(reason, 0) != found[reason]:
            raise UserError(
                f"{path} lists {found[reason]} inputs dropped with reason '{reason}', but the manifest counts "
                f"{expected.get(reason, 0)}. Copy both files again, or rebuild the shards."
            )


def contact_sheet(folder: str | Path, out: str | Path, split: str, images: int, vae: str | None = None) -> int:
    """Decodes the first examples of a split and writes them with their captions to a PNG file.

    Args:
        folder: Folder of shards.
        out: Path of the PNG file.
        split: Split to show.
        images: Maximum number of images.
        vae: Image encoder; by default the one named in the manifest.

    Returns:
        The number of images on the sheet.

    Raises:
        UserError: The encoder did not compute the latents or cannot be loaded, or the shards are damaged.
    """
    from micro_dit.encoders.image import load_image_encoder
    from micro_dit.images import caption_grid, save_png

    manifest = read_manifest(folder)
    encoder = load_image_encoder(vae or manifest.vae.name)
    if manifest.vae.fingerprint not in (UNVERIFIED, encoder.fingerprint):
        raise UserError(
            f"{folder} was encoded with image encoder {manifest.vae.name} (fingerprint {manifest.vae.fingerprint}), "
            f"but {vae or manifest.vae.name} has fingerprint {encoder.fingerprint}. Set --vae to the image encoder of "
            "the shards."
        )
    examples = load_split(folder, split, min(manifest.resolutions), images)
    latents, batches = examples["latent_mean"], []
    for start in range(0, len(latents), IMAGES_AT_ONCE):
        # Every batch has the same size, because the decoder is compiled once per shape.
        rows = np.arange(start, start + IMAGES_AT_ONCE) % len(latents)
        decoded = np.asarray(encoder.decode(latents[rows].astype(np.float32)))
        batches.append(np.clip(np.round((decoded + 1) * 127.5), 0, 255).astype(np.uint8))
    shown = np.concatenate(batches)[: len(latents)]
    title = f"{Path(folder).name}: {split}, {len(latents)} of {manifest.records(split):,}"
    metadata = {"attribution": manifest.attribution, "shards": manifest.fingerprint}
    save_png(caption_grid(shown, examples["text"], title=title), out, metadata)
    return len(latents)


def progress(folder: str | Path) -> str:
    """Returns the progress of an unfinished folder; raises UserError if the folder does not contain shards."""
    path = shards_folder(folder)
    if not (path / PLAN).exists():
        read_manifest(folder)  # raises an error that names the missing file
    try:
        plan = json.loads((path / PLAN).read_text(encoding="utf-8"))
        planned = {split: len(parts) for split, parts in plan["parts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / PLAN} is damaged ({error!r}). Delete {folder} and rebuild the shards.") from error
    lines = [f"{folder} is unfinished: it has no {MANIFEST}. Run the same precompute command again to resume."]
    for split, count in planned.items():
        done = len(list((path / PARTS).glob(f"{split}-*.json")))
        lines.append(f"split {split}: {done:,} of {count:,} parts done")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Runs the command: prints the manifest or the progress, checks the files, and writes the contact sheet."""
    values = flags.FLAGS
    if len(argv) != 2:
        raise UserError("Pass exactly one folder of shards: python -m micro_dit.data.inspect PATH.")
    folder = argv[1]
    if not (shards_folder(folder) / MANIFEST).exists():
        print(progress(folder))
        return
    manifest = read_manifest(folder)
    print(describe(manifest, values.sigma_data))
    check_shards(manifest, folder, checksums=values.verify)
    if values.verify:
        check_rejects(folder, manifest)
    print("The " + ("checksums" if values.verify else "sizes and record counts") + " of all files match the manifest.")
    if values.sheet:
        shown = contact_sheet(folder, values.sheet, values.split, values.images, values.vae)
        print(f"Wrote {shown} images of split {values.split} to {values.sheet}.")


def define_flags() -> None:
    """Defines the command's flags. Not done at import time, because other commands define flags of the same names."""
    flags.DEFINE_boolean("verify", False, "Compare the checksum of every file and the number of rejects.")
    flags.DEFINE_string("sheet", None, "Write a contact sheet to this PNG file.")
    flags.DEFINE_integer("images", 24, "Number of images on the contact sheet.", lower_bound=1)
    flags.DEFINE_string("split", "train", "Split to show on the contact sheet.")
    flags.DEFINE_string("vae", None, "Image encoder that decodes the latents. Default: the one named in the manifest.")
    flags.DEFINE_float("sigma_data", 0.9, "The value of diffusion.sigma_data in the training config.")


if __name__ == "__main__":
    run_command(main, define_flags, takes_arguments=True)
