"""Naive masking: tokens are dropped before the backbone, without a patch mixer.

    python -m micro_dit.main --config=configs/naive75.py:small

The network receives no information about the dropped patches. An image costs 0.48 times (demo) to 0.65 times (xl) as
many FLOPs as in mask75.py. The variants are those of mask75.py; docs/ablations.md compares them at the same budget.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(variant: str = "demo") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mask75.py")))["get_config"](variant)
    config.name = config.name.replace("mask75", "naive75")
    config.model.use_patch_mixer = False
    return config
