import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from micro_dit import train_vae
from micro_dit.data.sources.openmoji import ASSETS, OpenMoji
from micro_dit.encoders import vae_training
from micro_dit.encoders.autoencoder import AutoencoderKL
from micro_dit.encoders.image import (
    ImageEncoder,
    load_image_encoder,
    load_parameters,
    save_autoencoder,
)
from micro_dit.errors import UserError

SHIPPED = ASSETS.parent / "openmoji_vae"
TINY = dataclasses.replace(vae_training.CONFIG, block_out_channels=(8,), norm_num_groups=2)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduces the network to one level and the data to nine images."""
    monkeypatch.setattr(vae_training, "CONFIG", TINY)
    monkeypatch.setattr(train_vae, "OpenMoji", functools.partial(OpenMoji, ("component",)))
    monkeypatch.setattr(OpenMoji, "pixels", functools.partialmethod(OpenMoji.pixels, workers=1))


def test_training_writes_an_autoencoder_with_normalized_latents(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = vae_training.AutoencoderTraining(steps=3, batch_size=2, learning_rate=1e-3)
    metrics = train_vae.train(str(tmp_path), settings)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 3
    assert (tmp_path / "reconstructions.png").exists()
    assert "held-out PSNR" in capsys.readouterr().out
    encoder = load_image_encoder(str(tmp_path))
    assert encoder.fingerprint == metrics["fingerprint"]
    mean, std = vae_training.measure_latents(encoder, OpenMoji(("component",), px=128).pixels("train")[::4])
    np.testing.assert_allclose(mean, 0, atol=1e-3)
    np.testing.assert_allclose(std, 0.9, rtol=1e-3)


def test_training_starts_from_initial_weights(tiny: None, tmp_path: Path) -> None:
    parameters = nnx.to_pure_dict(nnx.state(AutoencoderKL(TINY, rngs=nnx.Rngs(7))))
    save_autoencoder(tmp_path / "init", TINY, parameters, np.float16)
    settings = vae_training.AutoencoderTraining(steps=1, batch_size=2, learning_rate=0.0, init=str(tmp_path / "init"))
    train_vae.train(str(tmp_path / "out"), settings)
    before, after = (load_parameters(tmp_path / name, TINY) for name in ("init", "out"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3), after, before)


@pytest.mark.parametrize(("minutes", "steps"), [(None, None), (1.0, 1)])
def test_requires_either_minutes_or_steps(minutes: float | None, steps: int | None) -> None:
    with pytest.raises(UserError, match="either --minutes or --steps"):
        vae_training.AutoencoderTraining(minutes, steps)


def test_steps_lower_the_loss_and_update_the_ema_weights() -> None:
    graph, initial = nnx.split(AutoencoderKL(TINY, rngs=nnx.Rngs(0)))
    parameters = nnx.to_pure_dict(initial)
    optimizer = vae_training.make_optimizer()
    state = {"parameters": parameters, "ema": parameters, "optimizer": optimizer.init(parameters)}
    step_function = jax.jit(functools.partial(vae_training.train_step, graph=graph, optimizer=optimizer))
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 1, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    losses = []
    for step in range(30):
        state, loss = step_function(state, images, jnp.int32(step), jnp.float32(5e-3), jax.random.key(0))
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    for part in ("parameters", "ema"):
        moved = jax.tree.map(lambda new, old: bool((new != old).any()), state[part], parameters)
        assert all(jax.tree.leaves(moved)), part
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state["ema"], state["parameters"])))


def test_crops_contain_ink_and_keep_the_colors() -> None:
    image = np.full((1, 128, 128, 3), 255, np.uint8)
    image[0, 8:12, 100:104] = (10, 20, 30)  # one small dot near a corner
    ink = vae_training.find_ink(image)
    assert {tuple(pair) for pair in ink[0]} == {(8, 100)}
    rng = np.random.default_rng(0)
    for size in (64, 128):
        crops = vae_training.inked_crops(image, ink, rng, 20, size)
        assert crops.shape == (20, size, size, 3)
        dots = (crops != 255).any(-1)
        assert dots.any((1, 2)).all()
        assert all(list(crop[dot][0]) == [10, 20, 30] for crop, dot in zip(crops, dots, strict=True))
        places = {tuple(np.argwhere(dot)[0]) for dot in dots}
        assert len(places) >= 4


def test_blank_images_can_be_cropped() -> None:
    image = np.full((1, 128, 128, 3), 255, np.uint8)
    assert (vae_training.inked_crops(image, vae_training.find_ink(image), np.random.default_rng(0), 3, 64) == 255).all()


def test_learning_rate_warms_up_and_decays_to_one_percent() -> None:
    assert vae_training.learning_rate_at(0.0, 0, 1.0) == pytest.approx(1 / vae_training.WARMUP_STEPS)
    assert vae_training.learning_rate_at(0.0, 10_000, 1.0) == pytest.approx(1.0)
    assert vae_training.learning_rate_at(0.5, 10_000, 1.0) == pytest.approx(0.505)
    assert vae_training.learning_rate_at(1.1, 10_000, 1.0) == pytest.approx(0.01)


def test_psnr_in_decibels() -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    others = np.stack([np.full((4, 4, 3), 255, np.uint8), np.full((4, 4, 3), 1, np.uint8)])
    np.testing.assert_allclose(vae_training.psnr(images, others), [0, 20 * np.log10(255)], atol=1e-4)


def test_included_autoencoder_reconstructs_held_out_drawings() -> None:
    encoder = load_image_encoder(str(SHIPPED))
    assert (encoder.downsample, encoder.channels) == (8, 8)
    metrics = json.loads((SHIPPED / "metrics.json").read_text())
    assert encoder.fingerprint == metrics["fingerprint"]
    images = OpenMoji(("animals-nature", "objects", "food-drink"), px=128).pixels("validation", workers=1)
    assert vae_training.psnr(images, vae_training.reconstruct(encoder, images)).mean() > 29
    assert (SHIPPED / "diffusion_pytorch_model.safetensors").stat().st_size < 6e6


def test_reconstruct_rounds_to_pixels() -> None:
    encoder = ImageEncoder(TINY, nnx.to_pure_dict(nnx.state(AutoencoderKL(TINY, rngs=nnx.Rngs(0)))), "tiny")
    images = np.zeros((3, 16, 16, 3), np.uint8)
    decoded = encoder.decode(encoder.encode(np.full((3, 16, 16, 3), -1, np.float32))[0])
    expected = (np.asarray(decoded) + 1) * 127.5
    assert np.abs(vae_training.reconstruct(encoder, images) - expected).max() <= 0.501
