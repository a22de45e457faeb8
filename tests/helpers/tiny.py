"""Provides a network, shards and a run that are small enough for tests: seconds to compile, milliseconds per step.

Can also be used as a config file: `python -m micro_dit.main --config=tests/helpers/tiny.py:FOLDER_OF_SHARDS`.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from micro_dit.data.shard_writer import ShardFileWriter, latent_statistics, shard_name, write_manifest
from micro_dit.data.shards import Manifest, Record, ShardFile, record_fields
from micro_dit.encoders.info import ImageEncoderInfo, TextEncoderInfo
from micro_dit.models.config import DiTConfig, make_config
from micro_dit.models.dit import abstract_params
from micro_dit.training.checkpoint import Checkpoints

CONFIGS = Path(__file__).parents[2] / "configs"
VAE = ImageEncoderInfo("noise", "0123", channels=4, downsample=8)
TEXT = TextEncoderInfo("noise", "4567", tokens=4, channels=12)
SIZE: dict[str, Any] = dict(
    size="Nano", dim=32, depth=2, head_dim=16, patch_mixer_depth=2, patch_mixer_dim=48, multiple_of=16, num_experts=2,
    experts_every_n=1,
)  # fmt: skip
MASKED: dict[str, Any] = dict(
    name="masked", resolution=64, mask_ratio=0.75, steps=48, batch_size=4, learning_rate=3e-3, warmup_steps=2
)
UNMASKED: dict[str, Any] = dict(
    name="unmasked", resolution=64, mask_ratio=0.0, steps=36, batch_size=4, learning_rate=1e-3, final_lr_ratio=0.1,
    ema_decay=0.9, ema_start=3,
)  # fmt: skip


def network(**overrides: Any) -> DiTConfig:
    """Returns a config with 16 tokens, different widths, and experts in one mixer block and one backbone block."""
    return make_config(**SIZE | dict(input_size=8, caption_channels=TEXT.channels) | overrides)


def random_params(config: DiTConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Returns random parameters without zeros, so that every parameter affects the output."""
    generator = np.random.default_rng(seed)
    params = {}
    for name, leaf in abstract_params(config).items():
        z = generator.standard_normal(leaf.shape, dtype=np.float32)
        if len(leaf.shape) == 1:
            params[name] = jnp.asarray(1 + 0.1 * z if name.endswith("scale") else 0.1 * z)
        else:
            params[name] = jnp.asarray(z / np.sqrt(np.float32(leaf.shape[-2])))
    return params


def inputs(config: DiTConfig, images: int = 3, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns random inputs x, t and y of the network."""
    generator = np.random.default_rng(seed)
    side = config.input_size
    shapes = ((images, side, side, config.in_channels), (images,), (images, TEXT.tokens, config.caption_channels))
    x, t, y = (jnp.asarray(generator.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    return x, t, y


def make_manifest(
    resolutions: tuple[int, ...],
    vae: ImageEncoderInfo = VAE,
    text: TextEncoderInfo = TEXT,
    posterior: str = "mean_std",
    **others: Any,
) -> Manifest:
    """Returns a manifest for `write_folder`, which adds the files and statistics."""
    fields = record_fields(resolutions, posterior, vae, text)
    fixed = dict(source="noise", attribution="nobody", dropped={}, altered={}, statistics={}, caption_cleaning="none")
    return Manifest(
        resolutions=resolutions, posterior=posterior, vae=vae, text_encoder=text, fields=fields, **fixed | others
    )


def write_folder(
    out: Path, manifest: Manifest, splits: Mapping[str, Sequence[Record]], records_per_file: int = 16
) -> Path:
    """Writes a folder of shards with the given records."""
    out.mkdir(parents=True)
    files: dict[str, tuple[ShardFile, ...]] = {}
    sums = []
    for split, records in splits.items():
        starts = range(0, len(records), records_per_file)
        files[split] = ()
        for index, start in enumerate(starts):
            with ShardFileWriter(out / shard_name(split, index, len(starts)), manifest.fields) as writer:
                for record in records[start : start + records_per_file]:
                    writer.write(record)
            files[split] += (writer.info,)
            sums.append(writer.latent_sums)
    write_manifest(out, dataclasses.replace(manifest, splits=files, statistics=latent_statistics(sums)))
    return out


def write_shards(
    out: Path, resolutions: tuple[int, ...] = (64,), text: TextEncoderInfo = TEXT, vae: ImageEncoderInfo = VAE,
    scale: float = 1.0, **others: Any,
) -> Path:  # fmt: skip
    """Writes shards of noise with 23 training and 5 validation examples; `scale` multiplies the latents."""
    generator = np.random.default_rng(0)
    manifest = make_manifest(resolutions, vae, text, **others)

    def record(split: str, number: int) -> Record:
        arrays = {f.name: generator.standard_normal(f.shape_in(1), dtype=np.float32) for f in manifest.fields}
        arrays |= {name: np.float32(0.1) * np.abs(value) for name, value in arrays.items() if "_std_" in name}
        arrays |= {name: np.float32(scale) * value for name, value in arrays.items() if name.startswith("latent_")}
        return Record(f"{split}-{number}", (f"number {number}",), arrays)

    counts = {"train": 23, "validation": 5}
    return write_folder(out, manifest, {s: [record(s, number) for number in range(n)] for s, n in counts.items()})


def load_config_file(path: Path, argument: str | None = None) -> ConfigDict:
    """Returns the config that a config file returns for an argument."""
    module = load_module(path)
    return module.get_config() if argument is None else module.get_config(argument)


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(shards: str) -> ConfigDict:
    """Returns the config of a run with two phases, the second with EMA weights; it needs no encoders."""
    config = load_module(CONFIGS / "mask75.py").base(name="tiny")
    config.model.update(SIZE)
    config.data.update(shards=str(shards), vae=VAE.name, text_encoder=TEXT.name, caption_tokens=TEXT.tokens, heldout="")
    config.phases = (dict(MASKED), dict(UNMASKED))
    config.checkpoint_every, config.evaluate_every = 8, 0
    config.sampling.every = 0
    config.logging.update(every=1, tensorboard=False)
    return config


def read_checkpoint(workdir: Path, step: int | None = None) -> dict[str, Any]:
    """Returns all parts of a checkpoint (by default the newest) as numpy arrays."""
    checkpoints = Checkpoints(workdir)
    step = checkpoints.steps[0] if step is None else step
    parts = checkpoints._orbax.checkpointables_metadata(step).metadata
    loaded = checkpoints._orbax.load_checkpointables(step, dict.fromkeys(parts))
    checkpoints.close()
    return {part: jax.tree.map(np.asarray, loaded[part]) if part != "meta" else loaded[part] for part in parts}


def assert_close(actual: Any, desired: Any) -> None:
    """Asserts equality within 1e-5 of the largest value, since small values have the rounding errors of large ones."""
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-5 * np.abs(desired).max())


def assert_same_end(workdir: Path, other: Path) -> None:
    """Asserts that two runs ended with bitwise identical states, at the same position in the data."""
    ours, theirs = read_checkpoint(workdir), read_checkpoint(other)
    assert {"params", "opt", "ema", "meta"} <= set(ours)
    assert set(ours) == set(theirs)
    for name in ("step", "phase", "images", "data", "model"):
        assert ours["meta"][name] == theirs["meta"][name], name
    for part in ("params", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, ours[part], theirs[part])


class Blocks:
    """An image encoder whose latents are the colors of blocks of 2×2 pixels and a fourth channel of zeros."""

    name, fingerprint, channels, downsample = "noise", "0123", 4, 2

    def decode(self, latents: Any) -> Any:
        return jnp.clip(jnp.asarray(latents)[..., :3].repeat(2, 1).repeat(2, 2), -1, 1)

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        colors = images[:, ::2, ::2].astype(np.float32) / 127.5 - 1
        latents = np.concatenate([colors, np.zeros_like(colors[..., :1])], -1)
        return latents, np.zeros_like(latents)


class Words:
    """A text encoder with one token per word and an end token, which records its inputs in `encoded`."""

    name, fingerprint, tokens, channels = "noise", "4567", 4, 12

    def __init__(self) -> None:
        self.encoded: list[list[str]] = []

    def encode(self, captions: list[str]) -> np.ndarray:
        self.encoded.append(list(captions))
        rows = [np.random.default_rng(list(caption.encode())).standard_normal((4, 12)) for caption in captions]
        return np.asarray(rows, np.float32)

    def count_tokens(self, captions: list[str]) -> list[int]:
        return [len(caption.split()) + 1 for caption in captions]
