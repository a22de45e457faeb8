"""No masking: the network of mask75.py and its phases, on all tokens throughout.

    python -m micro_dit.main --config=configs/mask0.py:small

Variants as in mask75.py. An image costs 1.65 times (demo) to 2.3 times (xl) as much as there, so that the same budget
is for fewer; docs/ablations.md compares them.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(variant: str = "demo") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mask75.py")))["get_config"](variant)
    config.name = config.name.replace("mask75", "mask0")
    config.masking.ratio = 0.0  # the phases keep their names
    return config
