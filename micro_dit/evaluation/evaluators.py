"""The metrics of image sets: what each needs is loaded, and refused, before the first image is drawn."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.errors import UserError
from micro_dit.evaluation.image_sets import FromFiles, Images, image_folder
from micro_dit.evaluation.measures import Measure

OF_IMAGES = ("fid", "cmmd", "clip_score", "domain")


def check_names(metrics: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError if a metric is unknown or named twice."""
    for name in metrics:
        if name not in known:
            raise UserError(f"there is no metric {name!r}; choose some of {', '.join(known)}.")
    if len(set(metrics)) < len(metrics):
        raise UserError(f"a metric is named twice: {', '.join(metrics)}.")


class Evaluators:
    """Measures sets of images by some of OF_IMAGES."""

    def __init__(
        self,
        metrics: Sequence[str],
        *,
        side: int,
        reference: str = "",
        clip_reference: str = "",
        only: Iterable[str] | None = None,
        clip: str = "",
        inception: str = "",
        real: Mapping[str, Any] | None = None,
        image_encoder: Any = None,
        cache: Path | None = None,
        sharding: jax.sharding.Sharding | None = None,
        say: Callable[[str], object] = lambda text: None,
        warn: Callable[[str], object] = lambda text: None,
    ):
        """Loads networks and references.

        Args:
            metrics: names.
            side: of the images in pixels; real ones are cropped to it.
            reference: for 'fid': a folder of real images, or a statistics file.
            clip_reference: for 'cmmd': a folder of real images, or a file of embeddings; by default the reference.
            only: names of the files in folders that are the reference; all by default.
            clip: for 'clip_score' and 'cmmd': a CLIP checkpoint.
            inception: for 'fid': the file of weights; by default the one in PyTorch's hub cache.
            real: for 'domain': 'latent_mean' and 'text' of real images.
            image_encoder: for 'domain'.
            cache: where what was computed of a folder is kept; None keeps nothing.
            sharding: how batches are split over devices of this process.
            say, warn: are told what is going on, and what should be known of the numbers.

        Raises:
            UserError: something that a metric needs is missing, or is another one.
        """
        check_names(metrics, OF_IMAGES)
        self._metrics, self._warn, self._cache, self._say = tuple(metrics), warn, cache, say
        self._only = None if only is None else list(only)
        self._real, self._image_encoder, self._side = real, image_encoder, side
        if "domain" in metrics and (real is None or image_encoder is None):
            raise UserError("the domain metric needs the run's shards; leave out 'domain' where there are none.")
        if {"clip_score", "cmmd"} & set(metrics):
            from micro_dit.evaluation.clip_score import Clip

            if not clip:
                raise UserError(
                    "CLIP score and CMMD need a CLIP model: give --clip=openai/clip-vit-large-patch14, or a folder."
                )
            self._clip = Clip(clip)
        if "fid" in metrics:
            from micro_dit.evaluation import inception as network
            from micro_dit.evaluation.fid import FidNetwork

            weights = network.find_weights(inception)
            self._network = FidNetwork(*network.load_params(weights), sharding)
            self._statistics = self._fid_reference(_given(reference, "fid"))
        if "cmmd" in metrics:
            self._about_clip_reference = _given(clip_reference or reference, "cmmd")
            self._embeddings = self._clip_reference(self._about_clip_reference)

    def __call__(self, images: Images) -> list[Measure]:
        """All metrics of a set of images."""
        from micro_dit.evaluation.clip_score import clip_score, cmmd
        from micro_dit.evaluation.domain import domain_measures
        from micro_dit.evaluation.fid import fid

        measures: list[Measure] = []
        embeddings = self._clip.of_images(images) if {"clip_score", "cmmd"} & set(self._metrics) else None
        for name in self._metrics:
            if name == "fid":
                measures.append(fid(images, self._network, self._statistics, self._warn))
            elif name == "domain":
                assert self._real is not None
                measures += domain_measures(images, self._real, self._image_encoder, self._warn)
            else:
                assert embeddings is not None
                if name == "clip_score":
                    measures.append(clip_score(self._clip, images, embeddings))
                else:
                    measures.append(cmmd(self._clip, embeddings, self._embeddings, self._about_clip_reference))
        return measures

    def _fid_reference(self, reference: str) -> Any:
        from micro_dit.evaluation.fid import load_statistics, save_statistics

        if reference.endswith(".npz"):
            return load_statistics(reference)
        real = image_folder(reference, self._side, self._only)
        kept = self._kept("fid", reference, real, self._network.pipeline)
        if kept is not None and kept.exists():
            return load_statistics(kept)
        self._say(f"statistics of {len(real):,} real images in {reference}")
        found = self._network.statistics(real, set=Path(reference).name, crop=_crop(self._side))
        if kept is not None:
            save_statistics(kept, found)
        return found

    def _clip_reference(self, reference: str) -> np.ndarray:
        from micro_dit.evaluation.clip_score import load_embeddings, save_embeddings

        if reference.endswith(".npz"):
            return load_embeddings(reference, self._clip)
        real = image_folder(reference, self._side, self._only)
        kept = self._kept("clip", reference, real, self._clip.pipeline)
        if kept is not None and kept.exists():
            return load_embeddings(kept, self._clip)
        self._say(f"CLIP embeddings of {len(real):,} real images in {reference}")
        embeddings = self._clip.of_images(real)
        if kept is not None:
            save_embeddings(kept, embeddings, self._clip.pipeline | {"crop": _crop(self._side)})
        return embeddings

    def _kept(self, kind: str, reference: str, real: FromFiles, pipeline: Mapping[str, Any]) -> Path | None:
        """The file for what was computed of these images: its name changes with files, their sizes, crop, network."""
        if self._cache is None:
            return None
        files = [f"{file.relative_to(reference)} {file.stat().st_size}" for file in real.files]
        digest = hashlib.sha256("\n".join([*files, str(self._side), str(dict(pipeline))]).encode()).hexdigest()[:12]
        return self._cache / f"{kind}_{Path(reference).name}_{len(real)}_{self._side}px_{digest}.npz"


def _given(reference: str, metric: str) -> str:
    if not reference:
        raise UserError(
            f"{metric} compares with real images: give --reference, a folder of them or a file made from one (.npz)."
        )
    return reference


def _crop(side: int) -> str:
    return f"smaller side to {side} px (Pillow, bicubic), center crop"
