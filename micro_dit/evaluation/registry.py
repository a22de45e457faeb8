"""The metrics of image sets by name.

To add a metric, write a class that implements `Metric` and add it to METRICS.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from micro_dit.errors import UserError
from micro_dit.evaluation import inception
from micro_dit.evaluation.clip_score import Clip, clip_score, cmmd, load_embeddings, save_embeddings
from micro_dit.evaluation.domain import domain_measures
from micro_dit.evaluation.fid import FidNetwork, fid, load_statistics, save_statistics
from micro_dit.evaluation.image_sets import Images, image_folder
from micro_dit.evaluation.measures import Measure
from micro_dit.files import hash_text

T = TypeVar("T")
MeasureImages = Callable[[Images], list[Measure]]


@dataclasses.dataclass(frozen=True)
class MetricInputs:
    """Settings and data of metrics. Each metric uses only some of them.

    Attributes:
        side: Side of the images in pixels. Real images are cropped to it.
        reference: For 'fid': a folder of real images, or a statistics file.
        clip_reference: For 'cmmd': a folder of real images, or a file of embeddings; by default `reference`.
        only: Names of the image files to use in reference folders; by default all.
        clip: For 'clip_score' and 'cmmd': a CLIP checkpoint.
        inception: For 'fid': the weights file; by default the one in PyTorch's hub cache.
        real: For 'domain': 'latent_mean' and 'text' of real images.
        image_encoder: For 'domain': the image encoder that computed the real latents.
        cache: Folder for cached features of reference folders. None disables the cache.
        sharding: Split of a batch over the devices of this process.
        say: Prints a progress line.
        warn: Prints a warning.
    """

    side: int
    reference: str = ""
    clip_reference: str = ""
    only: Sequence[str] | None = None
    clip: str = ""
    inception: str = ""
    real: Mapping[str, Any] | None = None
    image_encoder: Any = None
    cache: Path | None = None
    sharding: jax.sharding.Sharding | None = None
    say: Callable[[str], object] = lambda text: None
    warn: Callable[[str], object] = lambda text: None

    @functools.cached_property
    def clip_model(self) -> Clip:
        """The CLIP model, loaded once for all metrics that use it."""
        if not self.clip:
            raise UserError(
                "CLIP score and CMMD need a CLIP model. Set --clip to one, such as openai/clip-vit-large-patch14 or a "
                "folder."
            )
        return Clip(self.clip)

    def features_of_reference(
        self, kind: str, reference: str, pipeline: Mapping[str, Any], compute: Callable[[Images], T],
        load: Callable[[str | Path], T], save: Callable[[Path, T], object],
    ) -> T:  # fmt: skip
        """Returns the features of the real images, which are read from a file or the cache, or computed and cached.

        Args:
            kind: Kind of the features, 'fid' or 'clip', for messages and the name of the cached file.
            reference: A folder of images, or a file of features (.npz).
            pipeline: Description of how the features are computed; part of the cache key.
            compute: Computes features from images.
            load: Reads features from a file.
            save: Writes features to a file.

        Raises:
            UserError: The reference is missing or can't be read.
        """
        if not reference:
            raise UserError(
                f"The metric {'cmmd' if kind == 'clip' else kind} compares with real images. Set --reference to a "
                "folder of real images or a file of their features (.npz)."
            )
        if reference.endswith(".npz"):
            return load(reference)
        real, kept = image_folder(reference, self.side, self.only), None
        if self.cache is not None:
            files = [f"{file.relative_to(reference)} {file.stat().st_size}" for file in real.files]
            digest = hash_text("\n".join([*files, str(self.side), str(dict(pipeline))]))[:12]
            kept = self.cache / f"{kind}_{Path(reference).name}_{len(real)}_{self.side}px_{digest}.npz"
            if kept.exists():
                return load(kept)
        self.say(f"computing {kind} features of {len(real):,} real images in {reference}")
        features = compute(real)
        if kept is not None:
            save(kept, features)
        return features

    @property
    def crop(self) -> str:
        """Description of how real images are cropped."""
        return f"smaller side to {self.side} px (Pillow, bicubic), center crop"


class Metric(Protocol):
    """A metric of image sets. The constructor loads networks and references, once for all sets that are measured."""

    def __init__(self, inputs: MetricInputs):
        """Loads networks and references; raises UserError if an input is missing or invalid."""

    def __call__(self, images: Images) -> list[Measure]:
        """Measures a set of images."""


class FrechetInceptionDistance:
    """FID between generated images and a reference."""

    def __init__(self, inputs: MetricInputs):
        network = FidNetwork(*inception.load_params(inception.find_weights(inputs.inception)), inputs.sharding)
        self._network, self._warn = network, inputs.warn
        self._reference = inputs.features_of_reference(
            "fid", inputs.reference, network.pipeline,
            lambda real: network.statistics(real, set=Path(inputs.reference).name, crop=inputs.crop),
            load_statistics, save_statistics,
        )  # fmt: skip

    def __call__(self, images: Images) -> list[Measure]:
        """Measures a set of images."""
        return [fid(images, self._network, self._reference, self._warn)]


class ClipMaximumMeanDiscrepancy:
    """CMMD between generated images and a reference."""

    def __init__(self, inputs: MetricInputs):
        self._clip, self._name = clip, name = inputs.clip_model, inputs.clip_reference or inputs.reference
        self._reference = inputs.features_of_reference(
            "clip", name, clip.pipeline, clip.of_images, lambda path: load_embeddings(path, clip),
            lambda path, embeddings: save_embeddings(path, embeddings, clip.pipeline | {"crop": inputs.crop}),
        )  # fmt: skip

    def __call__(self, images: Images) -> list[Measure]:
        """Measures a set of images."""
        return [cmmd(self._clip, self._clip.of_images(images), self._reference, self._name)]


class ClipScore:
    """CLIP score between generated images and their prompts."""

    def __init__(self, inputs: MetricInputs):
        self._clip = inputs.clip_model

    def __call__(self, images: Images) -> list[Measure]:
        """Measures a set of images."""
        return [clip_score(self._clip, images, self._clip.of_images(images))]


class Domain:
    """Caption retrieval and latent Fréchet distance with respect to the images of the run's shards."""

    def __init__(self, inputs: MetricInputs):
        if inputs.real is None or inputs.image_encoder is None:
            raise UserError("The domain metric needs shards. Set --shards, or remove domain from --metrics.")
        self._real, self._encoder, self._warn = inputs.real, inputs.image_encoder, inputs.warn

    def __call__(self, images: Images) -> list[Measure]:
        """Measures a set of images."""
        return domain_measures(images, self._real, self._encoder, self._warn)


METRICS: dict[str, type[Metric]] = {
    "fid": FrechetInceptionDistance, "cmmd": ClipMaximumMeanDiscrepancy, "clip_score": ClipScore, "domain": Domain,
}  # fmt: skip


def load_metrics(names: Sequence[str], inputs: MetricInputs) -> MeasureImages:
    """Loads metrics by name and returns a function that measures a set of images.

    Raises:
        UserError: A metric is unknown or repeated, or lacks an input.
    """
    check_names(names, tuple(METRICS))
    metrics = [METRICS[name](inputs) for name in names]
    return lambda images: [measure for metric in metrics for measure in metric(images)]


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError if a metric is unknown or repeated."""
    for name in names:
        if name not in known:
            raise UserError(f"Unknown metric {name!r}. Choose from {', '.join(known)}.")
    if len(set(names)) < len(names):
        raise UserError(f"The list of metrics {', '.join(names)} has duplicates. Name each metric once.")
