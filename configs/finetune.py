"""Fine-tunes a pretrained model on other images, either all parameters or a LoRA adapter.

    python -m micro_dit.main --config=configs/finetune.py           LoRA: the demo's model on OpenMoji's mammals
    python -m micro_dit.main --config=configs/finetune.py:full      the same with all parameters
    python -m micro_dit.main --config=configs/finetune.py:xl        LoRA: the released MicroDiT-XL/2 on your images
    python -m micro_dit.main --config=configs/finetune.py:xl-full   the same with all parameters

The first two start from the demo's run (`make demo`), or from any model folder with the same network:
`--config.init_from=models/emoji`. Their shards are prepared automatically. The last two start from the released weights
(docs/released_weights.md) and train on a folder of images with caption files (docs/data.md):

    python -m micro_dit.convert --out=models/microdit --from_torch=dit_4_channel_37M_real_and_synthetic_data.pt
    python -m micro_dit.precompute --source=folder:MY_IMAGES --resolutions=512 --validation=0.05 --out=shards/mine \\
        --vae=stabilityai/stable-diffusion-xl-base-1.0 --text_encoder=apple/DFN5B-CLIP-ViT-H-14-378 --caption_tokens=77

docs/finetuning.md describes what LoRA changes, and the expected results.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def get_config(variant: str = "lora") -> ConfigDict:
    variants = {"lora": lora, "full": full, "xl": xl, "xl-full": xl_full}
    if variant not in variants:
        raise ValueError(f"configs/finetune.py has no variant {variant!r}; use one of {', '.join(variants)}.")
    return variants[variant]()


def mask75(name: str) -> Any:
    """Returns a function or constant of configs/mask75.py."""
    return runpy.run_path(str(Path(__file__).with_name("mask75.py")))[name]


def full() -> ConfigDict:
    """The demo's network on 65 drawings of mammals. The demo was trained only on faces, hearts and cat faces."""
    config = mask75("base")(name="finetune-full", init_from="runs/mask75")
    config.data.update(shards="data/openmoji_mammals_128", source="openmoji:animal-mammal")
    config.adam.update(b2=0.99, weight_decay=0.0)
    config.phases = (
        dict(name="finetune", resolution=128, mask_ratio=0.0, batch_size=16, steps=1000, learning_rate=1.5e-3,
             warmup_steps=20, final_lr_ratio=0.1, clip=1.0, ema_decay=0.98),
    )  # fmt: skip
    config.sampling.update(every=200, guidance=3.0, steps=14, prompts=MAMMALS)
    config.checkpoint_every, config.evaluate_every = 500, 200
    return config


def lora() -> ConfigDict:
    config = full()
    config.name = "finetune-lora"
    config.lora.rank = 4
    config.phases = tuple(dict(phase, learning_rate=3e-3) for phase in config.phases)
    return config


MAMMALS = ("dog", "elephant", "panda", "pig face", "polar bear", "zebra", "hedgehog", "mouse face")


def xl_full() -> ConfigDict:
    """All parameters of the released network at 512 px, for a few thousand images or more. The 1.17 billion parameters,
    optimizer state and EMA weights require 19 GB; mesh.fsdp=8 splits them over eight devices."""
    config = mask75("base")(name="finetune-xl-full", init_from="models/microdit", dtype="bfloat16")
    config.model.size = "MicroDiT_XL_2"
    config.data.update(shards="shards/mine", resolutions=(512,), **mask75("CLIP_CAPTIONS"))
    config.adam.weight_decay = 0.0
    config.phases = (
        dict(name="finetune", resolution=512, mask_ratio=0.0, batch_size=64, steps=2000, learning_rate=2e-5,
             warmup_steps=100, clip=0.5, P_mean=0.0, P_std=0.6, pos_interp_scale=2.0, ema_decay=0.99),
    )  # fmt: skip
    config.microbatch, config.remat = 8, "full"
    config.sampling.update(every=500, prompts=mask75("PROMPTS"))
    config.checkpoint_every = config.evaluate_every = 500
    return config


def xl() -> ConfigDict:
    """A LoRA adapter for the attention of the released network, for a few hundred images or more."""
    config = xl_full()
    config.name = "finetune-xl"
    config.lora.update(rank=16, alpha=16.0)
    config.phases = tuple(dict(phase, learning_rate=2e-4) for phase in config.phases)
    return config
