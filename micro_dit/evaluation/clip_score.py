"""CLIP score and CMMD, with any CLIP checkpoint that transformers can load.

CLIP score (Hessel et al. 2021, arXiv 2104.08718) is the mean of 100·max(cosine, 0) between the embeddings of each image
and its prompt. CMMD (Jayasumana et al. 2024, arXiv 2401.09603) is the maximum mean discrepancy between the CLIP
embeddings of generated and real images. Unlike FID, it does not assume Gaussian features and needs fewer images.
"""

import contextlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from micro_dit.errors import UserError
from micro_dit.evaluation.image_sets import Images
from micro_dit.evaluation.measures import Measure
from micro_dit.files import hash_arrays, replacing

BATCH_SIZE = 32
SIGMA, SCALE = 10.0, 1000.0  # kernel bandwidth and scale of CMMD
ROWS = 1024  # rows of the kernel matrix in memory at once


class Clip:
    """A CLIP model in PyTorch, on a GPU if PyTorch finds one, otherwise on the CPU.

    Attributes:
        pipeline: Description of the network and the preprocessing.
    """

    def __init__(self, name: str):
        """Loads a CLIP checkpoint from a folder or a repository on the Hugging Face Hub.

        Raises:
            UserError: A package is missing, or there is no CLIP model of this name.
        """
        try:
            import torch
            from transformers import AutoConfig, AutoTokenizer, CLIPModel
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        except ImportError as error:
            raise UserError(
                f"CLIP score and CMMD need PyTorch and transformers ({error}). Run: pip install torch "
                "'transformers>=5'."
            ) from error
        try:
            with _quiet():
                config = AutoConfig.from_pretrained(name)
                if config.model_type != "clip":
                    raise UserError(
                        f"'{name}' has the model type {config.model_type!r}, but a CLIP model with image and text "
                        "encoder is needed. Set --clip to one, such as openai/clip-vit-large-patch14."
                    )
                self._model = CLIPModel.from_pretrained(name, config=config).eval().requires_grad_(False)
                self._tokenizer = AutoTokenizer.from_pretrained(name)
                self._processor = CLIPImageProcessorPil.from_pretrained(name)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"The CLIP model '{name}' can't be loaded ({reason}). Set --clip to a folder, or to owner/repository "
                "on the Hugging Face Hub."
            ) from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(self._device)
        self._embedded: tuple[Images | None, np.ndarray] = None, np.zeros((0, 0))
        weights = sorted(self._model.state_dict().items())
        digest = hash_arrays((key, tensor.detach().cpu().reshape(-1).view(torch.uint8)) for key, tensor in weights)
        processor = self._processor
        self.pipeline = {
            "network": f"{Path(name).name if Path(name).is_dir() else name}, sha256 {digest[:12]}",
            "preprocessing": f"uint8, {processor.size} by Pillow's filter {int(processor.resample)}, crop "
            f"{processor.crop_size if processor.do_center_crop else 'none'}, the checkpoint's mean and std",
        }  # fmt: skip

    def of_images(self, images: Images) -> np.ndarray:
        """Returns (n, F) float32 image embeddings of unit length. The embeddings of the last images are cached."""
        if images is not self._embedded[0]:
            parts = []
            for batch in images.batches(BATCH_SIZE):
                inputs = self._processor(list(batch), return_tensors="pt", input_data_format="channels_last")
                parts.append(_unit(self._model.get_image_features(inputs["pixel_values"].to(self._device))))
            self._embedded = images, np.concatenate(parts)
        return self._embedded[1]

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (n, F) float32 text embeddings of unit length. Texts that are too long are truncated."""
        most = self._model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = list(texts[start : start + BATCH_SIZE])
            tokens = self._tokenizer(batch, padding=True, truncation=True, max_length=most, return_tensors="pt")
            parts.append(_unit(self._model.get_text_features(**tokens.to(self._device))))
        return np.concatenate(parts)


def clip_score(clip: Clip, images: Images, embeddings: np.ndarray) -> Measure:
    """Computes the CLIP score of images with prompts.

    Args:
        clip: The CLIP model.
        images: Images with prompts.
        embeddings: (n, F) float32, unit CLIP embeddings of the images.

    Raises:
        UserError: The images have no prompts.
    """
    if len(images.prompts) != len(images):
        counts = f"{len(images)} images have {len(images.prompts)} prompts"
        raise UserError(f"CLIP score needs a prompt for each image, but {counts}. Remove clip_score from --metrics.")
    distinct = list(dict.fromkeys(images.prompts))
    by_prompt = dict(zip(distinct, clip.of_texts(distinct), strict=True))
    cosines = np.array([image @ by_prompt[p] for image, p in zip(embeddings, images.prompts, strict=True)])
    scores = 100 * np.maximum(cosines.astype(np.float64), 0)
    pipeline = clip.pipeline | {
        "formula": "100·max(cosine, 0), mean over images; prompts without a prefix", "images": len(images),
        "standard error": round(float(scores.std(ddof=1) / np.sqrt(len(scores))), 4) if len(scores) > 1 else None,
    }  # fmt: skip
    return Measure("clip_score", float(scores.mean()), "higher", pipeline)


def cmmd(clip: Clip, embeddings: np.ndarray, reference: np.ndarray, about_reference: str) -> Measure:
    """Computes CMMD between generated and real images.

    Args:
        clip: The CLIP model.
        embeddings: (n, F) float32, unit CLIP embeddings of the generated images.
        reference: (m, F) float32, unit CLIP embeddings of the real images.
        about_reference: Name of the set of real images, for the pipeline.

    Raises:
        UserError: The two have different numbers of features.
    """
    if reference.shape[1:] != embeddings.shape[1:]:
        raise UserError(
            f"The CLIP embeddings of the reference have {reference.shape[1]} features, but "
            f"{clip.pipeline['network']} has {embeddings.shape[1]}. Set --clip_reference to embeddings from this model "
            "or to a folder of images."
        )
    pipeline = clip.pipeline | {
        "kernel": f"Gaussian, sigma {SIGMA:g}", "estimate": f"mean over all pairs, times {SCALE:g}",
        "images": len(embeddings), "reference": f"{len(reference)} images of {about_reference}",
    }  # fmt: skip
    return Measure("cmmd", mmd(embeddings, reference), "lower", pipeline)


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Computes SCALE times the squared maximum mean discrepancy, with the kernel k(a, b) = exp(-‖a - b‖²/2σ²).

    Args:
        x: (n, F), first set of embeddings.
        y: (m, F), second set of embeddings.
    """

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.astype(np.float64), b.astype(np.float64)
        total, norms = 0.0, (b * b).sum(1)
        for start in range(0, len(a), ROWS):
            rows = a[start : start + ROWS]
            squared = (rows * rows).sum(1)[:, None] + norms - 2 * rows @ b.T
            total += float(np.exp(-np.maximum(squared, 0) / (2 * SIGMA**2)).sum())
        return total / (len(a) * len(b))

    return SCALE * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def save_embeddings(path: str | Path, embeddings: np.ndarray, pipeline: dict[str, Any]) -> None:
    """Writes embeddings and their pipeline to an .npz file atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, clip=embeddings, pipeline=json.dumps(pipeline))


def load_embeddings(path: str | Path, clip: Clip) -> np.ndarray:
    """Reads embeddings from an .npz file.

    Raises:
        UserError: The file is missing, is not a file of embeddings, or was computed with another CLIP model.
    """
    try:
        with np.load(path) as saved:
            embeddings, pipeline = saved["clip"], json.loads(str(saved["pipeline"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a file of CLIP embeddings (.npz). Set --clip_reference to one, or to a folder of images."
        ) from error
    theirs, ours = pipeline.get("network"), clip.pipeline["network"]
    if theirs != ours:
        raise UserError(
            f"The embeddings in {path} were computed with {theirs}, but --clip is {ours}. Set --clip_reference to "
            "embeddings from this model or to a folder of images."
        )
    return np.asarray(embeddings, np.float32)


def _unit(features: Any) -> np.ndarray:
    """Returns features as (n, F) float32 rows of unit length. Newer versions of transformers wrap them in an object."""
    features = getattr(features, "pooler_output", features)
    return (features / features.norm(dim=-1, keepdim=True)).float().cpu().numpy()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and warnings of transformers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
