"""A model in a folder: config.json and model.safetensors, all that drawing with a network takes besides its encoders.

config.json holds the network's fields under "model", the fields of ABOUT and any of OPTIONAL; model.safetensors holds
our parameters. The image encoder may be beside them, in the folder VAE.
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
# What is told of a model: the data's standard deviation, the encoders' names, tokens of a caption, how captions are
# cleaned (data/captions.py), and in words where the weights come from.
ABOUT = ("sigma_data", "vae", "text_encoder", "caption_tokens", "caption_cleaning", "source")
# What may be told besides, and its types: the step of the run, what is sampled with by default, which encoders it was
# trained with, whether the image encoder is in the folder, and 'raw' if the run has an average and this is not it.
OPTIONAL: dict[str, tuple[type, ...]] = {
    "step": (int,), "guidance": (int, float), "steps": (int,), "vae_fingerprint": (str,), "text_fingerprint": (str,),
    "vae_included": (bool,), "params": (str,), "path_drop": (bool,),
}  # fmt: skip
VAE, VAE_FILES = "vae", ("config.json", "diffusion_pytorch_model.safetensors", "README.md", "LICENSE", "LICENSE.md")
WEIGHTS_FILE = "model.safetensors"
DTYPES = ("float32", "bfloat16", "float16")  # of the weights' file


def is_model_folder(folder: str | Path) -> bool:
    """Whether the folder holds a model; a run's work directory has a config.json too."""
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
    """Writes a model, in place of one that is there, with the files of the image encoder's folder `vae`.

    `params` are float32 or narrower floats, and are stored as `dtype`, one of DTYPES. `about` has the fields of ABOUT,
    and any of OPTIONAL; 'vae_included' is added.

    Raises:
        UserError: The folder belongs to something else, the parameters are not this network's, or too large for dtype.
    """
    if not set(ABOUT) <= set(about) <= set(ABOUT) | set(OPTIONAL):
        raise ValueError(f"about has the fields {sorted(about)}, not {sorted(ABOUT)} and any of {sorted(OPTIONAL)}")
    folder = Path(folder)
    path = folder / "config.json"
    if path.exists() and not is_model_folder(folder):
        raise UserError(f"{folder} is no model folder, but has a config.json; give another folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder, or a new name for one.")
    _check(params, config, "the parameters don't")
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # what is written halfway is no model
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
    """Returns the parameters (on the host, float32), the network's configuration, and the fields of ABOUT and OPTIONAL.

    Raises:
        UserError: The folder holds no model, one of a later version, or one that is damaged or does not fit itself.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    if not is_model_folder(folder):
        raise UserError(f"{folder} is no model folder (it has no config.json of one); give one that convert wrote.")
    fields = read_config(folder / "config.json")
    if fields.get("version") != VERSION:
        raise UserError(f"{folder} is of version {fields.get('version')}, this program reads {VERSION}; update it.")
    if missing := [name for name in ABOUT if name not in fields]:
        raise UserError(f"{folder / 'config.json'} has no {', '.join(missing)}; convert the weights again.")
    for name, kinds in OPTIONAL.items():
        if name in fields and type(fields[name]) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{folder / 'config.json'}: {name} is {fields[name]!r}, it must be of type {wanted}.")
    config = config_from(fields.get("model"), folder / "config.json")
    weights = folder / WEIGHTS_FILE
    try:
        arrays = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} can't be read ({error}); convert the weights again.") from error
    _check(arrays, config, f"{weights} does not")
    params = {name: np.asarray(arrays[name], np.float32) for name in abstract_params(config)}
    return params, config, {name: fields[name] for name in (*ABOUT, *OPTIONAL) if name in fields}


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads a config.json; raises UserError if there is none, or it is not a JSON object."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); give the config.json of a model folder.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); correct it or write it anew.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is no JSON object; give the config.json of a model folder.")
    return fields


def config_from(fields: Any, where: object) -> DiTConfig:
    """Returns the configuration from its fields as stored; raises UserError, naming `where`, if they do not fit."""
    fields = dict(fields) if isinstance(fields, Mapping) else {}
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(DiTConfig)}
    problems = [f"{name} is missing" for name, required in known.items() if required and name not in fields]
    problems += [f"{name} is unknown" for name in fields if name not in known]
    if problems:
        raise UserError(f"the fields of the network, under 'model' in {where}, don't fit: {', '.join(problems)}.")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    try:
        config = DiTConfig(**values)
        config.check()
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"a field of the network, under 'model' in {where}, has no fitting value ({error}).") from error
    return config


def _check(params: Mapping[str, np.ndarray], config: DiTConfig, subject: str) -> None:
    """Raises UserError if names or shapes are not the network's; `subject` begins the sentence."""
    expected = {name: tuple(leaf.shape) for name, leaf in abstract_params(config).items()}
    problems = [f"missing {name}" for name in expected if name not in params]
    problems += [f"unexpected {name}" for name in params if name not in expected]
    problems += [
        f"{name} is {params[name].dtype} of {params[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in params and (tuple(params[name].shape) != shape or params[name].dtype.itemsize > 4)
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{subject} fit the network: {'; '.join(problems[:10])}{more}.")
