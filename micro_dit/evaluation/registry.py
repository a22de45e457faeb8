"""The metrics of image sets, by name.

A new metric is a class here, which loads what it needs when it is made and then measures sets of images, and a line in
METRICS.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from micro_dit.errors import UserError
from micro_dit.evaluation import inception
from micro_dit.evaluation.clip_score import Clip, clip_score, cmmd, load_embeddings, save_embeddings
from micro_dit.evaluation.domain import domain_measures
from micro_dit.evaluation.fid import FidNetwork, fid, load_statistics, save_statistics
from micro_dit.evaluation.image_sets import Images, image_folder
from micro_dit.evaluation.measures import Measure
from micro_dit.files import hash_text

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class MetricInputs:
    """Settings and data of metrics; each metric uses only its own.

    Attributes:
        side: Side of the images in pixels; real images are cropped to it.
        reference: For 'fid': a folder of real images, or a statistics file.
        clip_reference: For 'cmmd': a folder of real images, or a file of embeddings; by default the reference.
        only: File names of the reference's images; by default all in the folder.
        clip: For 'clip_score' and 'cmmd': a CLIP checkpoint.
        inception: For 'fid': the file of weights; by default the one in PyTorch's hub cache.
        real: For 'domain': 'latent_mean' and 'text' of real images.
        image_encoder: For 'domain': the image encoder of the real latents.
        cache: Folder that keeps features of reference folders; None keeps nothing.
        sharding: Split of a batch over the devices of this process.
        say: Prints a line of progress.
        warn: Prints a remark on the numbers.
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
    def clip_features(self) -> "ClipFeatures":
        """The CLIP model, loaded once for all metrics that use it."""
        if not self.clip:
            raise UserError(
                "CLIP score and CMMD need a CLIP model: give --clip=openai/clip-vit-large-patch14, or a folder."
            )
        return ClipFeatures(self.clip)

    def features_of_reference(
        self, kind: str, reference: str, pipeline: Mapping[str, Any], compute: Callable[[Images], T],
        load: Callable[[str | Path], T], save: Callable[[Path, T], object],
    ) -> T:  # fmt: skip
        """Returns the features of the real images: from a file, the cache, or computed and cached.

        Args:
            kind: Kind of the features, for messages and the name of the cached file.
            reference: A folder of images, or a file of features (.npz).
            pipeline: How the features are computed; part of the cache key.
            compute: Computes the features.
            load: Reads a file of features.
            save: Writes one.

        Raises:
            UserError: There are no images or no features in the reference.
        """
        if reference.endswith(".npz"):
            return load(reference)
        real, kept = image_folder(reference, self.side, self.only), None
        if self.cache is not None:
            files = [f"{file.relative_to(reference)} {file.stat().st_size}" for file in real.files]
            digest = hash_text("\n".join([*files, str(self.side), str(dict(pipeline))]))[:12]
            kept = self.cache / f"{kind}_{Path(reference).name}_{len(real)}_{self.side}px_{digest}.npz"
            if kept.exists():
                return load(kept)
        self.say(f"{kind} features of {len(real):,} real images in {reference}")
        features = compute(real)
        if kept is not None:
            save(kept, features)
        return features

    @property
    def crop(self) -> str:
        """How real images are cropped."""
        return f"smaller side to {self.side} px (Pillow, bicubic), center crop"


class ClipFeatures:
    """A CLIP model, and its embeddings of the images that are being measured."""

    def __init__(self, name: str):
        """Loads the model; raises UserError if that is impossible."""
        self.clip = Clip(name)
        self._images: Images | None = None
        self._embeddings = np.zeros((0, 0))

    def __call__(self, images: Images) -> np.ndarray:
        """Returns embeddings (n, F); those of the same images again are not computed twice."""
        if images is not self._images:
            self._images, self._embeddings = images, self.clip.of_images(images)
        return self._embeddings


class Metric(Protocol):
    """A metric of image sets.

    Raises:
        UserError: Something that the metric needs is missing; before the first image is sampled.
    """

    def __init__(self, inputs: MetricInputs): ...

    def __call__(self, images: Images) -> Sequence[Measure]:
        """Measures a set of images."""


class Fid:
    """The Fréchet inception distance."""

    def __init__(self, inputs: MetricInputs):
        """Loads the network and the statistics of the reference."""
        network = FidNetwork(*inception.load_params(inception.find_weights(inputs.inception)), inputs.sharding)
        self._network, self._warn, reference = network, inputs.warn, _required(inputs.reference, "fid")
        self.reference = inputs.features_of_reference(
            "fid", reference, network.pipeline,
            lambda real: network.statistics(real, set=Path(reference).name, crop=inputs.crop),
            load_statistics, save_statistics,
        )  # fmt: skip

    def __call__(self, images: Images) -> Sequence[Measure]:
        """Measures a set of images."""
        return [fid(images, self._network, self.reference, self._warn)]


class Cmmd:
    """The maximum mean discrepancy between CLIP embeddings."""

    def __init__(self, inputs: MetricInputs):
        """Loads the CLIP model and the embeddings of the reference."""
        self._features, self._about = inputs.clip_features, _required(inputs.clip_reference or inputs.reference, "cmmd")
        clip = self._features.clip
        self._reference = inputs.features_of_reference(
            "clip", self._about, clip.pipeline, clip.of_images, lambda path: load_embeddings(path, clip),
            lambda path, embeddings: save_embeddings(path, embeddings, clip.pipeline | {"crop": inputs.crop}),
        )  # fmt: skip

    def __call__(self, images: Images) -> Sequence[Measure]:
        """Measures a set of images."""
        return [cmmd(self._features.clip, self._features(images), self._reference, self._about)]


class ClipScore:
    """The similarity between images and their prompts."""

    def __init__(self, inputs: MetricInputs):
        """Loads the CLIP model."""
        self._features = inputs.clip_features

    def __call__(self, images: Images) -> Sequence[Measure]:
        """Measures a set of images with prompts."""
        return [clip_score(self._features.clip, images, self._features(images))]


class Domain:
    """Caption retrieval and the latent Fréchet distance, for images of a run's own shards."""

    def __init__(self, inputs: MetricInputs):
        """Checks that there are real images."""
        if inputs.real is None or inputs.image_encoder is None:
            raise UserError("the domain metric needs the run's shards; leave out 'domain' where there are none.")
        self._measure = functools.partial(
            domain_measures, real=inputs.real, image_encoder=inputs.image_encoder, warn=inputs.warn
        )

    def __call__(self, images: Images) -> Sequence[Measure]:
        """Measures a set of images whose prompts are captions of the shards."""
        return self._measure(images)


METRICS: dict[str, type[Metric]] = {"fid": Fid, "cmmd": Cmmd, "clip_score": ClipScore, "domain": Domain}


def load_metrics(names: Sequence[str], inputs: MetricInputs) -> Callable[[Images], list[Measure]]:
    """Loads metrics by name and returns the function that measures a set of images.

    Raises:
        UserError: A metric is unknown or named twice, or something that it needs is missing.
    """
    check_names(names, tuple(METRICS))
    metrics = [METRICS[name](inputs) for name in names]
    return lambda images: [measure for metric in metrics for measure in metric(images)]


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError if a metric is unknown or named twice."""
    for name in names:
        if name not in known:
            raise UserError(f"there is no metric {name!r}; choose some of {', '.join(known)}.")
    if len(set(names)) < len(names):
        raise UserError(f"a metric is named twice: {', '.join(names)}.")


def _required(reference: str, metric: str) -> str:
    """Returns the reference; raises UserError if there is none."""
    if not reference:
        raise UserError(
            f"{metric} compares with real images: give --reference, a folder of them or a file made from one (.npz)."
        )
    return reference
