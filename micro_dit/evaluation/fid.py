"""Fréchet inception distance (Heusel et al. 2017, arXiv 1706.08500).

FID is the Fréchet distance between two Gaussians fitted to the features of real and of generated images,
‖mu_1 - mu_2‖² + tr(S_1 + S_2 - 2 (S_1 S_2)^½). Means and covariances are computed in float64 on the host.
"""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.encoders.devices import Devices
from micro_dit.errors import UserError
from micro_dit.evaluation import inception
from micro_dit.evaluation.image_sets import Images, fill_batch
from micro_dit.evaluation.measures import Measure
from micro_dit.files import replacing

ENOUGH = inception.FEATURES  # with fewer images, covariances have not full rank
BATCH_SIZE = 32  # images on each device
NOT_TOLD = "not told by the file"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of the features of a set of images.

    Attributes:
        mu: (F,) float64, mean.
        sigma: (F, F) float64, covariance.
        n: number of images; 0 if nobody knows.
        pipeline: how the features were made.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int
    pipeline: Mapping[str, Any]


def statistics(features: Iterable[np.ndarray], pipeline: Mapping[str, Any]) -> Statistics:
    """Mean and covariance (with n - 1) of features that come as (b, F) at a time; UserError if n < 2."""
    n, mu, scatter = 0, np.zeros(1), np.zeros((1, 1))  # which broadcast
    for batch in features:
        batch = np.asarray(batch, np.float64)
        # Chan et al. 1979: each batch is centered by its own mean, so that nothing large is subtracted in the end.
        mean = batch.mean(0)
        centered, apart, total = batch - mean, mean - mu, n + len(batch)
        scatter = scatter + (centered.T @ centered + np.outer(apart, apart) * (n * len(batch) / total))
        mu, n = mu + apart * (len(batch) / total), total
    if n < 2:
        raise UserError(f"statistics of {n} images: at least 2 are needed.")
    return Statistics(mu, scatter / (n - 1), n, dict(pipeline))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """The squared Fréchet distance between two Gaussians; never below 0 but for rounding.

    With S = L Lᵀ, tr (S_1 S_2)^½ is the sum of the singular values of L_1ᵀ L_2. That stays exact where covariances have
    not full rank, as with few images, and the square root of their product does not.
    """
    from scipy.linalg import eigh, svdvals

    def factor(sigma: np.ndarray) -> np.ndarray:
        """L (F, rank)."""
        values, vectors = eigh(sigma)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])

    product = factor(one.sigma).T @ factor(other.sigma)
    overlap = svdvals(product).sum() if product.size else 0.0
    apart = one.mu - other.mu
    return float(apart @ apart + np.trace(one.sigma) + np.trace(other.sigma) - 2 * overlap)


class FidNetwork:
    """Features by the FID network, on all devices of a sharding.

    Attributes:
        pipeline: network and preprocessing.
    """

    def __init__(self, params: inception.Params, fingerprint: str, sharding: jax.sharding.Sharding | None = None):
        """Takes what `inception.load_params` returns; `sharding` splits batches over devices."""
        self._devices = Devices("float32", sharding)
        self._params = self._devices.replicate(dict(params))
        self._apply = self._devices.compile(inception.features)
        self.pipeline = {
            "network": f"{inception.WEIGHTS.removesuffix('.pth')}, sha256 {fingerprint}",
            "preprocessing": inception.PREPROCESSING,
            "rounding": "images are rounded to uint8 before they are resized, not after",
            "features": f"{inception.FEATURES}, last pool",
        }

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) uint8 → (b, 2048) float32."""
        return np.asarray(self._apply(self._params, images))

    def statistics(self, images: Images, **pipeline: Any) -> Statistics:
        """Of a set of images; `pipeline` says what else should be known about it."""
        size = BATCH_SIZE * self._devices.count
        features = (self(fill_batch(batch, size))[: len(batch)] for batch in images.batches(size))
        return statistics(features, self.pipeline | pipeline)


def fid(images: Images, network: FidNetwork, reference: Statistics, warn: Callable[[str], object]) -> Measure:
    """FID of a set of images; raises UserError if the reference's features are those of another network."""
    theirs = reference.pipeline.get("network", NOT_TOLD)
    if theirs not in (NOT_TOLD, network.pipeline["network"]):
        raise UserError(
            f"the statistics file was made with another network ({theirs}) than {network.pipeline['network']}: make it "
            "again from the real images."
        )
    for n, whose in ((len(images), "generated"), (reference.n or ENOUGH, "real")):
        if n < ENOUGH:
            warn(
                f"FID with {n:,} {whose} images: below {ENOUGH:,} the covariance has not full rank, and the number "
                "is too large and compares only with others of as many images."
            )
    ours, side = network.statistics(images), next(images.batches(1)).shape[1]
    differing = {k: v for k, v in reference.pipeline.items() if k not in ours.pipeline or v != ours.pipeline[k]}
    pipeline = {
        **ours.pipeline, "statistics": "float64, n - 1", "generated images": f"{len(images)}, {side} px",
        "reference": {"images": reference.n or NOT_TOLD, **differing},
    }  # fmt: skip
    return Measure("fid", frechet_distance(ours, reference), "lower", pipeline)


def save_statistics(path: str | Path, given: Statistics) -> None:
    """Writes an .npz, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=given.mu, sigma=given.sigma, n=given.n, pipeline=json.dumps(dict(given.pipeline)))


def load_statistics(path: str | Path, features: int = inception.FEATURES) -> Statistics:
    """Reads statistics, also those of other programs, which keep mu and sigma alone.

    Raises:
        UserError: the file is missing, damaged, or holds other things.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no statistics file {path}; give one, or a folder of real images.")
    try:
        with np.load(path) as saved:
            found = {name: saved[name] for name in saved.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no statistics file (.npz), or is damaged: make it again.") from error
    mu, sigma = (np.asarray(found.get(name, np.zeros(0))) for name in ("mu", "sigma"))
    if mu.shape != (features,) or sigma.shape != (features, features):
        raise UserError(
            f"{path} is no statistics file of {features} features: its mu is {mu.shape} and its sigma {sigma.shape}, "
            f"where ({features},) and ({features}, {features}) should be."
        )
    try:
        pipeline = json.loads(str(found["pipeline"])) if "pipeline" in found else {"network": NOT_TOLD}
    except ValueError as error:
        raise UserError(f"{path} is damaged: its pipeline can't be read; make it again.") from error
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), int(found.get("n", 0)), pipeline)
