"""Model folders: config.json and model.safetensors, which contain everything needed to sample except the encoders.

config.json has the network's configuration under "model", the fields of ABOUT and any of OPTIONAL. model.safetensors
has the parameters under this package's names. The image encoder may be included in the subfolder VAE.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from micro_dit.errors import UserError
from micro_dit.files import write_atomically
from micro_dit.interop.tensor_files import write_safetensors
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import abstract_params

FORMAT, VERSION = "micro_dit model", 1
# Required fields: the data's standard deviation, the encoders' names, the number of caption tokens, how captions are
# cleaned (data/captions.py), and a description of the weights' origin.
ABOUT = ("sigma_data", "vae", "text_encoder", "caption_tokens", "caption_cleaning", "source")
# Optional fields and their types: the training step, sampling defaults, the encoders' fingerprints in training, whether
# the folder includes the image encoder, and 'params', which is 'raw' if the run has EMA weights but these are not them.
OPTIONAL: dict[str, tuple[type, ...]] = {
    "step": (int,), "guidance": (int, float), "steps": (int,), "vae_fingerprint": (str,), "text_fingerprint": (str,),
    "vae_included": (bool,), "params": (str,), "path_drop": (bool,),
}  # fmt: skip
VAE, VAE_FILES = "vae", ("config.json", "diffusion_pytorch_model.safetensors", "README.md", "LICENSE", "LICENSE.md")
WEIGHTS_FILE = "model.safetensors"
DTYPES = ("float32", "bfloat16", "float16")  # supported dtypes of the weights file


def is_model_folder(folder: str | Path) -> bool:
    """Returns whether this is a model folder; a run's work directory, which also has a config.json, is not."""
    config = Path(folder) / "config.json"
    return config.is_file() and read_config(config).get("format") == FORMAT


def save_model_folder(
    folder: str | Path,
    params: Mapping[str, np.ndarray],
    config: DiTConfig,
    about: Mapping[str, Any],
    dtype: str = "float32",
    vae: Path | None = None,
) -> None:
    """Writes a model folder, replacing a model that is already there.

    Args:
        folder: The folder to write.
        params: Parameters by name, float32 or narrower floats.
        config: Configuration of the network.
        about: All fields of ABOUT and any of OPTIONAL; 'vae_included' is set here.
        dtype: Dtype of the stored weights, one of DTYPES.
        vae: Folder of an image encoder to include.

    Raises:
        UserError: The folder contains something else, the parameters do not match the network, or a value overflows
            `dtype`.
    """
    if not set(ABOUT) <= set(about) <= set(ABOUT) | set(OPTIONAL):
        raise ValueError(
            f"`about` must have the fields {sorted(ABOUT)} and any of {sorted(OPTIONAL)}, but has {sorted(about)}."
        )
    folder = Path(folder)
    path = folder / "config.json"
    if path.exists() and not is_model_folder(folder):
        raise UserError(f"{folder} has a config.json but is not a model folder. Choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Choose a folder, or a name that does not exist yet.")
    _check(params, config, "The parameters do not")
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # config.json is written last, so a partial folder is not a model
    write_safetensors(folder / WEIGHTS_FILE, params, dtype)
    fields = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(config)}
    fields |= {name: about[name] for name in (*ABOUT, *OPTIONAL) if name in about}
    if vae is not None:
        (folder / VAE).mkdir(exist_ok=True)
        for file in VAE_FILES:
            if (vae / file).is_file():
                shutil.copyfile(vae / file, folder / VAE / file)
        fields["vae_included"] = True
    write_atomically(path, json.dumps(fields, indent=2) + "\n")


def load_model_folder(folder: str | Path) -> tuple[dict[str, np.ndarray], DiTConfig, dict[str, Any]]:
    """Reads a model folder.

    Returns:
        The parameters (float32, on the host), the network's configuration, and the fields of ABOUT and OPTIONAL.

    Raises:
        UserError: The folder is not a model folder, has another version, or is corrupt or inconsistent.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    if not is_model_folder(folder):
        raise UserError(
            f"{folder} is not a model folder: it has no config.json of one. Pass a folder written by "
            "`python -m micro_dit.convert` or `python -m micro_dit.export`."
        )
    fields = read_config(folder / "config.json")
    if fields.get("version") != VERSION:
        raise UserError(
            f"{folder} has version {fields.get('version')}, but this version of micro_dit reads version {VERSION}. "
            "Update micro_dit, or convert the weights again."
        )
    if missing := [name for name in ABOUT if name not in fields]:
        raise UserError(f"{folder / 'config.json'} lacks {', '.join(missing)}. Convert the weights again.")
    for name, kinds in OPTIONAL.items():
        if name in fields and type(fields[name]) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{folder / 'config.json'}: '{name}' is {fields[name]!r}, but must be of type {wanted}.")
    config = config_from(fields.get("model"), folder / "config.json")
    weights = folder / WEIGHTS_FILE
    try:
        arrays = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"Cannot read {weights} ({error}). Convert the weights again.") from error
    _check(arrays, config, f"{weights} does not")
    params = {name: np.asarray(arrays[name], np.float32) for name in abstract_params(config)}
    return params, config, {name: fields[name] for name in (*ABOUT, *OPTIONAL) if name in fields}


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads a config.json; raises UserError if it does not exist or is not a JSON object."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}). Pass the config.json of a model folder.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}). Correct it or convert the weights again.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object. Pass the config.json of a model folder.")
    return fields


def config_from(fields: Any, where: object) -> DiTConfig:
    """Returns the network configuration from its fields in a config.json.

    Args:
        fields: The value of "model" in the file.
        where: Path of the file, for error messages.

    Raises:
        UserError: A field is missing, unknown, or has an invalid value.
    """
    fields = dict(fields) if isinstance(fields, Mapping) else {}
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(DiTConfig)}
    problems = [f"{name} is missing" for name, required in known.items() if required and name not in fields]
    problems += [f"{name} is unknown" for name in fields if name not in known]
    if problems:
        raise UserError(
            f"'model' in {where} does not have the fields of a network configuration: {', '.join(problems)}."
        )
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    try:
        config = DiTConfig(**values)
        config.check()
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"A field of 'model' in {where} has an invalid value ({error}).") from error
    return config


def _check(params: Mapping[str, np.ndarray], config: DiTConfig, subject: str) -> None:
    """Raises UserError if names or shapes do not match the network's; `subject` is the start of the message."""
    expected = {name: tuple(leaf.shape) for name, leaf in abstract_params(config).items()}
    problems = [f"missing {name}" for name in expected if name not in params]
    problems += [f"unexpected {name}" for name in params if name not in expected]
    problems += [
        f"{name} is {params[name].dtype} with shape {params[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in params and (tuple(params[name].shape) != shape or params[name].dtype.itemsize > 4)
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{subject} match the network: {'; '.join(problems[:10])}{more}.")
