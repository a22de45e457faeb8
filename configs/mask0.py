"""No masking: the network and the phases of mask75.py, with all tokens in all phases.

    python -m micro_dit.main --config=configs/mask0.py:small

An image costs 1.65 times (demo) to 2.3 times (xl) as many FLOPs as in mask75.py, so the same budget trains on fewer
images. The variants are those of mask75.py; docs/ablations.md compares them.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(variant: str = "demo") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mask75.py")))["get_config"](variant)
    config.name = config.name.replace("mask75", "mask0")
    config.masking.ratio = 0.0  # the phases keep their names, although no phase masks
    return config
