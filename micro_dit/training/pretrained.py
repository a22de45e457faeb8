"""Weights to start from: those of a model folder or of another run, for full fine-tuning or under a LoRA adapter.

A run with LoRA saves its adapter alone, and where the weights under it are: whoever reads its checkpoints gets both,
merged, by `run_params`.
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

# What may differ from the network that continues: no parameter depends on it.
FREE_FIELDS = ("input_size", "pos_interp_scale")


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights to start from, on the host.

    Attributes:
        folder: absolute; a model folder, or the work directory of a run.
        step: of the run's checkpoint; None for a model folder.
        params: float32, by name.
        network: that they are of.
        about: sigma_data, vae, text_encoder, caption_tokens, and vae_fingerprint and text_fingerprint if known.
    """

    folder: Path
    step: int | None
    params: dict[str, np.ndarray]
    network: DiTConfig
    about: Mapping[str, Any]

    def __str__(self) -> str:
        return str(self.folder) if self.step is None else f"step {self.step} of {self.folder}"

    def under(self, lora: LoRA) -> dict[str, Any]:
        """What a checkpoint's meta tells of its adapter and of what is under it."""
        return dataclasses.asdict(lora) | {
            "folder": str(self.folder), "step": self.step, "fingerprint": fingerprint(self.params)
        }  # fmt: skip

    def check(self, network: DiTConfig, manifest: Manifest, sigma_data: float, vae: str, text_encoder: str) -> None:
        """Raises UserError if a run can't start here: of another network, or trained on other encoders' outputs.

        Args:
            network: of the run's first phase.
            manifest: of its shards.
            sigma_data: of its config.
            vae: of its config.
            text_encoder: of its config.
        """
        fields = [field.name for field in dataclasses.fields(DiTConfig) if field.name not in FREE_FIELDS]
        theirs, ours = (dataclasses.asdict(config) for config in (self.network, network))
        if differing := [f"{name} ({theirs[name]} there, {ours[name]} here)" for name in fields
                         if theirs[name] != ours[name]]:  # fmt: skip
            raise UserError(f"init_from={self.folder} is another network: {'; '.join(differing)}; set config.model so.")
        about, text = self.about, manifest.text_encoder
        same_vae = _same(about, "vae", (manifest.vae.name, vae), manifest.vae.fingerprint)
        same_text = _same(about, "text_encoder", (text.name, text_encoder), text.fingerprint)
        problems = [] if same_vae else [f"vae ({about['vae']} there, {manifest.vae.name} here)"]
        problems += [] if same_text else [f"text_encoder ({about['text_encoder']} there, {text.name} here)"]
        numbers = {"sigma_data": sigma_data, "caption_tokens": text.tokens}
        problems += [f"{name} ({about[name]} there, {value} here)" for name, value in numbers.items()
                     if about[name] != value]  # fmt: skip
        if problems:
            raise UserError(
                f"init_from={self.folder} was trained with something else than config and shards have: "
                f"{'; '.join(problems)}; set the config so, and make the shards with the same encoders."
            )


def _same(about: Mapping[str, Any], which: str, names: tuple[str, ...], found: str) -> bool:
    """Fingerprints tell best whether two encoders are one; names, where a fingerprint is not known."""
    known = about.get({"vae": "vae_fingerprint", "text_encoder": "text_fingerprint"}[which], "")
    if UNVERIFIED in (known, found) or not known or not found:
        return about[which] in names
    return bool(known == found)


def load_start(path: str | Path, step: int | None = None) -> Start:
    """Reads a model folder, or a run's checkpoint (the newest if `step` is None; its moving average if it has one).

    Raises:
        UserError: there is neither.
    """
    path = Path(path).expanduser().absolute()
    try:
        of_run = not is_model_folder(path)
        params, network, about = read_model(path, step if of_run else None)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    return Start(path, about["step"] if of_run else None, params, network, about)


def read_run(path: str | Path) -> dict[str, Any] | None:
    """Returns what config.json holds of a run with checkpoints; None for a model folder.

    Raises:
        UserError: The folder is neither, or the run has no checkpoints yet.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no work directory of a run and no model folder (it has no config.json).")
    if is_model_folder(path):
        return None
    fields = read_config(path / "config.json")
    if not {"config", "shards"} <= set(fields):
        raise UserError(f"{path / 'config.json'} is neither that of a run nor of a model folder.")
    if not has_checkpoints(path):
        raise UserError(f"{path} has no checkpoints yet: train for some steps first.")
    return fields


def read_model(
    path: str | Path, step: int | None = None, params: str | None = None
) -> tuple[dict[str, np.ndarray], DiTConfig, dict[str, Any]]:
    """Reads the model of a run or of a model folder.

    Args:
        path: Work directory of the run, or the model folder.
        step: Checkpoint of the run; by default the newest.
        params: 'ema' or 'raw', of the run's checkpoint; by default the EMA weights where there are some.

    Returns:
        The parameters on the host, the network's configuration, and the fields of a model folder's config.json that
        describe the model (ABOUT and OPTIONAL in micro_dit/interop/model_folder.py).

    Raises:
        UserError: The model or checkpoint does not exist, or the weights under an adapter are missing or changed.
    """
    fields = read_run(path)
    if fields is None:
        if step is not None or params is not None:
            raise UserError(f"{path} is a model folder, which has no checkpoints: leave out the step and ema or raw.")
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
    """Whether a run in this work directory continues rather than starts."""
    return any(path.name.isdigit() for path in (Path(workdir) / "checkpoints").glob("*"))


def load_under(about: Mapping[str, Any]) -> Start:
    """The weights under an adapter, by what its checkpoint's meta tells of them.

    Raises:
        UserError: they are not there any more, or are others.
    """
    folder, step = about["folder"], about["step"]
    where = folder if step is None else f"step {step} of {folder}"
    try:
        start = load_start(folder, step)
    except UserError as error:
        raise UserError(f"the LoRA adapter was trained on the weights in {where}; bring them back: {error}") from error
    if fingerprint(start.params) != about["fingerprint"]:
        raise UserError(f"the weights in {where} have changed since the LoRA adapter was trained: bring the old back.")
    return start


def run_params(
    workdir: str | Path, step: int | None = None, params: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A checkpoint's parameters to sample from, on the host, and its meta; see `Checkpoints.load_params`.

    Those of a run with LoRA are merged with the weights under them.

    Raises:
        UserError: there is no such checkpoint, or the weights under an adapter are missing or changed.
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
    """Host arrays onto devices, one after another: each process gives its own devices their parts."""

    def placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return {name: placed(params[name], sharding) for name, sharding in shardings.items()}


def fingerprint(params: Mapping[str, np.ndarray]) -> str:
    """Sixteen hexadecimal digits that tell weights from others."""
    return hash_arrays((name, np.asarray(params[name], np.float32)) for name in sorted(params))[:16]
