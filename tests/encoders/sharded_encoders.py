"""Runs in a subprocess of test_sharded_encoders.py with 8 fake devices, and prints its measurements as JSON."""

import json
import sys
from typing import Any

import jax
import numpy as np
from flax import nnx

from micro_dit.encoders.autoencoder import AutoencoderConfig, AutoencoderKL
from micro_dit.encoders.image import ImageEncoder
from micro_dit.encoders.text import load_text_encoder
from micro_dit.parallel.mesh import batch_sharding, make_mesh

CONFIG = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4)
CAPTIONS = ["a photo of the cat", "the cat", "", "a photo"] * 5


def difference(ours: Any, theirs: Any) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())


def main(clip_folder: str) -> None:
    sharding = batch_sharding(make_mesh())
    parameters = nnx.to_pure_dict(nnx.state(AutoencoderKL(CONFIG, rngs=nnx.Rngs(0))))
    one, eight = ImageEncoder(CONFIG, parameters, "tiny"), ImageEncoder(CONFIG, parameters, "tiny", "float32", sharding)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    mean, std = one.encode(images)
    split = eight.encode(images)
    uneven = eight.encode(images[:3])
    text_one, text_eight = (load_text_encoder(clip_folder, 20, sharding=where) for where in (None, sharding))
    found = {
        "devices": len(jax.devices()),
        "rows": [shard.data.shape[0] for shard in split[0].addressable_shards],
        "encode": max(difference(split[0], mean), difference(split[1], std)),
        "uneven": [list(uneven[0].shape), max(difference(uneven[0], mean[:3]), difference(uneven[1], std[:3]))],
        "decode": difference(eight.decode(mean), one.decode(mean)),
        "text": difference(text_eight.encode(CAPTIONS), text_one.encode(CAPTIONS)),
        "size": float(np.abs(mean).max()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
