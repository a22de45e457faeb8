"""The micro-budget recipe: masked pre-training, then unmasked fine-tuning.

    python -m micro_dit.main --config=configs/mask75.py              OpenMoji faces at 128 px: two CPU cores
    python -m micro_dit.main --config=configs/mask75.py:small        about the same on all of OpenMoji, to compare
    python -m micro_dit.main --config=configs/mask75.py:openmoji     all of OpenMoji at 128 px: a GPU, or a night
    python -m micro_dit.main --config=configs/mask75.py:tiny         MicroDiT-Tiny/2, the paper's ablation size, 256 px
    python -m micro_dit.main --config=configs/mask75.py:xl           MicroDiT-XL/2, the paper's four phases

The first three make their data themselves. `tiny` and `xl` need latent shards of real images with CLIP captions, in the
folders that they name; docs/data.md gives the commands that make them. Expected of `xl`, from the paper: 2.6 days on
8 H100, FID-30K 12.7 on COCO.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant: str = "demo") -> ConfigDict:
    variants = {"demo": demo, "small": small, "openmoji": openmoji, "tiny": tiny, "xl": xl}
    if variant not in variants:
        raise ValueError(f"configs/mask75.py has no variant {variant!r}; use one of {', '.join(variants)}.")
    return variants[variant]()


def base(**fields: Any) -> ConfigDict:
    """Every field there is, with the paper's values."""
    config = ConfigDict(
        dict(
            name="mask75",  # the default work directory is runs/<name>
            seed=0,
            # A size of micro_dit/models/config.py; each other field that is set replaces the size's own.
            model=dict(
                size="Nano",
                depth=placeholder(int),
                dim=placeholder(int),
                head_dim=placeholder(int),
                patch_size=placeholder(int),
                multiple_of=placeholder(int),
                use_patch_mixer=placeholder(bool),
                patch_mixer_depth=placeholder(int),
                patch_mixer_dim=placeholder(int),
                num_experts=placeholder(int),
                expert_capacity=placeholder(float),
                experts_every_n=placeholder(int),
                qkv_multipliers=placeholder(tuple),
                ffn_multipliers=placeholder(tuple),
                decoder_depth=placeholder(int),
                decoder_dim=placeholder(int),  # MaskDiT's, configs/maskdit75.py, or with fusion configs/frugal.py
                fusion=placeholder(bool),
            ),
            # Where training starts: a model folder or another run's work directory; see configs/finetune.py. With
            # lora.rank 0 all parameters are trained.
            init_from="",
            lora=dict(rank=0, alpha=8.0, targets=r"attn\.(qkv|q|kv|proj)\.kernel$"),
            masking=dict(ratio=placeholder(float)),  # if set, the mask_ratio of all phases that mask
            dtype="float32",  # of the matrix products
            remat="dots",  # what the backward pass computes again to save memory: "none", "dots" or "full"
            diffusion=dict(sigma_data=0.9, caption_drop=0.1, path_drop=0.0),
            optimizer="adamw",  # or "muon", for the matrices of the blocks
            adam=dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1),
            data=dict(
                shards="",  # a folder, or a mix of folders: 'a,b' or 'a=0.7,b=0.3'
                source="",  # if set, missing shards are made from it: the embedded data
                resolutions=(128,),
                vae="openmoji_vae",
                text_encoder="minilm",
                caption_tokens=16,
                heldout="validation",
                heldout_images=64,
            ),
            phases=(),  # see micro_dit/training/phases.py
            # Kept are the two newest checkpoints, those at the ends of phases, and those at multiples of keep_every.
            checkpoint_every=1000,
            checkpoint_minutes=10.0,  # saves whenever nothing was saved for so long; 0 goes by steps alone
            keep_every=0,
            evaluate_every=1000,
            # Metrics of images that are drawn while training, see docs/evaluation.md; every=0 draws none.
            evaluation=dict(every=0, metrics=("domain",), num_images=256, reference="", clip="", inception=""),
            sampling=dict(every=1000, prompts=(), guidance=5.0, steps=30, path_drop=False),
            # Profiler trace of `steps` steps of each phase, after `start` others; 0 is off. See docs/running.md.
            profile=dict(steps=0, start=5),
            logging=dict(every=10, tensorboard=True, wandb_project=""),
            cost=dict(dollars_per_device_hour=0.0, mfu=0.3),  # for the plan and the bill
            microbatch=0,  # images per forward and backward pass, over all devices; 0 is the whole batch at once
            # Devices that share a batch; that share the parameters too; that share the experts; that share each matrix
            # product. -1 is the rest. See micro_dit/parallel/mesh.py.
            mesh=dict(data=-1, fsdp=1, expert=1, tensor=1),
        )
    )
    config.update(fields)
    return config


def demo() -> ConfigDict:
    """OpenMoji's faces, hearts and cats. Muon and higher noise levels than the paper's learn them in fewer steps; the
    paper's are --config.optimizer=adamw and P_mean -0.6. docs/recipe.md compares them."""
    config = paper_demo()
    masked, unmasked = (dict(phase, P_mean=0.2) for phase in config.phases)
    config.phases = dict(masked, steps=800), dict(unmasked, steps=160)
    config.optimizer = "muon"
    return config


def paper_demo() -> ConfigDict:
    """The demo with the paper's optimizer and noise levels."""
    config = base()
    config.data.update(shards="data/openmoji_faces_128", source="openmoji:smileys-emotion")
    config.adam.update(b2=0.99, weight_decay=0.01)
    shared = dict(resolution=128, batch_size=32, ema_decay=0.995, clip=1.0)
    config.phases = (
        dict(name="masked", mask_ratio=0.75, steps=1000, learning_rate=3e-3, warmup_steps=50, ema_start=100,
             **shared),
        dict(name="unmasked", mask_ratio=0.0, steps=200, learning_rate=1.5e-3, final_lr_ratio=0.1, **shared),
    )  # fmt: skip
    config.sampling.update(every=200, guidance=3.0, steps=14, prompts=FACES)
    config.checkpoint_every, config.evaluate_every = 500, 100
    return config


FACES = (
    "grinning face", "crying face", "angry face with horns", "red heart", "clown face", "robot",
    "cat with wry smile", "grinning cat with smiling eyes", "fearful face", "smirking face",
    "pensive face", "face with hand over mouth",
)  # fmt: skip


def small() -> ConfigDict:
    """What docs/ablations.md compares: the demo with the paper's optimizer and noise levels, on all of OpenMoji, with a
    mixer as narrow as the paper's."""
    config = paper_demo()
    config.name = "mask75-small"
    config.model.patch_mixer_dim = 96
    config.data.update(shards="data/openmoji_128", source="openmoji", heldout_images=128)
    return config


def openmoji() -> ConfigDict:
    """All of OpenMoji, with a network four times as wide in its products as the demo's."""
    config = base(name="mask75-openmoji")
    config.model.update(dim=256, patch_mixer_dim=256, depth=8, multiple_of=64)
    config.data.update(shards="data/openmoji_128", source="openmoji")
    config.adam.update(b2=0.99, weight_decay=0.01)
    shared = dict(resolution=128, batch_size=128, ema_decay=0.9995, clip=1.0)
    config.phases = (
        dict(name="masked", mask_ratio=0.75, steps=30_000, learning_rate=1e-3, warmup_steps=500, final_lr_ratio=0.33,
             **shared),
        dict(name="unmasked", mask_ratio=0.0, steps=6_000, learning_rate=3e-4, final_lr_ratio=0.1, **shared),
    )  # fmt: skip
    config.sampling.update(
        every=2000, guidance=3.0, steps=18,
        prompts=(*FACES[:6], "dog face", "red apple", "woman astronaut: dark skin tone", "flag: Japan", "automobile",
                 "snowflake"),
    )  # fmt: skip
    return config


CLIP_CAPTIONS = dict(
    vae="stabilityai/stable-diffusion-xl-base-1.0", text_encoder="apple/DFN5B-CLIP-ViT-H-14-378", caption_tokens=77
)


def tiny() -> ConfigDict:
    """The paper's ablation: 60k steps of 256 images, then 5k unmasked ones. Shards: 256 px latents."""
    config = base(name="mask75-tiny", dtype="bfloat16")
    config.model.size = "MicroDiT_Tiny_2"
    config.data.update(shards="shards/cc12m", resolutions=(256,), **CLIP_CAPTIONS)
    shared = dict(resolution=256, batch_size=256, ema_decay=0.9999)
    config.phases = (
        dict(name="masked", mask_ratio=0.75, steps=60_000, learning_rate=2.4e-4, warmup_steps=2_500,
             final_lr_ratio=0.33, **shared),
        dict(name="unmasked", mask_ratio=0.0, steps=5_000, learning_rate=8e-5, **shared),
    )  # fmt: skip
    config.sampling.update(every=5000, prompts=PROMPTS)
    config.checkpoint_every = config.evaluate_every = 2500
    return config


def xl() -> ConfigDict:
    """The paper's four phases (batch 2048, AdamW, bfloat16). Shards: 256 px of everything; 512 px without
    DiffusionDB and without CC12M's smaller images."""
    config = base(name="mask75-xl", dtype="bfloat16")
    config.model.size = "MicroDiT_XL_2"
    at_both = "shards/sa1b,shards/textcaps,shards/journeydb"
    everything = f"shards/cc12m,{at_both},shards/diffusiondb"
    config.data.update(shards=everything, resolutions=(256,), **CLIP_CAPTIONS)
    at_256 = dict(resolution=256, batch_size=2048, clip=0.25, P_mean=-0.6, P_std=1.2)
    at_512 = dict(
        resolution=512, batch_size=2048, clip=0.5, P_mean=0.0, P_std=0.6, pos_interp_scale=2.0,
        shards=f"shards/cc12m-512,{at_both}",
    )  # fmt: skip
    config.phases = (
        dict(name="masked-256", mask_ratio=0.75, steps=250_000, learning_rate=2.4e-4, warmup_steps=2_500,
             final_lr_ratio=0.33, **at_256),
        dict(name="unmasked-256", mask_ratio=0.0, steps=30_000, learning_rate=8e-5, **at_256),
        dict(name="masked-512", mask_ratio=0.75, steps=50_000, learning_rate=8e-5, warmup_steps=500, ema_decay=0.99975,
             ema_start=25_000, fresh_optimizer=True, **at_512),
        dict(name="unmasked-512", mask_ratio=0.0, steps=5_000, learning_rate=8e-5, ema_decay=0.9975,
             ema_start=1_000, **at_512),
    )  # fmt: skip
    config.sampling.update(every=5000, prompts=PROMPTS)
    config.checkpoint_every = config.evaluate_every = 2500
    config.keep_every = 50_000
    config.cost.dollars_per_device_hour = 3.75  # the paper's price of an H100
    return config


PROMPTS = (
    "a photograph of an astronaut riding a horse", "a bowl of ramen on a wooden table", "a red fox in the snow",
    "a lighthouse at sunset, oil painting", "a robot reading a book in a library", "a street in Tokyo at night",
    "a close-up of a blue butterfly", "a cottage in the mountains, watercolor",
)  # fmt: skip
