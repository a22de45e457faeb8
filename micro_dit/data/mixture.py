"""Combines several folders of shards into one data set.

A mix is written as a string:

    data/a                     one folder
    data/a,data/b              two folders; every record is equally likely
    data/a=0.7,data/b=0.3      exactly 70% of the examples from data/a and 30% from data/b

All folders of a mix must be encoded with the same image and text encoders.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from micro_dit.data.shard_checks import ShardExpectations, check_shards
from micro_dit.data.shards import Manifest, Tally, read_manifest, record_fields
from micro_dit.encoders.info import same_encoder
from micro_dit.errors import UserError


def parse_mix(shards: str | Path) -> list[tuple[str, float | None]]:
    """Parses 'a', 'a,b' or 'a=0.7,b=0.3' into pairs of folder and weight; the weight is None if it is omitted.

    Raises:
        UserError: A folder name is empty or repeated, or a weight is missing or not a positive number.
    """
    folders: list[tuple[str, float | None]] = []
    for part in str(shards).split(","):
        name, separator, weight = part.strip().rpartition("=")
        try:
            folders.append((name.strip(), float(weight)) if separator else (part.strip(), None))
        except ValueError as error:
            raise UserError(
                f"In the mix {shards}, the weight '{weight}' of {name} is not a number. Write the mix as "
                "folder=weight,folder=weight."
            ) from error
    names, weights = zip(*folders, strict=True)
    if not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"The mix '{shards}' has an empty or repeated folder name. Write the mix as folder=weight,folder=weight."
        )
    if weights.count(None) not in (0, len(weights)):
        raise UserError(f"The mix {shards} has weights for only some folders. Set a weight for every folder or none.")
    if not all(weight is None or (math.isfinite(weight) and weight > 0) for weight in weights):
        raise UserError(f"The mix {shards} has a weight that is not positive. Correct it or remove the folder.")
    return folders


def deal(weights: Sequence[int], position: int) -> tuple[int, int]:
    """Returns the folder of the example at a position of a mix, and the number of earlier examples from that folder.

    The folders alternate as evenly as integers allow: positions n·sum(weights) to (n + 1)·sum(weights) - 1 contain
    exactly `weights[k]` examples of folder k. Each folder in turn receives its share of the positions that the previous
    folders leave.
    """
    left = sum(weights)
    for folder, weight in enumerate(weights):
        before = position * weight // left
        if (position + 1) * weight // left > before:
            return folder, before
        position -= before
        left -= weight
    raise ValueError(f"At least one weight must be positive, got {weights}.")


@dataclasses.dataclass(frozen=True)
class Mix:
    """Folders of shards that are read as one data set."""

    folders: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    proportions: tuple[float, ...] | None  # sampling weight per folder; None: every record is equally likely

    def weights(self, split: str) -> list[int]:
        """Returns the proportions of the folders as the smallest equivalent integers."""
        if self.proportions is None:
            weights = [manifest.records(split) for manifest in self.manifests]
        else:
            fractions = [Fraction(str(proportion)) for proportion in self.proportions]
            denominator = math.lcm(*(fraction.denominator for fraction in fractions))
            weights = [int(fraction * denominator) for fraction in fractions]
        return [weight // math.gcd(*weights) for weight in weights]

    def having(self, split: str) -> "Mix":
        """Returns the mix of the folders that have examples in a split, or of all folders if none has any."""
        kept = [k for k, manifest in enumerate(self.manifests) if manifest.records(split)] or range(len(self.folders))
        folders, manifests = zip(*((self.folders[k], self.manifests[k]) for k in kept), strict=True)
        return Mix(folders, manifests, self.proportions and tuple(self.proportions[k] for k in kept))

    def check(self, expected: ShardExpectations) -> None:
        """Runs `check_shards` on every folder."""
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            check_shards(manifest, folder, expected)

    def manifest(self) -> Manifest:
        """Returns one manifest for the mix, with combined files and tallies and the statistics of the mixture."""
        first = self.manifests[0]
        if len(self.manifests) == 1:
            return first
        resolutions = tuple(r for r in first.resolutions if all(r in other.resolutions for other in self.manifests))
        return dataclasses.replace(
            first,
            source=" + ".join(dict.fromkeys(manifest.source for manifest in self.manifests)),
            attribution="; ".join(dict.fromkeys(manifest.attribution for manifest in self.manifests)),
            resolutions=resolutions,
            fields=record_fields(resolutions, first.posterior, first.vae, first.text_encoder),
            dropped=_add_tallies([manifest.dropped for manifest in self.manifests]),
            altered=_add_tallies([manifest.altered for manifest in self.manifests]),
            statistics={str(resolution): self._statistics(str(resolution)) for resolution in resolutions},
            splits={
                split: tuple(
                    dataclasses.replace(file, name=f"{folder}/{file.name}")
                    for folder, manifest in zip(self.folders, self.manifests, strict=True)
                    for file in manifest.splits.get(split, ())
                )
                for split in dict.fromkeys(split for manifest in self.manifests for split in manifest.splits)
            },
        )

    def _statistics(self, resolution: str) -> dict[str, list[float]]:
        """Returns the mean and standard deviation per channel of the mixture, from those of the folders."""
        shares = self.proportions or [sum(map(m.records, m.splits)) for m in self.manifests]
        means, stds = (np.array([m.statistics[resolution][key] for m in self.manifests]) for key in ("mean", "std"))
        mean = np.average(means, 0, shares)
        variance = np.average(stds**2 + (means - mean) ** 2, 0, shares)
        return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist()}


def read_mix(shards: str | Path) -> Mix:
    """Reads the manifests of a mix; raises UserError if one is missing or damaged, or if they are incompatible."""
    parsed = parse_mix(shards)
    folders = tuple(folder for folder, _ in parsed)
    manifests = tuple(read_manifest(folder) for folder in folders)
    check_alike(folders, manifests)
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.posterior != manifests[0].posterior:
            raise _difference(folders[0], folder, "posteriors", manifests[0].posterior, manifest.posterior)
    weights = tuple(weight for _, weight in parsed if weight is not None)
    return Mix(folders, manifests, weights or None)


def check_alike(folders: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raises UserError unless all shards have the same encoders, shapes and caption cleaning."""
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        vae, text = manifest.vae, manifest.text_encoder
        for kind, ours, theirs in (("image", first.vae, vae), ("text", first.text_encoder, text)):
            if not same_encoder(ours, theirs):
                names = f"{ours.name} {ours.fingerprint}", f"{theirs.name} {theirs.fingerprint}"
                raise _difference(folders[0], folder, f"{kind} encoders", *names)
        for what, value, other in (
            ("latent channels", first.vae.channels, vae.channels),
            ("pixels per latent", first.vae.downsample, vae.downsample),
            ("caption tokens", first.text_encoder.tokens, text.tokens),
            ("caption channels", first.text_encoder.channels, text.channels),
            ("caption cleanings", first.caption_cleaning, manifest.caption_cleaning),
        ):
            if value != other:
                raise _difference(folders[0], folder, what, value, other)


def _difference(folder: str, other: str, what: str, value: object, other_value: object) -> UserError:
    return UserError(
        f"{folder} and {other} cannot be used together because their {what} differ ({value} and {other_value}). Remove "
        "one of them, or rebuild it with the settings of the other."
    )


def _add_tallies(tallies: Sequence[dict[str, Tally]]) -> dict[str, Tally]:
    total: dict[str, Tally] = {}
    for reason, tally in itertools.chain.from_iterable(folder.items() for folder in tallies):
        before = total.get(reason, Tally(0, []))
        total[reason] = Tally(before.count + tally.count, before.ids + tally.ids)
    return total
