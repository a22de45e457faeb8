"""Ties a work directory to one config: only the same config resumes the run in it."""

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micro_dit.errors import UserError
from micro_dit.files import flatten, write_atomically

# Fields that may change when a run resumes: they influence the trained parameters only by rounding.
MAY_CHANGE = (
    "checkpoint_every", "checkpoint_minutes", "keep_every", "evaluate_every", "sampling", "logging", "cost", "mesh",
    "microbatch", "evaluation", "profile",
)  # fmt: skip
# The values of fields that the config of an earlier or a later version lacks.
ADDED = {
    "init_from": "", "lora.rank": 0, "quantize": "", "optimizer": "adamw", "model.fusion": None,
    "diffusion.path_drop": 0.0,
}  # fmt: skip
WITH_LORA = ("lora.alpha", "lora.targets")


def claim_workdir(workdir: str | Path, config: Mapping[str, Any], shards: Mapping[str, Any]) -> None:
    """Writes workdir/config.json with config and shards, or checks that the existing one is of the same run.

    Raises:
        UserError: The work directory belongs to another config, or Orbax could not find checkpoints under its name.
    """
    whole = str(Path(workdir).absolute())
    if glob.escape(whole) != whole:
        raise UserError(
            f"the path {whole} has a *, a ? or a [, by which Orbax would not find what it has saved: give another "
            "--workdir."
        )
    path = Path(workdir) / "config.json"
    ours = json.loads(json.dumps({"config": dict(config), "shards": dict(shards)}))  # tuples become lists
    if path.exists():
        theirs = json.loads(path.read_text())
        before, now = _comparable(theirs["config"]), _comparable(ours["config"])
        if before["quantize"]:
            raise UserError(
                f"{workdir} holds a run with quantize={before['quantize']!r}, and 8-bit products were removed; "
                "give a new --workdir."
            )
        differing = [
            f"{name} ({before.get(name)!r} there, {now.get(name)!r} here)"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if not differing and theirs["shards"] != ours["shards"]:
            differing = ["the shards, which were made again with other encoders or data"]
        if differing:
            more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            raise UserError(
                f"{workdir} belongs to a run with another config: {'; '.join(differing[:4])}{more}; "
                "give a new --workdir, or the config that it was started with."
            )
    write_atomically(path, json.dumps(ours, indent=2) + "\n")


def same_config(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether two configs train the same parameters.

    As when a run resumes, fields in MAY_CHANGE are ignored, and fields that a config lacks have the values in ADDED.
    """
    one, two = _comparable(config), _comparable(other)
    return all(one.get(name) == two.get(name) for name in one.keys() | two.keys())


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that must be equal to resume a run, by dotted name, with those that the config lacks."""
    fields = ADDED | flatten(json.loads(json.dumps(dict(config))))  # tuples become lists
    if not fields["lora.rank"]:
        fields |= dict.fromkeys(WITH_LORA)
    return {name: value for name, value in fields.items() if name.split(".")[0] not in MAY_CHANGE}
