"""A smaller network instead of masking: all tokens, with the images and FLOPs of mask75.py within 3%.

    python -m micro_dit.main --config=configs/downscale.py:small

The blocks are those of mask75.py, including experts and the patch mixer. The width is reduced, and for `tiny` and `xl`
also the depth. The variants are those of mask75.py; docs/ablations.md compares them.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

SIZES = {
    "demo": dict(dim=96, patch_mixer_dim=96),
    "small": dict(dim=96, patch_mixer_dim=64, head_dim=16),
    "openmoji": dict(dim=192, patch_mixer_dim=192),
    "tiny": dict(dim=384, patch_mixer_dim=384, depth=13),
    "xl": dict(dim=768, patch_mixer_dim=576, depth=19),
}


def get_config(variant: str = "demo") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mask75.py")))["get_config"](variant)
    config.name = config.name.replace("mask75", "downscale")
    config.masking.ratio = 0.0  # the phases keep their names, although no phase masks
    config.model.update(SIZES[variant])
    return config
