"""Run by test_evaluated.py on 8 fake devices: samples and evaluates on one and on all devices; prints JSON."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from micro_dit.diffusion.generate import Generator, Sampling
from micro_dit.evaluation.domain import domain_measures, real_images
from micro_dit.evaluation.image_sets import FromFiles, sample_missing
from micro_dit.parallel.mesh import batch_sharding, make_mesh, replicated
from tests.helpers import tiny

PROMPTS = [f"number {i % 5}" for i in range(21)]


def embed(prompts: Sequence[str]) -> np.ndarray:
    rows = [np.random.default_rng(list(p.encode())).standard_normal((4, 12)) for p in prompts]
    return np.asarray(rows, np.float32)


def main(folder: str) -> None:
    network = tiny.network()
    params = tiny.random_params(network)
    real = real_images(tiny.write_shards(Path(folder) / "shards"), 64)
    found: dict[str, Any] = {"devices": jax.local_device_count()}
    images = {}
    for name, devices, batch_size in (("one", jax.devices()[:1], 3), ("eight", jax.devices(), 16)):
        mesh = make_mesh(None, devices)
        everywhere = jax.device_put(params, replicated(mesh))
        generator = Generator(network, sigma_data=0.9, sharding=batch_sharding(mesh))

        def generate(
            prompts: Sequence[str], seeds: Sequence[int], g: Generator = generator, params: Any = everywhere
        ) -> np.ndarray:
            return g.images(params, embed(prompts), seeds, Sampling(2, 2.0), tiny.Blocks().decode)

        files = [Path(folder) / name / f"{i:06d}.png" for i in range(len(PROMPTS))]
        # Sample both shares of the set, as two processes would.
        for index in (1, 0):
            sample_missing(files, PROMPTS, range(len(PROMPTS)), generate, batch_size=batch_size, share=(index, 2))
        images[name] = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
        measures = domain_measures(FromFiles(files, prompts=PROMPTS), real, tiny.Blocks())
        found[name] = {measure.name: measure.value for measure in measures}
    found["pixel difference"] = int(np.abs(images["one"] - images["eight"]).max())
    found["different"] = len({image.tobytes() for image in images["one"]})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
