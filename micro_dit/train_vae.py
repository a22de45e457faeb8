"""Trains the demo's small image autoencoder on OpenMoji.

    python -m micro_dit.train_vae --out=/tmp/openmoji_vae --minutes=45

It trains on the 'train' split at 128 pixels, and writes the quality on the other splits to `metrics.json` in the
folder. See micro_dit/encoders/vae_training.py for the loss and the schedule.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from micro_dit.cli import run_command
from micro_dit.data.sources.openmoji import OpenMoji
from micro_dit.encoders.vae_training import PIXELS, AutoencoderTraining, train_autoencoder
from micro_dit.files import write_atomically


def train(out: str, settings: AutoencoderTraining) -> dict[str, Any]:
    """Trains on OpenMoji, writes the autoencoder and `metrics.json` to the folder `out`, and returns the metrics."""
    source = OpenMoji(px=PIXELS)
    held_out = np.concatenate([source.pixels("validation"), source.pixels("compositions")])
    command = " ".join(["python -m micro_dit.train_vae", *sys.argv[1:]])
    metrics: dict[str, Any] = {"command": command, "data": source.attribution}
    metrics |= train_autoencoder(source.pixels("train"), held_out, out, settings)
    text = json.dumps(metrics, indent=2)
    write_atomically(Path(out) / "metrics.json", f"{text}\n")
    print(text, flush=True)
    return metrics


def main() -> None:
    """Runs `train` with the values of the flags."""
    values = flags.FLAGS
    settings = AutoencoderTraining(
        values.minutes, values.steps, values.seed, values.batch_size, values.learning_rate, values.init
    )
    train(values.out, settings)


def define_flags() -> None:
    """Defines the flags; not at import, where they could collide with flags of another command."""
    flags.DEFINE_string("out", None, "Folder to write the autoencoder to.", required=True)
    flags.DEFINE_float("minutes", None, "Wall time of the training, in minutes.")
    flags.DEFINE_integer("steps", None, "Number of training steps, instead of --minutes.")
    flags.DEFINE_integer("seed", 0, "Seed for initialization, crops and latent noise.")
    flags.DEFINE_integer("batch_size", 8, "Crops per step.")
    flags.DEFINE_float("learning_rate", 6e-3, "Peak learning rate.")
    flags.DEFINE_string("init", None, "Folder of an autoencoder to initialize from.")


if __name__ == "__main__":
    run_command(main, define_flags)
