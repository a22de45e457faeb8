"""The micro-budget recipe: masked pre-training, then unmasked fine-tuning.

    python -m micro_dit.main --config=configs/mask75.py              OpenMoji faces at 128 px, for two CPU cores
    python -m micro_dit.main --config=configs/mask75.py:small        all of OpenMoji at 128 px, for comparisons
    python -m micro_dit.main --config=configs/mask75.py:openmoji     all of OpenMoji at 128 px, for a GPU or overnight
    python -m micro_dit.main --config=configs/mask75.py:tiny         MicroDiT-Tiny/2, the paper's ablation size, 256 px
    python -m micro_dit.main --config=configs/mask75.py:xl           MicroDiT-XL/2, the paper's four phases

The shards of the first three are prepared automatically. `tiny` and `xl` require latent shards of real images with CLIP
captions in the folders `data.shards`; docs/data.md has the commands that build them. According to the paper, `xl`
requires 2.6 days on 8 × H100 and reaches an FID-30K of 12.7 on COCO.
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
    """Returns a config with all fields. The diffusion and Adam settings are the paper's. The network, the encoders and
    the remaining values are defaults for small runs; variants set the shards, the phases and what differs."""
    config = ConfigDict(
        dict(
            name="mask75",  # the default work directory is runs/<name>
            seed=0,
            # A size in micro_dit/models/config.py. Other fields override those of the size if they are set.
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
                decoder_dim=placeholder(int),  # used by configs/maskdit75.py and, with fusion, by configs/frugal.py
                fusion=placeholder(bool),
                rope=placeholder(bool),
            ),
            # Pretrained weights to start from: a model folder, or the work directory of another run; see
            # configs/finetune.py. With lora.rank 0 all parameters are trained.
            init_from="",
            lora=dict(rank=0, alpha=8.0, targets=r"attn\.(qkv|q|kv|proj)\.kernel$"),
            masking=dict(ratio=placeholder(float)),  # overrides the mask_ratio of all masked phases if set
            dtype="float32",  # dtype of the matrix products
            remat="dots",  # rematerialization in the backward pass: "none", "dots" or "full" (least memory)
            diffusion=dict(sigma_data=0.9, caption_drop=0.1, path_drop=0.0),
            optimizer="adamw",  # or "muon", which updates the matrices of the blocks with Muon
            adam=dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1),
            data=dict(
                shards="",  # a folder, or a mix of folders: 'a,b' or 'a=0.7,b=0.3'
                source="",  # source from which missing shards are prepared, such as the embedded OpenMoji data
                resolutions=(128,),
                vae="openmoji_vae",
                text_encoder="minilm",
                caption_tokens=placeholder(int),  # taken from the shards; must match them if it is set
                heldout="validation",
                heldout_images=64,
            ),
            phases=(),  # see micro_dit/training/phases.py
            # The two newest checkpoints, those at the ends of phases, and those at multiples of keep_every are kept.
            checkpoint_every=1000,
            checkpoint_minutes=10.0,  # maximum minutes between checkpoints; 0 saves only by steps
            keep_every=0,
            evaluate_every=1000,
            # Metrics of images sampled during training, see docs/evaluation.md; every=0 disables them.
            evaluation=dict(every=0, metrics=("domain",), num_images=256, reference="", clip="", inception=""),
            sampling=dict(every=1000, prompts=(), guidance=5.0, steps=30, path_drop=False),
            logging=dict(every=10, tensorboard=True, wandb_project=""),
            # Profiler trace of `steps` steps of each phase, after `start` others; 0 is off. See docs/running.md.
            profile=dict(steps=0, start=5),
            cost=dict(dollars_per_device_hour=0.0, mfu=0.3),  # for the predicted and the reported cost
            microbatch=0,  # images per forward and backward pass, over all devices; 0 is the whole batch at once
            # Number of devices along each axis of the mesh, see micro_dit/parallel/mesh.py. -1 is inferred.
            mesh=dict(data=-1, fsdp=1, expert=1, tensor=1),
        )
    )
    config.update(fields)
    return config


def demo() -> ConfigDict:
    """OpenMoji's faces, hearts and cats. Muon and higher noise levels than the paper's reduce the number of steps. The
    paper's settings are --config.optimizer=adamw and P_mean -0.6; docs/recipe.md compares them."""
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
    """The setting of docs/ablations.md: the demo on all of OpenMoji, with the paper's optimizer and noise levels, and
    with the paper's ratio of mixer width to backbone width. Learning rate and EMA decay were tuned at 4e13 FLOPs."""
    config = paper_demo()
    config.name = "mask75-small"
    config.phases = tuple(
        dict(phase, learning_rate=rate, ema_decay=0.98)
        for phase, rate in zip(config.phases, (1.5e-3, 7.5e-4), strict=True)
    )
    config.model.patch_mixer_dim = 96
    config.data.update(shards="data/openmoji_128", source="openmoji", heldout_images=128)
    return config


def openmoji() -> ConfigDict:
    """All of OpenMoji, with a network that is wider and deeper than the demo's."""
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
    """The paper's ablation: 60k masked and 5k unmasked steps with batch size 256. Requires shards of 256 px latents."""
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
    """The paper's four phases (batch size 2048, AdamW, bfloat16). Requires 256 px shards of all data sets, and 512 px
    shards without DiffusionDB and without the smaller images of CC12M."""
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
