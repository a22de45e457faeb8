"""MaskDiT: naive masking, and a small decoder on all tokens that reconstructs the dropped patches.

    python -m micro_dit.main --config=configs/maskdit75.py:small

"Fast Training of Diffusion Models with Masked Transformers" (Zheng et al. 2023, arXiv 2306.09305). The decoder of `xl`
is that of the public release, 8 blocks of width 512; the other variants scale it in proportion to their backbones. The
reconstruction loss has weight 0.1 (micro_dit/diffusion/maskdit.py) and is not used in phases without masking. The
variants are those of mask75.py; docs/ablations.md compares them.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

DECODERS = {
    "demo": dict(decoder_depth=2, decoder_dim=64),
    "small": dict(decoder_depth=2, decoder_dim=64),
    "openmoji": dict(decoder_depth=2, decoder_dim=128),
    "tiny": dict(decoder_depth=4, decoder_dim=256),
    "xl": dict(decoder_depth=8, decoder_dim=512),
}


def get_config(variant: str = "demo") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mask75.py")))["get_config"](variant)
    config.name = config.name.replace("mask75", "maskdit75")
    config.model.update(use_patch_mixer=False, **DECODERS[variant])
    return config
