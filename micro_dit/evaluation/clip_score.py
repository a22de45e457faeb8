"""CLIP score, and CMMD, with any CLIP checkpoint that transformers can load.

CLIP score (Hessel et al. 2021, arXiv 2104.08718): how similar an image and its prompt are, 100·max(cosine, 0), on
average. CMMD (Jayasumana et al. 2024, arXiv 2401.09603): maximum mean discrepancy between the CLIP embeddings of
generated and of real images. It takes the embeddings for no Gaussians, and needs fewer images than FID.
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
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
ROWS = 1024  # of the kernel at once


class Clip:
    """A CLIP model's two towers, in torch, on a GPU that torch knows or on the CPU; `pipeline` describes both."""

    def __init__(self, name: str):
        """Loads `name`, a folder or a repository on the Hugging Face hub; raises UserError if that fails."""
        try:
            import torch
            from transformers import AutoConfig, AutoTokenizer, CLIPModel
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        except ImportError as error:
            raise UserError(f"CLIP score and CMMD need: pip install torch 'transformers>=5' ({error}).") from error
        try:
            with _quiet():
                config = AutoConfig.from_pretrained(name)
                if config.model_type != "clip":
                    raise UserError(f"'{name}' is a {config.model_type!r}, not a CLIP model with both towers.")
                self._model = CLIPModel.from_pretrained(name, config=config).eval().requires_grad_(False)
                self._tokenizer = AutoTokenizer.from_pretrained(name)
                self._processor = CLIPImageProcessorPil.from_pretrained(name)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            message = f"no CLIP model at '{name}' ({reason}): give a folder, or owner/repository on the hub."
            raise UserError(message) from error
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
        """Embeddings (n, F) float32 of unit length; those of the same images again are not computed twice."""
        if images is not self._embedded[0]:
            parts = []
            for batch in images.batches(BATCH_SIZE):
                inputs = self._processor(list(batch), return_tensors="pt", input_data_format="channels_last")
                parts.append(_unit(self._model.get_image_features(inputs["pixel_values"].to(self._device))))
            self._embedded = images, np.concatenate(parts)
        return self._embedded[1]

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (n, F) float32 of unit length; longer texts than the tower takes are cut."""
        most = self._model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = list(texts[start : start + BATCH_SIZE])
            tokens = self._tokenizer(batch, padding=True, truncation=True, max_length=most, return_tensors="pt")
            parts.append(_unit(self._model.get_text_features(**tokens.to(self._device))))
        return np.concatenate(parts)


def clip_score(clip: Clip, images: Images, embeddings: np.ndarray) -> Measure:
    """The CLIP score of images, by their embeddings, with their prompts; raises UserError if they have none."""
    if len(images.prompts) != len(images):
        raise UserError("the CLIP score needs a prompt for each image.")
    distinct = list(dict.fromkeys(images.prompts))
    by_prompt = dict(zip(distinct, clip.of_texts(distinct), strict=True))
    cosines = np.array([image @ by_prompt[p] for image, p in zip(embeddings, images.prompts, strict=True)])
    scores = 100 * np.maximum(cosines.astype(np.float64), 0)
    pipeline = clip.pipeline | {
        "formula": "100·max(cosine, 0), mean over images; no words are put before the prompt", "images": len(images),
        "standard error": round(float(scores.std(ddof=1) / np.sqrt(len(scores))), 4) if len(scores) > 1 else None,
    }  # fmt: skip
    return Measure("clip_score", float(scores.mean()), "higher", pipeline)


def cmmd(clip: Clip, embeddings: np.ndarray, reference: np.ndarray, about_reference: str) -> Measure:
    """CMMD between embeddings (n, F) of generated and (m, F) of real images."""
    if reference.shape[1:] != embeddings.shape[1:]:
        raise UserError(
            f"the reference has CLIP embeddings of {reference.shape[1]} numbers, {clip.pipeline['network']} gives "
            f"{embeddings.shape[1]}: make it again with this model."
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
    """Writes an .npz, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, clip=embeddings, pipeline=json.dumps(pipeline))


def load_embeddings(path: str | Path, clip: Clip) -> np.ndarray:
    """Reads embeddings; raises UserError if the file is missing, another one, or was made with another model."""
    try:
        with np.load(path) as saved:
            embeddings, pipeline = saved["clip"], json.loads(str(saved["pipeline"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no file of CLIP embeddings (.npz); give one, or a folder of images.") from error
    theirs, ours = pipeline.get("network"), clip.pipeline["network"]
    if theirs != ours:
        raise UserError(f"{path} was made with {theirs}, not with {ours}: make it again.")
    return np.asarray(embeddings, np.float32)


def _unit(features: Any) -> np.ndarray:
    """A tower's output (a tensor, or in newer transformers an object that holds it) as rows of unit length."""
    features = getattr(features, "pooler_output", features)
    return (features / features.norm(dim=-1, keepdim=True)).float().cpu().numpy()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
