"""The micro-budget recipe: masked pre-training, then unmasked fine-tuning.

    python -m micro_dit.main --config=configs/mask75.py              the demo: OpenMoji faces at 128 px, on a laptop
    python -m micro_dit.main --config=configs/mask75.py:openmoji     all of OpenMoji at 128 px: a GPU, or a night
    python -m micro_dit.main --config=configs/mask75.py:tiny         MicroDiT-Tiny/2, the paper's ablation size
    python -m micro_dit.main --config=configs/mask75.py:xl           MicroDiT-XL/2, the paper's four phases
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "openmoji", "tiny", "xl")


def get_config(variant: str = "demo") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/mask75.py has no variant {variant!r}; use one of {', '.join(VARIANTS)}.")
    return {"demo": demo}[variant]()


def base() -> ConfigDict:
    return ConfigDict(
        dict(
            name="mask75",
            seed=0,
            model=dict(size="Nano"),
            dtype="float32",
            diffusion=dict(sigma_data=0.9, caption_drop=0.1),
            adam=dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1),
            data=dict(
                shards="", source="", resolutions=(128,), vae="openmoji_vae", text_encoder="minilm", caption_tokens=32,
                heldout="validation", heldout_images=64,
            ),
            phases=(),
            checkpoint_every=1000,
            evaluate_every=1000,
            sampling=dict(every=1000, prompts=(), guidance=5.0, steps=30),
            logging=dict(every=10, tensorboard=True, wandb_project=""),
            cost=dict(dollars_per_device_hour=0.0, mfu=0.3),
            mesh=dict(data=-1),
        )
    )  # fmt: skip


def demo() -> ConfigDict:
    config = base()
    config.data.update(shards="data/openmoji_faces_128", source="openmoji:smileys-emotion")
    shared = dict(resolution=128, batch_size=32, ema_decay=0.998, clip=1.0)
    config.adam.update(b2=0.99, weight_decay=0.01)
    config.phases = (
        dict(name="masked", mask_ratio=0.75, steps=1400, learning_rate=3e-3, warmup_steps=50, **shared),
        dict(name="unmasked", mask_ratio=0.0, steps=300, learning_rate=1e-3, final_lr_ratio=0.1, **shared),
    )
    config.sampling.update(
        every=200, guidance=3.0, steps=14,
        prompts=("grinning face", "crying face", "angry face with horns", "red heart", "clown face", "robot",
                 "cat with wry smile", "grinning cat with smiling eyes", "fearful face", "smirking face",
                 "pensive face", "face with hand over mouth"),
    )  # fmt: skip
    config.checkpoint_every = 500
    config.evaluate_every = 100
    return config
