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

ENOUGH = inception.FEATURES  # with fewer images, the covariance does not have full rank
BATCH_SIZE = 32  # images per device
UNKNOWN = "not recorded in the file"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mu: (F,) float64, mean.
        sigma: (F, F) float64, covariance.
        n: Number of images. 0 if unknown.
        pipeline: Description of how the features were computed.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int
    pipeline: Mapping[str, Any]


def statistics(features: Iterable[np.ndarray], pipeline: Mapping[str, Any]) -> Statistics:
    """Computes the mean and the unbiased covariance of features.

    Args:
        features: Batches of features, each (b, F).
        pipeline: Description of how the features were computed.

    Raises:
        UserError: There are fewer than two images.
    """
    n, mu, scatter = 0, np.zeros(1), np.zeros((1, 1))  # broadcast to (F,) and (F, F) by the first batch
    for batch in features:
        batch = np.asarray(batch, np.float64)
        # Centering each batch with its own mean avoids cancellation between large numbers (Chan et al. 1979).
        mean = batch.mean(0)
        centered, apart, total = batch - mean, mean - mu, n + len(batch)
        scatter = scatter + (centered.T @ centered + np.outer(apart, apart) * (n * len(batch) / total))
        mu, n = mu + apart * (len(batch) / total), total
    if n < 2:
        raise UserError(f"Feature statistics need at least 2 images, but there are {n}. Add images to the set.")
    return Statistics(mu, scatter / (n - 1), n, dict(pipeline))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Computes the squared Fréchet distance between two Gaussians.

    With S = L Lᵀ, tr (S_1 S_2)^½ is the sum of the singular values of L_1ᵀ L_2. Unlike the matrix square root of the
    product, this is also exact for covariances without full rank, which occur with few images.
    """
    from scipy.linalg import eigh, svdvals

    def factor(sigma: np.ndarray) -> np.ndarray:
        """Returns L (F, rank) with sigma = L Lᵀ."""
        values, vectors = eigh(sigma)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])

    product = factor(one.sigma).T @ factor(other.sigma)
    overlap = svdvals(product).sum() if product.size else 0.0
    apart = one.mu - other.mu
    return float(apart @ apart + np.trace(one.sigma) + np.trace(other.sigma) - 2 * overlap)


class FidNetwork:
    """The FID network on one or several devices.

    Attributes:
        pipeline: Description of the network and the preprocessing.
    """

    def __init__(self, params: inception.Params, fingerprint: str, sharding: jax.sharding.Sharding | None = None):
        """Compiles the network.

        Args:
            params: Parameters from `inception.load_params`.
            fingerprint: Fingerprint of the weights file from `inception.load_params`.
            sharding: Split of a batch over devices; by default one device.
        """
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
        """Computes features (b, 2048) float32 of images (b, H, W, 3) uint8."""
        return np.asarray(self._apply(self._params, images))

    def statistics(self, images: Images, **pipeline: Any) -> Statistics:
        """Computes the statistics of a set of images and records `pipeline` with them."""
        size = BATCH_SIZE * self._devices.count
        features = (self(fill_batch(batch, size))[: len(batch)] for batch in images.batches(size))
        return statistics(features, self.pipeline | pipeline)


def fid(images: Images, network: FidNetwork, reference: Statistics, warn: Callable[[str], object]) -> Measure:
    """Computes the FID of a set of images.

    Args:
        images: Generated images.
        network: The FID network.
        reference: Statistics of the real images.
        warn: Called with a warning if there are too few generated or real images.

    Raises:
        UserError: The reference was computed with another network.
    """
    theirs = reference.pipeline.get("network", UNKNOWN)
    if theirs not in (UNKNOWN, network.pipeline["network"]):
        raise UserError(
            f"The reference statistics were computed with another network ({theirs}), not with "
            f"{network.pipeline['network']}. Set --reference to the folder of real images to recompute them."
        )
    for n, kind in ((len(images), "generated"), (reference.n or ENOUGH, "real")):
        if n < ENOUGH:
            warn(
                f"FID with {n:,} {kind} images is overestimated, because the covariance does not have full rank with "
                f"fewer than {ENOUGH:,} images. Compare it only with FIDs of the same number of images."
            )
    ours, side = network.statistics(images), next(images.batches(1)).shape[1]
    differing = {k: v for k, v in reference.pipeline.items() if k not in ours.pipeline or v != ours.pipeline[k]}
    pipeline = {
        **ours.pipeline, "statistics": "float64, n - 1", "generated images": f"{len(images)}, {side} px",
        "reference": {"images": reference.n or UNKNOWN, **differing},
    }  # fmt: skip
    return Measure("fid", frechet_distance(ours, reference), "lower", pipeline)


def save_statistics(path: str | Path, given: Statistics) -> None:
    """Writes statistics and their pipeline to an .npz file atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=given.mu, sigma=given.sigma, n=given.n, pipeline=json.dumps(dict(given.pipeline)))


def load_statistics(path: str | Path, features: int = inception.FEATURES) -> Statistics:
    """Reads statistics from an .npz file, which may be from another program and contain only mu and sigma.

    Args:
        path: The .npz file.
        features: Number of features F.

    Raises:
        UserError: The file is missing, damaged or not a statistics file.
    """
    if not Path(path).is_file():
        raise UserError(f"Statistics file {path} not found. Set --reference to a .npz file or a folder of real images.")
    try:
        with np.load(path) as saved:
            found = {name: saved[name] for name in saved.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged or not a statistics file (.npz). Set --reference to the folder of real images to "
            "recompute it."
        ) from error
    mu, sigma = (np.asarray(found.get(name, np.zeros(0))) for name in ("mu", "sigma"))
    if mu.shape != (features,) or sigma.shape != (features, features):
        raise UserError(
            f"{path} is not a statistics file for {features} features: mu has the shape {mu.shape} and sigma "
            f"{sigma.shape}, instead of ({features},) and ({features}, {features}). Set --reference to another file or "
            "to a folder of real images."
        )
    try:
        pipeline = json.loads(str(found["pipeline"])) if "pipeline" in found else {"network": UNKNOWN}
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: its pipeline can't be read. Set --reference to the folder of real images to recompute "
            "it."
        ) from error
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), int(found.get("n", 0)), pipeline)
