"""Compares the loader of micro_dit/data/pipeline.py with mosaicml-streaming on the same records.

    pip install --no-deps mosaicml-streaming torchvision; pip install zstandard    and other packages that it imports
    python -m benchmarks.loader                    takes a minute, and 700 MB in a temporary folder
    python -m benchmarks.loader --json=PATH        also writes the results to a file

(mosaicml-streaming requires older versions of numpy and transformers, hence `--no-deps`.)

A record is that of the paper's first phase: 4×32×32 latents and 77×1024 caption channels in float16, 166 kB. Both
formats store the same records without compression. They are in the page cache, as after the first epoch on a machine
with enough memory, so this measures the loaders and not the disk. Each loader shuffles and returns batches in host
memory. The loaders take turns, each turn in a separate process on the same cores, and the results are medians. CPU
seconds include the worker processes; on a shared machine they are more reliable than wall seconds.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESOLUTION, LATENT, CAPTION = 256, (4, 32, 32), (77, 1024)
RECORD_BYTES = 2 * (4 * 32 * 32 + 77 * 1024)
NEEDED = 1_700  # images/s that a GPU at 45% of its peak consumes in the paper's first phase
FILES = 4


def write_records(folder: Path, records: int) -> None:
    """Writes the same random records as micro_dit's shards and as MDS, each split evenly into FILES files."""
    from streaming import MDSWriter

    from micro_dit.data.shard_writer import ShardFileWriter, latent_statistics, shard_name, write_manifest
    from micro_dit.data.shards import Manifest, Record, record_fields
    from micro_dit.encoders.info import ImageEncoderInfo, TextEncoderInfo

    vae, text = ImageEncoderInfo("noise", "0", 4, 8), TextEncoderInfo("noise", "0", *CAPTION)
    fields = record_fields((RESOLUTION,), "sample", vae, text)
    generator = np.random.default_rng(0)
    ours, theirs = folder / "ours", folder / "theirs"
    ours.mkdir()
    columns = {"caption": "str", "caption_latents": "bytes", "latents_256": "bytes"}  # as in the public release
    files, sums = [], []
    with MDSWriter(out=str(theirs), columns=columns, size_limit=records // FILES * RECORD_BYTES) as mds:
        for index in range(FILES):
            with ShardFileWriter(ours / shard_name("train", index, FILES), fields) as writer:
                for number in range(index * records // FILES, (index + 1) * records // FILES):
                    latent = generator.standard_normal(LATENT, np.float32).astype(np.float16)
                    caption = generator.standard_normal(CAPTION, np.float32).astype(np.float16)
                    name = f"caption {number}"
                    arrays = {"latent_sample_256": latent.transpose(1, 2, 0), "caption_embedding": caption[None]}
                    writer.write(Record(str(number), (name,), arrays))
                    mds.write({"caption": name, "caption_latents": caption.tobytes(), "latents_256": latent.tobytes()})
            files.append(writer.info)
            sums.append(writer.latent_sums)
    write_manifest(
        ours,
        Manifest(
            source="noise", attribution="nobody", resolutions=(RESOLUTION,), posterior="sample", vae=vae,
            text_encoder=text, fields=fields, dropped={}, altered={}, statistics=latent_statistics(sums),
            caption_cleaning="none", splits={"train": tuple(files)},
        ),
    )  # fmt: skip


def our_batches(folder: Path, batch_size: int) -> Iterator[Mapping[str, Any]]:
    """Returns an endless iterator over micro_dit's shards."""
    from micro_dit.data.pipeline import make_train_iterator

    return make_train_iterator(folder / "ours", "train", RESOLUTION, batch_size, seed=0)


def their_batches(folder: Path, batch_size: int, workers: int, images: int) -> Iterator[Mapping[str, Any]]:
    """Returns an iterator over one epoch of `images` images of the MDS shards, read as in the public release."""
    import torch
    from streaming import StreamingDataset

    class Latents(StreamingDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            latent = np.frombuffer(sample["latents_256"], np.float16).copy().reshape(LATENT)
            caption = np.frombuffer(sample["caption_latents"], np.float16).copy().reshape(CAPTION)
            return {"latent_mean": torch.from_numpy(latent), "caption": torch.from_numpy(caption)}

    dataset = Latents(
        local=str(folder / "theirs"), shuffle=True, batch_size=batch_size, epoch_size=images,
        num_canonical_nodes=1,
    )  # fmt: skip
    return iter(torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers, drop_last=True))


def turn(batches: Iterator[Mapping[str, Any]], batch_size: int, warm_up: int, images: int) -> dict[str, float]:
    """Measures one turn; the first `warm_up` images, which include the start of workers, are not timed."""
    for _ in range(warm_up // batch_size):
        next(batches)
    started, cpu_started = time.perf_counter(), cpu_seconds()
    for _ in range(images // batch_size):
        batch = next(batches)
        assert tuple(batch["caption"].shape) == (batch_size, *CAPTION)
    done = images // batch_size * batch_size
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_started
    return {"images/s": done / seconds, "MB/s": done * RECORD_BYTES / seconds / 1e6, "CPU-ms/image": 1000 * cpu / done}


def cpu_seconds() -> float:
    """Returns CPU seconds of this process and its running child processes."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def one_turn(who: str, folder: Path, batch_size: int, images: int) -> dict[str, float]:
    """Measures a turn of 'ours', or of 'theirs-N' with N workers."""
    warm_up = 2_048
    if who == "ours":
        return turn(our_batches(folder, batch_size), batch_size, warm_up, images)
    workers = int(who.removeprefix("theirs-"))
    epoch = warm_up + images + 4 * workers * batch_size  # longer than the turn
    return turn(their_batches(folder, batch_size, workers, epoch), batch_size, warm_up, images)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the turns, and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--images", type=int, default=20_000, help="images per turn, after 2,048 for the warm-up")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[2, 4], help="numbers of processes of the torch DataLoader"
    )
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument(
        "--turn", nargs=2, metavar=("WHO", "FOLDER"), help=argparse.SUPPRESS
    )  # used for child processes
    options = parser.parse_args(argv)
    if options.turn:
        who, folder = options.turn
        print(json.dumps(one_turn(who, Path(folder), options.batch_size, options.images)))
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # inherited by child processes
    figures: dict[str, list[dict[str, float]]] = {"ours": [], **{f"theirs-{n}": [] for n in options.workers}}
    settings = [f"--batch_size={options.batch_size}", f"--images={options.images}"]
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder), options.records)
        for _ in range(options.turns):
            for who, rows in figures.items():
                command = [sys.executable, "-m", "benchmarks.loader", *settings, "--turn", who, folder]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                rows.append(json.loads(output.splitlines()[-1]))
    medians = {
        who: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for who, rows in figures.items()
    }
    print(f"{options.cores} cores, batches of {options.batch_size}, medians of {options.turns} turns")
    for who, row in medians.items():
        name = "micro_dit" if who == "ours" else f"streaming, {who.removeprefix('theirs-')} workers"
        figures_of = f"{row['images/s']:7,.0f} images/s{row['MB/s']:6,.0f} MB/s{row['CPU-ms/image']:6.2f} CPU-ms/image"
        print(f"{name:21}{figures_of}; {NEEDED:,} images/s need {NEEDED * row['CPU-ms/image'] / 1000:.1f} cores")
    best = max((row for who, row in medians.items() if who != "ours"), key=lambda row: row["images/s"])
    wall, cpu = medians["ours"]["images/s"] / best["images/s"], best["CPU-ms/image"] / medians["ours"]["CPU-ms/image"]
    print(f"{wall:.2f}× as fast as the best streaming setting in wall time, {cpu:.2f}× in CPU time")
    if options.json:
        Path(options.json).write_text(json.dumps({"medians": medians, "turns": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
