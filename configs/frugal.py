"""x"""
import runpy
from pathlib import Path
from ml_collections import ConfigDict

NETWORKS = {
    "demo": dict(depth=4, decoder_depth=2, decoder_dim=128),
    "small": dict(depth=4, patch_mixer_dim=128, decoder_depth=2, decoder_dim=128),
    "openmoji": dict(depth=6, decoder_depth=2, decoder_dim=256),
    "tiny": dict(depth=13, patch_mixer_depth=3, decoder_depth=2, decoder_dim=512),
    "xl": dict(depth=26, patch_mixer_depth=4, decoder_depth=2, decoder_dim=768),
}


def get_config(variant: str = "demo") -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mask75.py")))["get_config"](variant)
    config.name = config.name.replace("mask75", "frugal")
    config.model.update(fusion=True, **NETWORKS[variant])
    config.optimizer = "muon"
    config.diffusion.path_drop = 0.05
    return config
