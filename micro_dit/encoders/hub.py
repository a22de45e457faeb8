"""Locates encoders: in a folder, in the package, or on the Hugging Face Hub."""

import json
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from micro_dit.errors import UserError

ASSETS = Path(__file__).parent.parent / "assets"
# 'owner/repository', optionally followed by a folder inside the repository.
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[\w.-]+)*)/?", re.ASCII)
# Only these files are downloaded. Pickles are excluded because loading them can run code.
SUFFIXES = (".safetensors", ".json", ".txt", ".model")


def resolve_folder(name: str, allow: Sequence[str]) -> Path:
    """Returns the local folder of an encoder, downloading it from the Hugging Face Hub if needed.

    Args:
        name: A folder, the name of an encoder included in the package ('openmoji_vae'), or
            'owner/repository[/folder]' on the Hub.
        allow: Patterns of the files to download, relative to the folder ('../tokenizer/*.json' is possible). Each ends
            in one of SUFFIXES. Files in the Hub's cache are not downloaded again.

    Raises:
        UserError: The folder or repository does not exist, or cannot be downloaded.
    """
    if wrong := [pattern for pattern in allow if not pattern.endswith(SUFFIXES)]:
        raise ValueError(f"Pattern {wrong[0]} may match files other than {', '.join(SUFFIXES)}.")
    for folder in (Path(name).expanduser(), ASSETS / name):
        if folder.is_dir():
            return folder
    match = HUB_NAME.fullmatch(name)
    if Path(name).exists() or match is None:
        raise UserError(
            f"'{name}' is not a folder. Pass an existing folder, or owner/repository on the Hugging Face Hub."
        )
    repository, inside = match[1], match[2].strip("/")
    if ".." in inside.split("/"):
        raise UserError(f"'{name}' points outside of its repository. Remove the '..'.")
    patterns = [posixpath.normpath(posixpath.join(inside, pattern)) for pattern in allow]
    return _download(repository, [pattern for pattern in patterns if not pattern.startswith("../")]) / inside


def resolve_weights(name: str, patterns: Sequence[str]) -> list[Path]:
    """Returns the files that match the first pattern with any match, downloading only these.

    Raises:
        UserError: No pattern matches a file of the encoder `name`.
    """
    for pattern in patterns:
        if found := sorted(resolve_folder(name, [pattern]).glob(pattern)):
            return found
    raise UserError(
        f"'{name}' has no file named {' or '.join(patterns)}. If its weights are .bin or .pt files, download them and "
        "run `python -m micro_dit.encoders.convert_weights FILE FOLDER`."
    )


def _download(repository: str, patterns: Sequence[str]) -> Path:
    """Downloads the matching files of a repository on the Hub and returns their local folder."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(
            f"'{repository}' is not a folder, and downloading it requires the package huggingface_hub. Run "
            "`pip install huggingface_hub`."
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except errors.HFValidationError as error:
        raise UserError(
            f"'{repository}' is neither a folder nor a valid repository name on the Hugging Face Hub. Correct the name."
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"'{repository}' is gated. Accept its terms on its Hugging Face Hub page, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"'{repository}' is neither a folder nor a repository on the Hugging Face Hub. If it is private, run "
            "`hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"'{repository}' is not a folder, the Hugging Face Hub cannot be reached, and its local cache lacks the "
            "required files. Download the repository on a machine with network access, and pass its folder instead."
        ) from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"The download of '{repository}' from the Hugging Face Hub failed ({reason}). Run the command again."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; raises UserError if the file is missing or invalid."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {file} ({error.strerror}). Download the encoder again.") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}). Download the encoder again.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object. Download the encoder again.")
    return fields
