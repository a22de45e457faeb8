import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from micro_dit.data.sources.openmoji import ASSETS, OpenMoji
from micro_dit.encoders import train_vae
from micro_dit.encoders.autoencoder import AutoencoderKL
from micro_dit.encoders.image import (
    ImageEncoder,
    load_image_encoder,
    load_parameters,
    save_autoencoder,
)
from micro_dit.errors import UserError

SHIPPED = ASSETS.parent / "openmoji_vae"
TINY = dataclasses.replace(train_vae.CONFIG, block_out_channels=(8,), norm_num_groups=2)


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Trains a network of one level, on nine images instead of thousands."""
    monkeypatch.setattr(train_vae, "CONFIG", TINY)
    monkeypatch.setattr(train_vae, "OpenMoji", functools.partial(OpenMoji, ("component",)))
    monkeypatch.setattr(OpenMoji, "pixels", functools.partialmethod(OpenMoji.pixels, workers=1))


def test_a_short_training_writes_a_loadable_autoencoder_with_normalized_latents(tiny, tmp_path, capsys) -> None:
    metrics = train_vae.train(str(tmp_path), minutes=None, steps=3, seed=0, batch_size=2, learning_rate=1e-3)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 3
    assert (tmp_path / "reconstructions.png").exists()
    assert "held-out PSNR" in capsys.readouterr().out
    encoder = load_image_encoder(str(tmp_path))
    assert encoder.fingerprint == metrics["fingerprint"]
    mean, std = train_vae.measure_latents(encoder, OpenMoji(("component",), px=128).pixels("train")[::4])
    np.testing.assert_allclose(mean, 0, atol=1e-3)
    np.testing.assert_allclose(std, 0.9, rtol=1e-3)


def test_training_goes_on_from_given_weights(tiny, tmp_path) -> None:
    parameters = nnx.to_pure_dict(nnx.state(AutoencoderKL(TINY, rngs=nnx.Rngs(7))))
    save_autoencoder(tmp_path / "init", TINY, parameters, np.float16)
    arguments = {"minutes": None, "steps": 1, "seed": 0, "batch_size": 2, "learning_rate": 0.0}
    train_vae.train(str(tmp_path / "out"), init=str(tmp_path / "init"), **arguments)
    before, after = (load_parameters(tmp_path / name, TINY) for name in ("init", "out"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3), after, before)


def test_either_minutes_or_steps(tmp_path) -> None:
    for length in ({"minutes": None, "steps": None}, {"minutes": 1.0, "steps": 1}):
        with pytest.raises(UserError, match="either --minutes or --steps"):
            train_vae.train(str(tmp_path), seed=0, batch_size=4, learning_rate=1e-3, **length)


def test_steps_lower_the_loss_and_move_the_averages() -> None:
    graph, initial = nnx.split(AutoencoderKL(TINY, rngs=nnx.Rngs(0)))
    parameters = nnx.to_pure_dict(initial)
    optimizer = train_vae.make_optimizer()
    state = {"parameters": parameters, "ema": parameters, "optimizer": optimizer.init(parameters)}
    step_function = jax.jit(functools.partial(train_vae.train_step, graph=graph, optimizer=optimizer))
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
    ink = train_vae.find_ink(image)
    assert {tuple(pair) for pair in ink[0]} == {(8, 100)}
    rng = np.random.default_rng(0)
    for size in (64, 128):
        crops = train_vae.inked_crops(image, ink, rng, 20, size)
        assert crops.shape == (20, size, size, 3)
        dots = (crops != 255).any(-1)
        assert dots.any((1, 2)).all()
        assert all(list(crop[dot][0]) == [10, 20, 30] for crop, dot in zip(crops, dots, strict=True))
        places = {tuple(np.argwhere(dot)[0]) for dot in dots}
        assert len(places) >= 4


def test_blank_images_can_be_cropped() -> None:
    image = np.full((1, 128, 128, 3), 255, np.uint8)
    assert (train_vae.inked_crops(image, train_vae.find_ink(image), np.random.default_rng(0), 3, 64) == 255).all()


def test_the_learning_rate_rises_and_then_falls_to_one_percent() -> None:
    assert train_vae.learning_rate_at(0.0, 0, 1.0) == pytest.approx(1 / train_vae.WARMUP_STEPS)
    assert train_vae.learning_rate_at(0.0, 10_000, 1.0) == pytest.approx(1.0)
    assert train_vae.learning_rate_at(0.5, 10_000, 1.0) == pytest.approx(0.505)
    assert train_vae.learning_rate_at(1.1, 10_000, 1.0) == pytest.approx(0.01)


def test_psnr_in_decibels() -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    others = np.stack([np.full((4, 4, 3), 255, np.uint8), np.full((4, 4, 3), 1, np.uint8)])
    np.testing.assert_allclose(train_vae.psnr(images, others), [0, 20 * np.log10(255)], atol=1e-4)


def test_the_shipped_autoencoder_reconstructs_drawings_it_has_never_seen() -> None:
    encoder = load_image_encoder(str(SHIPPED))
    assert (encoder.downsample, encoder.channels) == (8, 8)
    metrics = json.loads((SHIPPED / "metrics.json").read_text())
    assert encoder.fingerprint == metrics["fingerprint"]
    images = OpenMoji(("animals-nature", "objects", "food-drink"), px=128).pixels("validation", workers=1)
    assert train_vae.psnr(images, train_vae.reconstruct(encoder, images)).mean() > 29
    assert (SHIPPED / "diffusion_pytorch_model.safetensors").stat().st_size < 6e6


def test_reconstruct_rounds_to_pixels() -> None:
    encoder = ImageEncoder(TINY, nnx.to_pure_dict(nnx.state(AutoencoderKL(TINY, rngs=nnx.Rngs(0)))), "tiny")
    images = np.zeros((3, 16, 16, 3), np.uint8)
    decoded = encoder.decode(encoder.encode(np.full((3, 16, 16, 3), -1, np.float32))[0])
    expected = (np.asarray(decoded) + 1) * 127.5
    assert np.abs(train_vae.reconstruct(encoder, images) - expected).max() <= 0.501
