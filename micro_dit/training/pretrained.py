"""Loads pretrained weights from a model folder or a run, for full fine-tuning or as the base of a LoRA adapter.

The checkpoints of a LoRA run hold only the adapter and the location of the base weights. `run_params` reads such a
checkpoint and returns the merged parameters.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.data.shards import Manifest
from micro_dit.encoders.info import UNVERIFIED
from micro_dit.errors import UserError
from micro_dit.files import hash_arrays
from micro_dit.interop.model_folder import config_from, is_model_folder, load_model_folder, read_config
from micro_dit.models.config import DiTConfig
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.lora import LoRA

# Network fields that may differ from the checkpoint's, because no parameter shape depends on them.
FREE_FIELDS = ("input_size", "pos_interp_scale")


@dataclasses.dataclass(frozen=True)
class Start:
    """Pretrained weights in host memory.

    Attributes:
        folder: Absolute path of a model folder, or of the work directory of a run.
        step: Step of the run's checkpoint; None for a model folder.
        params: Parameters by name, float32.
        network: Configuration of the network.
        about: Further settings of the model: sigma_data, vae, text_encoder, caption_tokens, and, if known,
            vae_fingerprint and text_fingerprint.
    """

    folder: Path
    step: int | None
    params: dict[str, np.ndarray]
    network: DiTConfig
    about: Mapping[str, Any]

    def __str__(self) -> str:
        return str(self.folder) if self.step is None else f"step {self.step} of {self.folder}"

    def under(self, lora: LoRA) -> dict[str, Any]:
        """Returns the settings of an adapter on these weights and their location, for the metadata of checkpoints."""
        return dataclasses.asdict(lora) | {
            "folder": str(self.folder), "step": self.step, "fingerprint": fingerprint(self.params)
        }  # fmt: skip

    def check(self, network: DiTConfig, manifest: Manifest, sigma_data: float, vae: str, text_encoder: str) -> None:
        """Raises UserError if the weights are of a different network or were trained with different encoders.

        Args:
            network: Network of the run's first phase.
            manifest: Manifest of the run's shards.
            sigma_data: diffusion.sigma_data of the config.
            vae: data.vae of the config.
            text_encoder: data.text_encoder of the config.
        """
        fields = [field.name for field in dataclasses.fields(DiTConfig) if field.name not in FREE_FIELDS]
        theirs, ours = (dataclasses.asdict(config) for config in (self.network, network))
        if differing := [f"{name} (model: {theirs[name]}, config: {ours[name]})" for name in fields
                         if theirs[name] != ours[name]]:  # fmt: skip
            raise UserError(
                f"The network in init_from={self.folder} differs from the config: {'; '.join(differing)}. Set the "
                "fields of --config.model to the values of the model."
            )
        about, text = self.about, manifest.text_encoder
        same_vae = _same(about, "vae", (manifest.vae.name, vae), manifest.vae.fingerprint)
        same_text = _same(about, "text_encoder", (text.name, text_encoder), text.fingerprint)
        problems = [] if same_vae else [f"vae (model: {about['vae']}, shards: {manifest.vae.name})"]
        problems += [] if same_text else [f"text_encoder (model: {about['text_encoder']}, shards: {text.name})"]
        if about["sigma_data"] != sigma_data:
            problems.append(f"sigma_data (model: {about['sigma_data']}, config: {sigma_data})")
        if about["caption_tokens"] != text.tokens:
            problems.append(f"caption_tokens (model: {about['caption_tokens']}, shards: {text.tokens})")
        if problems:
            raise UserError(
                f"The model in init_from={self.folder} was trained with other settings: {'; '.join(problems)}. Set "
                "--config.diffusion.sigma_data to the model's value, and use shards made with the model's encoders."
            )


def _same(about: Mapping[str, Any], which: str, names: tuple[str, ...], found: str) -> bool:
    """Returns whether two encoders are the same, by fingerprint, or by name if a fingerprint is unknown."""
    known = about.get({"vae": "vae_fingerprint", "text_encoder": "text_fingerprint"}[which], "")
    if UNVERIFIED in (known, found) or not known or not found:
        return about[which] in names
    return bool(known == found)


def load_start(path: str | Path, step: int | None = None) -> Start:
    """Reads pretrained weights; of a run, the EMA weights if the checkpoint has them.

    Args:
        path: A model folder, or the work directory of a run.
        step: Step of the run's checkpoint; None reads the newest. Ignored for a model folder.

    Raises:
        UserError: The model or the checkpoint does not exist.
    """
    path = Path(path).expanduser().absolute()
    try:
        is_run = not is_model_folder(path)
        params, network, about = read_model(path, step if is_run else None)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    return Start(path, about["step"] if is_run else None, params, network, about)


def read_run(path: str | Path) -> dict[str, Any] | None:
    """Returns the contents of the config.json of a run with checkpoints; None for a model folder.

    Raises:
        UserError: The folder is neither a run nor a model folder, or the run has no checkpoints yet.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is neither the work directory of a run nor a model folder: it has no config.json.")
    if is_model_folder(path):
        return None
    fields = read_config(path / "config.json")
    if not {"config", "shards"} <= set(fields):
        raise UserError(f"{path / 'config.json'} was written neither by a training run nor for a model folder.")
    if not has_checkpoints(path):
        raise UserError(f"{path} has no checkpoints yet. Train for some steps first.")
    return fields


def read_model(
    path: str | Path, step: int | None = None, params: str | None = None
) -> tuple[dict[str, np.ndarray], DiTConfig, dict[str, Any]]:
    """Reads the model of a run or of a model folder.

    Args:
        path: Work directory of the run, or the model folder.
        step: Step of the run's checkpoint; None reads the newest.
        params: 'ema' or 'raw' for a run's checkpoint; None reads the EMA weights if the checkpoint has them.

    Returns:
        The parameters in host memory, the configuration of the network, and the fields that describe the model in the
        config.json of a model folder (ABOUT and OPTIONAL in micro_dit/interop/model_folder.py).

    Raises:
        UserError: The model or the checkpoint does not exist, or the base weights of a LoRA run are missing or have
            changed.
    """
    fields = read_run(path)
    if fields is None:
        if step is not None or params is not None:
            raise UserError(f"{path} is a model folder, which has no checkpoints. Remove --step and --params.")
        return load_model_folder(path)
    values, meta = run_params(path, step, params)
    run, shards = fields["config"], fields["shards"]
    about = {
        "step": meta["step"], "source": shards.get("attribution", ""), "sigma_data": run["diffusion"]["sigma_data"],
        "vae": run["data"]["vae"], "vae_fingerprint": shards["vae"],
        "text_encoder": run["data"]["text_encoder"], "text_fingerprint": shards["text_encoder"],
        "caption_tokens": shards["caption_tokens"], "caption_cleaning": shards.get("caption_cleaning", "none"),
        "guidance": run["sampling"]["guidance"], "steps": run["sampling"]["steps"],
        "path_drop": run["sampling"].get("path_drop", False),
    }  # fmt: skip
    if params == "raw":
        about["params"] = "raw"
    return values, config_from(meta["model"], f"the checkpoint of step {meta['step']} in {path}"), about


def has_checkpoints(workdir: str | Path) -> bool:
    """Returns whether a work directory has checkpoints, so that a run in it resumes."""
    return any(path.name.isdigit() for path in (Path(workdir) / "checkpoints").glob("*"))


def load_under(about: Mapping[str, Any]) -> Start:
    """Returns the base weights of a LoRA run.

    Args:
        about: The `lora` field of the checkpoint's metadata.

    Raises:
        UserError: The base weights no longer exist or have changed.
    """
    folder, step = about["folder"], about["step"]
    where = folder if step is None else f"step {step} of {folder}"
    try:
        start = load_start(folder, step)
    except UserError as error:
        raise UserError(
            f"The LoRA adapter was trained on the weights in {where}, which can't be loaded. Restore them. ({error})"
        ) from error
    if fingerprint(start.params) != about["fingerprint"]:
        raise UserError(
            f"The weights in {where} have changed since the LoRA adapter was trained. Restore the original weights."
        )
    return start


def run_params(
    workdir: str | Path, step: int | None = None, params: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns a checkpoint's parameters for sampling, in host memory, and its metadata.

    The adapter of a LoRA run is merged into its base weights. The arguments are those of `Checkpoints.load_params`.

    Raises:
        UserError: The checkpoint does not exist, or the base weights of a LoRA run are missing or have changed.
    """
    checkpoints = Checkpoints(workdir)
    values, meta = checkpoints.load_params(step, params)
    checkpoints.close()
    if about := meta.get("lora"):
        lora = LoRA(about["rank"], about["alpha"], about["targets"])
        merged = lora.merge(load_under(about).params, values)
        values = {name: np.asarray(value) for name, value in merged.items()}
    return values, meta


def place(params: Mapping[str, np.ndarray], shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Copies host arrays to devices one by one; each process copies the shards of its own devices."""

    def placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return {name: placed(params[name], sharding) for name, sharding in shardings.items()}


def fingerprint(params: Mapping[str, np.ndarray]) -> str:
    """Returns a hash of the weights as 16 hexadecimal digits."""
    return hash_arrays((name, np.asarray(params[name], np.float32)) for name in sorted(params))[:16]
