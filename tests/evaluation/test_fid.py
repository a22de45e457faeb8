"""FID: the network against torch-fidelity, the distance against closed forms, and the effect of image damage."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from micro_dit.errors import UserError
from micro_dit.evaluation import inception
from micro_dit.evaluation.fid import (
    FidNetwork,
    Statistics,
    fid,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics,
)
from micro_dit.evaluation.image_sets import InMemory
from micro_dit.evaluation.registry import MetricInputs, load_metrics
from micro_dit.interop.tensor_files import write_torch
from tests.helpers.pictures import encoded
from tests.helpers.random_inception import images as two_images
from tests.helpers.random_inception import random_tensors

GOLDEN = Path(__file__).parent / "golden" / "inception_features.npz"


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors()


@pytest.fixture(scope="module")
def params(tensors: dict[str, np.ndarray]) -> inception.Params:
    return inception.fold(tensors, "here")


# ---- The network -----------------------------------------------------------------------------------------------------


def test_features_match_torch_fidelity(params: inception.Params) -> None:
    """The golden features were computed with torch-fidelity 0.4.0 in float32, with the same weights and images."""
    expected = np.load(GOLDEN)["features"]
    features = np.asarray(jax.jit(inception.features)(params, two_images()))
    assert np.abs(features - expected).max() <= 1e-4 * np.abs(expected).max()
    # The difference between the images is smaller than their common part, so it has its own tolerance.
    apart, expected_apart = features[0] - features[1], expected[0] - expected[1]
    assert np.linalg.norm(apart - expected_apart) <= 1e-3 * np.linalg.norm(expected_apart)


def test_resizing_matches_tensorflow_1() -> None:
    """Pixel i is at i·size/299, the last pixels are repeated, and there is no antialiasing."""
    ramp = np.arange(100, dtype=np.uint8)[None, None, :, None].repeat(598, 1).repeat(3, 3)
    resized = np.asarray(inception.resize(ramp))
    assert resized.shape == (1, 299, 299, 3)
    np.testing.assert_allclose(resized[0, 7, :, 1], np.minimum(np.arange(299) * 100 / 299, 99), atol=1e-4)
    rows = np.arange(598)[None, :, None, None].repeat(2, 2).repeat(3, 3) % 2 * 200
    assert np.asarray(inception.resize(rows.astype(np.uint8))).max() == 0  # only even rows are sampled


def test_other_weights_are_rejected(
    tensors: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tensors | {"Mixed_7c.branch_pool.conv.weight": np.zeros((192, 2048, 3, 3), np.float32)}
    with pytest.raises(
        UserError, match=r"not the FID network: Mixed_7c.branch_pool.conv.weight has the shape \(192, 2048, 3, 3\)"
    ):
        inception.fold(damaged, "here")
    few = {name: tensor for name, tensor in tensors.items() if name.startswith("Conv2d_1a")}
    write_torch(tmp_path / "few.pth", few)
    with pytest.raises(
        UserError, match=r"few.pth are not the FID network: Conv2d_2a_3x3.conv.weight is missing. Download https"
    ):
        inception.load_params(tmp_path / "few.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=rf"not found at {tmp_path}/hub/checkpoints/{inception.WEIGHTS}. Download https://"
    ):
        inception.find_weights()
    with pytest.raises(UserError, match=r"not found at nowhere\.pth"):
        inception.find_weights("nowhere.pth")


# ---- The distance ----------------------------------------------------------------------------------------------------


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    return Statistics(mean, covariance, 0, {})


def random_covariance(seed: int, size: int = 12) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((3 * size, size))
    return x.T @ x / len(x)


def test_frechet_distance_matches_closed_forms() -> None:
    zero, one = np.zeros(12), np.ones(12)
    diagonal = np.arange(1.0, 13.0)
    ours, theirs = gaussian(zero, np.diag(diagonal)), gaussian(2 * one, np.diag(4 * diagonal))
    # For commuting covariances, the distance is ‖mu‖² + Σ (√a - √b)².
    assert frechet_distance(ours, theirs) == pytest.approx(48 + diagonal.sum(), rel=1e-12)
    covariance = random_covariance(0)
    assert frechet_distance(gaussian(zero, covariance), gaussian(one, covariance)) == pytest.approx(12)
    scaled = gaussian(zero, 9 * covariance)
    assert frechet_distance(gaussian(zero, covariance), scaled) == pytest.approx(4 * np.trace(covariance))


def test_frechet_distance_matches_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    a, b = random_covariance(1), random_covariance(2)
    mean = np.random.default_rng(3).standard_normal(12)
    expected = mean @ mean + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(gaussian(mean, a), gaussian(0 * mean, b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(gaussian(0 * mean, b), gaussian(mean, a)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_covariances_without_full_rank() -> None:
    x = np.random.default_rng(4).standard_normal((10, 300))
    ours = statistics([x], {})
    assert abs(frechet_distance(ours, ours)) < 1e-9
    assert frechet_distance(ours, gaussian(ours.mu, 0 * ours.sigma)) == pytest.approx(np.trace(ours.sigma))


def test_statistics_are_accumulated_over_batches() -> None:
    x = 1000 + np.random.default_rng(5).standard_normal((57, 7)).astype(np.float32)
    found = statistics(np.split(x, [1, 20, 33]), {"network": "n"})
    assert found.n == 57
    assert found.mu.dtype == found.sigma.dtype == np.float64
    np.testing.assert_allclose(found.mu, x.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match="need at least 2 images, but there are 1"):
        statistics([x[:1]], {})


# ---- Sets of images --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(params: inception.Params) -> Iterator[FidNetwork]:
    """The network at a low resolution, which is fast on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "SIDE", 107)
        patch.setattr("micro_dit.evaluation.fid.BATCH_SIZE", 16)
        network = FidNetwork(params, "random")
        network(np.zeros((16, 64, 64, 3), np.uint8))  # compiled while the size is patched
        yield network


def random_images(n: int, seed: int) -> np.ndarray:
    """Smooth random color fields with an edge: (n, 64, 64, 3) uint8."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
        image = np.array(coarse.resize((64, 64), Image.Resampling.BICUBIC))
        top, left = generator.integers(4, 30, 2)
        image[top : top + 24, left : left + 24] = generator.integers(0, 256, 3)
        images.append(image)
    return np.stack(images)


def as_jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    import io

    damaged = [encoded(Image.fromarray(image), "JPEG", quality=quality) for image in images]
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in damaged])


def test_distance_increases_with_damage(network: FidNetwork) -> None:
    images, others = random_images(48, 0), random_images(48, 1)

    def of_some_features(images: np.ndarray) -> Statistics:  # with all features the test would take minutes
        return statistics([network(images[start : start + 16])[:, ::16] for start in (0, 16, 32)], {})

    real = of_some_features(images)

    def distance(found: np.ndarray) -> float:
        return frechet_distance(of_some_features(found), real)

    noise = np.random.default_rng(2).integers(0, 256, images.shape).astype(np.uint8)
    other_half, jpeg = distance(others), [distance(as_jpeg(images, quality)) for quality in (90, 30, 5)]
    assert abs(distance(images)) < 1e-3 * distance(noise)
    assert abs(distance(images)) < 1e-3
    assert other_half < distance(noise) / 5
    assert jpeg == sorted(jpeg)
    assert jpeg[0] > 0
    assert jpeg[2] > 2 * jpeg[0]


def test_fid_records_its_pipeline_and_warns_of_few_images(network: FidNetwork, tmp_path: Path) -> None:
    images, warnings = InMemory(random_images(20, 0)), list[str]()
    real = network.statistics(InMemory(random_images(33, 1)), set="val2014")
    save_statistics(tmp_path / "real.npz", real)
    measure = fid(images, network, load_statistics(tmp_path / "real.npz"), warnings.append)
    assert measure.value > 0
    assert measure.pipeline["network"] == "pt_inception-2015-12-05-6726825d, sha256 random"
    assert measure.pipeline["reference"] == {"images": 33, "set": "val2014"}
    assert measure.pipeline["generated images"] == "20, 64 px"
    assert {"preprocessing", "rounding", "statistics"} <= set(measure.pipeline)
    json.dumps(measure.pipeline)
    assert [re.findall(r"with (\d+) (\w+)", text)[0] for text in warnings] == [("20", "generated"), ("33", "real")]
    assert "not have full rank" in warnings[0]


# ---- Statistics files ------------------------------------------------------------------------------------------------


def test_wrong_statistics_files_are_rejected(network: FidNetwork, tmp_path: Path) -> None:
    zeros = Statistics(np.zeros(2048), np.eye(2048), 5, {"network": "other, sha256 0123"})
    save_statistics(tmp_path / "other.npz", zeros)
    with pytest.raises(UserError, match=r"with another network \(other, sha256 0123\), not with pt_inception"):
        fid(InMemory(random_images(2, 0)), network, load_statistics(tmp_path / "other.npz"), print)
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"small.npz is not a statistics file for 2048 features: .* shape \(3,\)"):
        load_statistics(tmp_path / "small.npz")
    (tmp_path / "text.npz").write_text("mu, sigma")
    with pytest.raises(UserError, match=r"text.npz is damaged or not a statistics file \(.npz\)"):
        load_statistics(tmp_path / "text.npz")
    with pytest.raises(UserError, match=r"Statistics file .*none.npz not found"):
        load_statistics(tmp_path / "none.npz")


def test_statistics_files_of_other_programs_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", mu=np.ones(2048), sigma=np.eye(2048))
    found = load_statistics(tmp_path / "theirs.npz")
    assert (found.n, found.pipeline) == (0, {"network": "not recorded in the file"})


@pytest.fixture
def weights(params: inception.Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty weights file; the parameters are those of the fixture `params`."""
    monkeypatch.setattr(inception, "load_params", lambda path: (params, "random"))
    (tmp_path / "weights.pth").touch()
    return str(tmp_path / "weights.pth")


def test_invalid_references_are_rejected(tmp_path: Path, weights: str) -> None:
    for reference, message in (
        ("", "The metric fid compares with real images. Set --reference"),
        (str(tmp_path / "nowhere"), "The folder .*nowhere does not exist. Set --reference"),
        (str(tmp_path), "contains no images"),
    ):
        with pytest.raises(UserError, match=message):
            load_metrics(["fid"], MetricInputs(64, reference, inception=weights))
    with pytest.raises(UserError, match=r"Unknown metric 'fidd'\. Choose from fid, cmmd, clip_score, domain"):
        load_metrics(["fidd"], MetricInputs(64))


def test_statistics_of_a_folder_are_cached(
    network: FidNetwork, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    for number, image in enumerate(random_images(5, 3)):
        Image.fromarray(image).resize((96, 80)).save(tmp_path / "real" / f"{number}.png")
    monkeypatch.setattr("micro_dit.evaluation.registry.FidNetwork", lambda *arguments: network)
    monkeypatch.setattr("micro_dit.evaluation.registry.fid", lambda images, network, reference, warn: reference)
    messages: list[str] = []
    for _ in range(2):
        inputs = MetricInputs(
            64, str(tmp_path / "real"), inception=weights, cache=tmp_path / "cache", say=messages.append
        )
        (reference,) = load_metrics(["fid"], inputs)(InMemory(random_images(2, 0)))
        assert reference.n == 5
        assert "center crop" in reference.pipeline["crop"]
    assert len(messages) == 1  # printed when the statistics are computed
    assert len(list((tmp_path / "cache").iterdir())) == 1
