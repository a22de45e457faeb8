"""CLIP score and CMMD with a tiny, randomly initialized CLIP model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from micro_dit.errors import UserError
from micro_dit.evaluation.clip_score import Clip, clip_score, cmmd, load_embeddings, mmd, save_embeddings
from micro_dit.evaluation.image_sets import InMemory
from micro_dit.evaluation.registry import MetricInputs, load_metrics

PROMPTS = [
    "a photo of the cat",
    "the photo",
    "a cat",
    "cat cat cat cat cat cat cat cat cat cat cat cat cat cat cat cat",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint written by transformers."""

    from tests.helpers.published import shake, write_clip_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = write_clip_tokenizer(folder)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": len(words) - 1,
                    "bos_token_id": len(words) - 2, "pad_token_id": len(words) - 1}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 24, "patch_size": 8}, projection_dim=16)
    model = CLIPModel(config)
    shake(model)
    model.save_pretrained(folder)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip(str(folder))


def images(n: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)


def test_clip_score_matches_transformers(folder: Path, clip: Clip) -> None:
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor([Image.fromarray(image) for image in images(4)], return_tensors="pt")["pixel_values"]
    cosines = []
    with torch.no_grad():
        for number, prompt in enumerate(PROMPTS):
            tokens = tokenizer([prompt], truncation=True, max_length=12, return_tensors="pt")
            both = model(**tokens, pixel_values=pixels[number : number + 1])
            cosines.append(float(both.logits_per_image) / float(model.logit_scale.exp()))
    embeddings = clip.of_images(InMemory(images(4)))
    texts = clip.of_texts(PROMPTS)
    np.testing.assert_allclose((embeddings * texts).sum(1), cosines, atol=1e-5)
    assert np.std(cosines) > 1e-4
    # With random weights the cosines may be negative, so both signs are tested.
    for sign in (1, -1):
        found = clip_score(clip, InMemory(images(4), PROMPTS), np.float32(sign) * embeddings)
        assert found.value == pytest.approx(np.mean([max(100 * sign * cosine, 0) for cosine in cosines]), abs=1e-3)
    assert found.better == "higher"
    assert "sha256" in found.pipeline["network"]
    with pytest.raises(UserError, match="needs a prompt for each image, but 4 images have 0 prompts"):
        clip_score(clip, InMemory(images(4)), embeddings)


def test_mmd_matches_its_formula() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((1030, 3)), 2 + generator.standard_normal((7, 3))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200).mean())

    assert mmd(x, y) == pytest.approx(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), rel=1e-9)
    assert abs(mmd(x, x)) < 1e-9
    # The kernel of a point with itself is 1, and that of two distant points is 0.
    assert mmd(np.zeros((1, 2)), np.full((1, 2), 1e3)) == pytest.approx(2000)


def test_cmmd_reference_is_computed_once_and_cached(folder: Path, clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for number, image in enumerate(images(6)):
        Image.fromarray(image).save(tmp_path / "real" / f"{number}.png")
    messages: list[str] = []
    for _ in range(2):
        inputs = MetricInputs(32, str(tmp_path / "real"), clip=str(folder), cache=tmp_path, say=messages.append)
        measure = load_metrics(["cmmd", "clip_score"], inputs)
        same, _ = measure(InMemory(images(6), PROMPTS + PROMPTS[:2]))
    assert len(messages) == 1
    assert abs(same.value) < 1e-3
    other, score = measure(InMemory(images(6, seed=1) // 3, PROMPTS + PROMPTS[:2]))
    assert other.value > same.value + 1e-3
    assert (other.name, score.name) == ("cmmd", "clip_score")
    assert other.pipeline["reference"].startswith("6 images of")


def test_other_clip_models_and_files_are_rejected(clip: Clip, tmp_path: Path) -> None:
    save_embeddings(tmp_path / "clip.npz", np.zeros((3, 16), np.float32), {"network": "another"})
    with pytest.raises(UserError, match=r"clip.npz were computed with another, but --clip is clip"):
        load_embeddings(tmp_path / "clip.npz", clip)
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UserError, match="is not a file of CLIP embeddings"):
        load_embeddings(tmp_path / "text.npz", clip)
    with pytest.raises(UserError, match="embeddings of the reference have 5 features, but clip"):
        cmmd(clip, np.zeros((2, 16)), np.zeros((2, 5)), "here")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="has the model type 't5', but a CLIP model"):
        Clip(str(tmp_path))
