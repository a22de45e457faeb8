"""Ties a work directory to one config, so that a run is resumed only with the config that started it."""

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micro_dit.errors import UserError
from micro_dit.files import flatten, write_atomically

# Fields that may change when a run resumes, because they affect the trained parameters only by rounding.
MAY_CHANGE = (
    "checkpoint_every", "checkpoint_minutes", "keep_every", "evaluate_every", "sampling", "logging", "cost", "mesh",
    "microbatch", "evaluation", "profile",
)  # fmt: skip
# Fields whose effective value is recorded with the shards, and compared there. The config may leave it open.
IN_SHARDS = ("data.caption_tokens",)
# Values of fields that were added or removed between versions, for configs without them.
ADDED = {
    "init_from": "", "lora.rank": 0, "quantize": "", "optimizer": "adamw", "model.fusion": None,
    "model.rope": None, "diffusion.path_drop": 0.0,
}  # fmt: skip
WITH_LORA = ("lora.alpha", "lora.targets")


def claim_workdir(workdir: str | Path, config: Mapping[str, Any], shards: Mapping[str, Any]) -> None:
    """Writes config and shards to workdir/config.json, or checks that an existing file matches them.

    Args:
        workdir: Work directory of the run.
        config: The config as a dict.
        shards: Description of the shards: encoder fingerprints, caption settings and hashes of the files.

    Raises:
        UserError: The work directory belongs to a run with another config or other shards, or its path contains a
            character that Orbax treats as a glob pattern.
    """
    whole = str(Path(workdir).absolute())
    if glob.escape(whole) != whole:
        raise UserError(
            f"The path {whole} contains *, ? or [, with which Orbax does not find its checkpoints. Set another "
            "--workdir."
        )
    path = Path(workdir) / "config.json"
    ours = json.loads(json.dumps({"config": dict(config), "shards": dict(shards)}))  # tuples become lists
    if path.exists():
        theirs = json.loads(path.read_text())
        before, now = _comparable(theirs["config"]), _comparable(ours["config"])
        if before["quantize"]:
            raise UserError(
                f"{workdir} holds a run with quantize={before['quantize']!r}, but 8-bit matrix products were removed. "
                "Set a new --workdir."
            )
        differing = [
            f"{name} (was {before.get(name)!r}, is now {now.get(name)!r})"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if not differing and theirs["shards"] != ours["shards"]:
            differing = ["the shards were rebuilt with other encoders or data"]
        if differing:
            more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            raise UserError(
                f"{workdir} belongs to a run with another config: {'; '.join(differing[:4])}{more}. "
                "Set a new --workdir, or use the config that started the run."
            )
    write_atomically(path, json.dumps(ours, indent=2) + "\n")


def same_config(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether a run of one config may be resumed with the other.

    Fields in MAY_CHANGE and IN_SHARDS are ignored, and fields that a config lacks have the values in ADDED.
    """
    one, two = _comparable(config), _comparable(other)
    return all(one.get(name) == two.get(name) for name in one.keys() | two.keys())


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that must be equal to resume a run, by dotted name; missing fields have values of ADDED."""
    fields = ADDED | flatten(json.loads(json.dumps(dict(config))))  # tuples become lists
    if not fields["lora.rank"]:
        fields |= dict.fromkeys(WITH_LORA)
    ignored = (*MAY_CHANGE, *IN_SHARDS)
    return {name: value for name, value in fields.items() if not {name, name.split(".")[0]} & set(ignored)}
