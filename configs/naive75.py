"""Naive masking: tokens are dropped before the backbone sees any, there is no mixer.

    python -m micro_dit.main --config=configs/naive75.py:small

Variants as in mask75.py. What the dropped patches hold reaches nothing. An image costs 0.65 times (xl) to 0.48 times
(demo) as much as in mask75.py; docs/ablations.md compares them at the same budget.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(variant: str = "demo") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mask75.py")))["get_config"](variant)
    config.name = config.name.replace("mask75", "naive75")
    config.model.use_patch_mixer = False
    return config
