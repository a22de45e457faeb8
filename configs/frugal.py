"""The frugal recipe: more quality for the same FLOPs than mask75.py, by a dense residual, rotary positions and Muon.

    python -m micro_dit.main --config=configs/frugal.py              OpenMoji faces at 128 px: two CPU cores
    python -m micro_dit.main --config=configs/frugal.py:openmoji     all of OpenMoji at 128 px: a GPU, or a night
    python -m micro_dit.main --config=configs/frugal.py:tiny         256 px, at most the FLOPs of mask75.py:tiny
    python -m micro_dit.main --config=configs/frugal.py:xl           256 and 512 px, at most the paper's FLOPs

The variants and their data are the same as in mask75.py. The phases of `openmoji`, `tiny` and `xl` are the same too;
these three have not been run. docs/recipe.md has the measurements. The recipe changes four things:

- Dense residual (SPRINT, arXiv 2510.21986): a decoder of two blocks sees all tokens. Its input is the mixer's output,
  plus the backbone's output for the kept tokens. The loss is over all tokens, and the mixer is shorter.
- Rotary position embeddings in self-attention, in two dimensions (arXiv 2403.13298).
- Muon (arXiv 2502.16982) for the matrices of the blocks.
- Path drop: 5% of the training images skip the backbone, which allows path-drop guidance (docs/sampling.md).
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
STEPS = {"demo": (800, 150), "small": (1040, 190)}  # masked, unmasked


def get_config(variant: str = "demo") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mask75.py")))["get_config"](variant)
    config.name = config.name.replace("mask75", "frugal")
    config.model.update(fusion=True, rope=True, **NETWORKS[variant])
    config.optimizer, config.diffusion.path_drop = "muon", 0.05
    if variant in STEPS:
        masked, unmasked = (
            dict(phase, steps=steps, ema_decay=0.98) for phase, steps in zip(config.phases, STEPS[variant], strict=True)
        )
        masked.update(learning_rate=3e-3, final_lr_ratio=0.1)
        unmasked.update(learning_rate=3e-4)
        config.phases = masked, unmasked
    return config
