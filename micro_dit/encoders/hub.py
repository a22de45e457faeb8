"""Where encoders come from: a folder, one that comes with the package, or the Hugging Face hub."""

import json
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from micro_dit.errors import UserError

ASSETS = Path(__file__).parent.parent / "assets"
# 'owner/repository' and, behind them, a folder inside the repository.
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[\w.-]+)*)/?", re.ASCII)
# Pickles run code when they are loaded; whatever else a pattern may match is of no use here.
SUFFIXES = (".safetensors", ".json", ".txt", ".model")


def resolve_folder(name: str, allow: Sequence[str]) -> Path:
    """Finds a folder, one that comes with the package ('openmoji_vae'), or 'owner/repository[/folder]' on the hub.

    Of the hub's files, those that match `allow` are downloaded, or found in the hub's own cache. Patterns are relative
    to the folder ('../tokenizer/*.json' is possible) and end in one of SUFFIXES.

    Raises:
        UserError: The folder or repository does not exist, or cannot be downloaded.
    """
    if wrong := [pattern for pattern in allow if not pattern.endswith(SUFFIXES)]:
        raise ValueError(f"{wrong[0]} may match files other than {', '.join(SUFFIXES)}")
    for folder in (Path(name).expanduser(), ASSETS / name):
        if folder.is_dir():
            return folder
    match = HUB_NAME.fullmatch(name)
    if Path(name).exists() or match is None:
        raise UserError(f"'{name}' is no folder: give a folder, or owner/repository on the Hugging Face hub.")
    repository, inside = match[1], match[2].strip("/")
    if ".." in inside.split("/"):
        raise UserError(f"'{name}' points out of its repository: leave out the '..'.")
    patterns = [posixpath.normpath(posixpath.join(inside, pattern)) for pattern in allow]
    return _download(repository, [pattern for pattern in patterns if not pattern.startswith("../")]) / inside


def resolve_weights(name: str, patterns: Sequence[str]) -> list[Path]:
    """Returns the files of the first pattern that `name` has any of, downloading only these; else raises UserError."""
    for pattern in patterns:
        if found := sorted(resolve_folder(name, [pattern]).glob(pattern)):
            return found
    raise UserError(
        f"'{name}' has none of {', '.join(patterns)}: if its weights are .bin or .pt files, download them and run "
        "python -m micro_dit.encoders.convert_weights FILE FOLDER."
    )


def _download(repository: str, patterns: Sequence[str]) -> Path:
    """The local copy of a repository on the hub, which holds at least the files that match."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(f"'{repository}' is no folder; the hub needs: pip install huggingface_hub.") from error
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except errors.HFValidationError as error:
        raise UserError(
            f"There is no folder '{repository}', nor can a repository have that name: correct it."
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"'{repository}' is gated: accept its terms on its page of the Hugging Face hub, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder '{repository}', nor such a repository on the Hugging Face hub; if it is private, run "
            "`hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"There is no folder '{repository}', the Hugging Face hub can't be reached, and its local cache lacks what "
            "is needed of it: download it on a machine with a network, and give the folder."
        ) from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"The download of '{repository}' from the hub broke off ({reason}); run it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; raises UserError if the file is missing or broken."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {file} ({error.strerror}): download the encoder again.") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); download the encoder again.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is no JSON object; download the encoder again.")
    return fields
