"""The frugal recipe: more quality for the same FLOPs than mask75.py, by a dense residual and Muon.

    python -m micro_dit.main --config=configs/frugal.py              OpenMoji faces at 128 px: two CPU cores
    python -m micro_dit.main --config=configs/frugal.py:openmoji     all of OpenMoji at 128 px: a GPU, or a night
    python -m micro_dit.main --config=configs/frugal.py:tiny         256 px, at most the FLOPs of mask75.py:tiny
    python -m micro_dit.main --config=configs/frugal.py:xl           256 and 512 px, at most the paper's FLOPs

Variants and data are those of mask75.py, and so are the phases, except for `demo` and `small`. The mixer is shorter,
and a decoder of two blocks sees all tokens: the mixer's output of each, plus the backbone's output where a token was
kept (SPRINT, arXiv 2510.21986). The loss is over all tokens, also in the masked phases. 5% of the images skip the
backbone, so that guidance may skip it too (path-drop guidance, see docs/sampling.md). Muon (arXiv 2502.16982) updates
the matrices of the blocks. docs/recipe.md has the measurements. `openmoji`, `tiny` and `xl` have not been run.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

NETWORKS = {
    "demo": dict(depth=4, patch_mixer_depth=1, decoder_depth=2, decoder_dim=128),
    "small": dict(depth=4, patch_mixer_depth=1, decoder_depth=2, decoder_dim=128),
    "openmoji": dict(depth=6, patch_mixer_depth=1, decoder_depth=2, decoder_dim=256),
    "tiny": dict(depth=16, patch_mixer_depth=2, decoder_depth=2, decoder_dim=512),
    "xl": dict(depth=28, patch_mixer_depth=3, decoder_depth=2, decoder_dim=768),
}


def get_config(variant: str = "demo") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mask75.py")))["get_config"](variant)
    config.name = config.name.replace("mask75", "frugal")
    config.model.update(fusion=True, rope=True, **NETWORKS[variant])
    config.optimizer, config.diffusion.path_drop = "muon", 0.05
    if variant in ("demo", "small"):
        masked, unmasked = (dict(phase, P_mean=0.2, ema_decay=0.98) for phase in config.phases)
        masked.update(steps=1040, final_lr_ratio=0.1)
        unmasked.update(steps=190, learning_rate=3e-4)
        config.phases = masked, unmasked
    return config
