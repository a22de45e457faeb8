"""Run by test_processes.py, as one process or as two that share the devices; process 0 prints the results as JSON."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from micro_dit.encoders import image, text
from micro_dit.parallel import distributed
from micro_dit.train import train
from micro_dit.training.metrics import read_metrics
from tests.helpers import tiny


def stand_in_encoders() -> None:
    """Replaces the encoders: latents are decoded to their first three channels, and all captions are equal."""
    decode = lambda latents: np.tanh(np.asarray(latents)[..., :3])  # noqa: E731
    encode = lambda prompts: np.ones((len(prompts), tiny.TEXT.tokens, tiny.TEXT.channels), np.float32)  # noqa: E731
    vae = SimpleNamespace(name="noise", fingerprint=tiny.VAE.fingerprint, decode=decode)
    captions = SimpleNamespace(name="noise", fingerprint=tiny.TEXT.fingerprint, encode=encode)
    vars(image)["load_image_encoder"] = lambda name: vae
    vars(text)["load_text_encoder"] = lambda name, tokens: captions


def main(shards: str, workdir: str, coordinator: str, index: str, count: str, mesh: str) -> None:
    if int(count) > 1:
        distributed.start(coordinator, int(index), int(count), timeout_seconds=120)
    stand_in_encoders()
    config = tiny.get_config(shards)
    config.model.use_patch_mixer, config.remat = False, "none"
    # By default, parameters are split over the devices of both processes, and each process reads a share of the batch.
    config.mesh.update(json.loads(mesh))
    config.phases = (tiny.UNMASKED | dict(steps=4, batch_size=16, mask_ratio=0.75, ema_start=1),)
    config.data.update(heldout="validation", heldout_images=3)
    config.sampling.update(prompts=("a", "b"), steps=1)
    config.checkpoint_every = 2
    folder = train(config, workdir)
    if jax.process_index() == 0:
        found = {
            "processes": jax.process_count(), "devices": jax.device_count(),
            "metrics": read_metrics(folder / "metrics.jsonl"),
            "files": sorted(path.name for path in folder.iterdir()),
        }  # fmt: skip
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
