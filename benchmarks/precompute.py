"""Times each stage of micro_dit/data/preparation separately, to find the slowest.

    python -m benchmarks.precompute                      the included encoders at 256 px, decoding on two CPU cores
    python -m benchmarks.precompute --resolutions 256 512 --vae=stabilityai/stable-diffusion-xl-base-1.0 \\
        --text_encoder=apple/DFN5B-CLIP-ViT-H-14-378 --dtype=bfloat16 --batch=64 --workers=16
    python -m benchmarks.precompute --json=PATH          also writes the results to a file

The images are generated, photograph-like JPEG files of 640×480 pixels, each with a caption. In production all stages
run at the same time. If each has separate cores, the slowest stage determines the throughput; on shared cores, the CPU
seconds add up.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from micro_dit.data.preparation.prepare import describe, load_encoders, make_shards
from micro_dit.data.preparation.settings import PreparationSettings
from micro_dit.data.preparation.workers import Decoders, prepare_example
from micro_dit.data.shard_writer import ShardFileWriter
from micro_dit.data.shards import Record
from micro_dit.data.sources import Example, Source, open_source

WIDTH, HEIGHT = 640, 480
CAPTION = "A photograph of a small red boat on a calm lake in front of snowy mountains, early in the morning, number {}"


def make_folder(folder: Path, images: int) -> None:
    """Writes JPEG files that take about as long to decode as photographs, and their captions."""
    generator = np.random.default_rng(0)
    for number in range(images):
        coarse = Image.fromarray(generator.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        grained = np.clip(smooth + generator.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(grained).save(folder / f"{number:05}.jpg", quality=90)
        (folder / f"{number:05}.txt").write_text(CAPTION.format(number))


def timed(stage: str, images: int, work: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Runs a stage; returns its row of the table and its result. CPU seconds exclude decoding processes."""
    started, cpu = time.monotonic(), time.process_time()
    result = work()
    wall, cpu = time.monotonic() - started, time.process_time() - cpu
    row = {"stage": stage, "images": images, "wall_s": wall, "cpu_s": cpu, "images_per_s": images / wall}
    return row, result


def read_all(source: Source) -> list[Example]:
    """Reads all examples of the split 'train'."""
    return [item for part in source.parts("train") for item in part if isinstance(item, Example)]


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times each stage separately, in the order of the pipeline, and then all of them together."""
    sides, size, images = tuple(sorted(arguments.resolutions)), arguments.batch, arguments.images
    settings = PreparationSettings(
        f"folder:{folder}", sides, arguments.vae, arguments.text_encoder, clean_captions=arguments.clean_captions,
        dtype=arguments.dtype, batch_size=size,
    )  # fmt: skip
    encoders = load_encoders(settings)
    source = open_source(settings.source, px=max(sides))
    rows = []

    row, examples = timed("read", images, lambda: read_all(source))
    rows.append(row)

    prepare = partial(prepare_example, resolutions=sides, minimum_side=min(sides), clean=settings.clean_captions)
    with Decoders(arguments.workers) as decoders:
        items = [(None, (example.image, example.captions)) for example in examples]
        list(decoders.map(prepare, items[: 2 * arguments.workers], 2 * size))  # starts the processes
        row, decoded = timed("decode and crop", images, lambda: [r for _, r in decoders.map(prepare, items, 2 * size)])
    rows.append(row)

    moments: dict[int, Any] = {}
    for side in sides:
        pixels = np.stack([decoded[number % images].images[side] for number in range(size)])
        batches = max(2, images // size)
        jax.block_until_ready(encoders.image.encode(pixels))  # compiles
        again = [pixels] * batches
        row, results = timed(
            f"encode images, {side} px",
            size * batches,
            partial(lambda again: jax.block_until_ready([encoders.image.encode(pixels) for pixels in again]), again),
        )
        moments[side] = [np.asarray(moment) for moment in results[-1]]
        rows.append(row)

    captions = [caption for prepared in decoded for caption in prepared.captions]
    encoders.text.encode(captions[:size])  # compiles
    chunks = [captions[start : start + size] for start in range(0, len(captions), size)]
    row, embeddings = timed("encode captions", images, lambda: [encoders.text.encode(chunk) for chunk in chunks])
    rows.append(row)

    manifest = describe(source, settings, encoders)
    arrays = {
        f"latent_{kind}_{side}": moment[0].astype(np.float16)
        for side in sides
        for kind, moment in zip(("mean", "std"), moments[side], strict=True)
    } | {"caption_embedding": embeddings[0][:1].astype(np.float16)}

    def write() -> None:
        with ShardFileWriter(folder / "written", manifest.fields) as writer:
            for example in examples:
                writer.write(Record(example.id, example.captions, arrays))

    row, _ = timed("write", images, write)
    rows.append(row)
    (folder / "written").unlink()

    lines: list[str] = []
    with tempfile.TemporaryDirectory() as out:
        whole = partial(make_shards, settings, f"{out}/shards", workers=arguments.workers, report=lines.append)
        row, _ = timed("all, including start", images, whole)
    rows.append(row | {"report": lines})
    return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Formats the results as a table."""
    lines = ["stage                     images/s   s/1000 images  CPU s/1000 images"]
    for row in rows:
        per_thousand = 1000 / row["images"]
        lines.append(
            f"{row['stage']:24}  {row['images_per_s']:8.1f}  {row['wall_s'] * per_thousand:14.2f}  "
            f"{row['cpu_s'] * per_thousand:17.2f}"
        )
    return "\n".join(lines)


def describe_machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the hardware, load, package versions and arguments of the benchmark."""
    return {
        "date": datetime.date.today().isoformat(),
        "devices": [device.device_kind for device in jax.local_devices()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the stages of preparing a data set.")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256])
    parser.add_argument("--vae", default="openmoji_vae")
    parser.add_argument("--text_encoder", default="minilm")
    parser.add_argument("--dtype", default="float32", help="dtype of the encoders' matrix products")
    parser.add_argument("--batch", type=int, default=32, help="images encoded at once")
    parser.add_argument("--workers", type=int, default=2, help="number of decoding processes")
    parser.add_argument("--clean_captions", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()

    machine = describe_machine(arguments)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{', '.join(machine['devices'])}; {machine['cores']} cores, load before {machine['load_before']:.1f}")
    print(f"{arguments.vae} in {arguments.dtype}, {arguments.text_encoder}, batches of {arguments.batch}; {versions}")
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), arguments.images)
        rows = measure(Path(folder), arguments)
    print(table(rows))
    print("\n".join(rows[-1]["report"]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
