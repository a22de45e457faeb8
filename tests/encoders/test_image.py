import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from micro_dit.encoders.autoencoder import AutoencoderConfig, AutoencoderKL
from micro_dit.encoders.image import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ImageEncoder,
    load_image_encoder,
    load_parameters,
    read_config,
    save_autoencoder,
)
from micro_dit.errors import UserError

WITH_ATTENTION: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.3,
    "shift_factor": 0.1,
}
PLAIN: dict[str, Any] = {
    "block_out_channels": (8, 12),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "scaling_factor": 0.9,
    "latents_mean": [0.1 * i for i in range(8)],
    "latents_std": [1.0 + 0.1 * i for i in range(8)],
}
ATTENTION_IN_LEVELS: dict[str, Any] = {  # attention at the lowest resolution, as in autoencoders with 32 channels
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "down_block_types": ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2,
}
Saved = tuple[AutoencoderConfig, dict[str, Any]]  # configuration and parameters


def make_reference(settings: dict[str, Any], folder: Path) -> Any:
    """Saves diffusers' autoencoder with random weights to a folder, and returns it."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    levels = len(settings["block_out_channels"])
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    model = diffusers.AutoencoderKL(**kinds | settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases, whose ones and zeros would hide errors
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def assert_close(ours: Any, theirs: Any) -> None:
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.fixture(scope="module")
def tiny() -> Saved:
    config = AutoencoderConfig(**{**PLAIN, "latents_mean": (0.5,) * 8, "latents_std": (2.0,) * 8})
    return config, nnx.to_pure_dict(nnx.state(AutoencoderKL(config, rngs=nnx.Rngs(0))))


@pytest.fixture
def folder(tiny: Saved, tmp_path: Path) -> Path:
    save_autoencoder(tmp_path, *tiny)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("settings", [WITH_ATTENTION, PLAIN, ATTENTION_IN_LEVELS], ids=["attention", "plain", "levels"])
def test_matches_diffusers(settings: dict[str, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    reference = make_reference(settings, tmp_path).requires_grad_(False)
    encoder = load_image_encoder(str(tmp_path))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)

    posterior = reference.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
    if "latents_mean" in settings:
        shift = torch.tensor(settings["latents_mean"]).view(1, -1, 1, 1)
        scale = settings["scaling_factor"] / torch.tensor(settings["latents_std"]).view(1, -1, 1, 1)
    else:
        shift, scale = settings.get("shift_factor", 0.0), settings["scaling_factor"]
    mean, std = encoder.encode(images)
    assert_close(mean, (posterior.mean - shift) * scale)
    assert_close(std, posterior.std * scale)

    latents = ((posterior.mean - shift) * scale).permute(0, 2, 3, 1)
    images = reference.decode(posterior.mean).sample
    assert 0.3 < (images.abs() < 1).float().mean() < 1  # some values are clipped
    assert_close(encoder.decode(latents.numpy()), images.clamp(-1, 1))
    assert encoder.downsample == 2 ** (len(settings["block_out_channels"]) - 1)
    assert encoder.channels == settings["latent_channels"]


def test_diffusers_loads_saved_autoencoders(tiny: Saved, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    reference, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert reference.config.latents_std == [2.0] * 8
    latents = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    theirs = reference.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample
    config, parameters = tiny
    model = nnx.merge(nnx.graphdef(AutoencoderKL(config, rngs=nnx.Rngs(0))), parameters)
    assert_close(jax.jit(lambda z: model.decode(z))(latents), theirs)


def test_save_and_load_are_exact_and_float16_loads_as_float32(tiny: Saved, folder: Path) -> None:
    config, parameters = tiny
    assert read_config(folder) == config
    again = load_parameters(folder, config)
    assert jax.tree.structure(again) == jax.tree.structure(parameters)
    jax.tree.map(np.testing.assert_array_equal, again, parameters)

    save_autoencoder(folder, config, parameters, np.float16)
    half = load_parameters(folder, config)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float32(np.float16(b))), half, parameters)
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE])


def test_reads_old_attention_names(tmp_path: Path) -> None:
    config = AutoencoderConfig(block_out_channels=(8,), norm_num_groups=4)
    parameters = nnx.to_pure_dict(nnx.state(AutoencoderKL(config, rngs=nnx.Rngs(0))))
    save_autoencoder(tmp_path, config, parameters)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {re.sub(r"to_(q|k|v|out\.0)", lambda match: old[match[0]], name): t for name, t in tensors.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in renamed
    save_file(renamed, tmp_path / WEIGHTS_FILE)
    jax.tree.map(np.testing.assert_array_equal, load_parameters(tmp_path, config), parameters)


def test_lists_all_mismatched_tensors(tiny: Saved, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    del tensors["encoder.conv_in.bias"]
    tensors["decoder.conv_out.extra"] = np.zeros(3, np.float32)
    tensors["decoder.conv_in.weight"] = np.zeros((12, 4, 3, 3), np.float32)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(UserError) as error:
        load_image_encoder(str(folder))
    message = str(error.value)
    assert "encoder.conv_in.bias is missing" in message
    assert "decoder.conv_out.extra is not expected" in message
    assert "decoder.conv_in.weight has shape (12, 4, 3, 3), expected (12, 8, 3, 3)" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
        ({"patch_size": [2, 2]}, "patch_size"),
        ({"latents_mean": None}, "latents_mean"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
    ],
)
def test_names_unsupported_settings(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=named):
        read_config(folder)


def test_ignores_settings_without_effect(tiny: Saved, folder: Path) -> None:
    edit_config(folder, _name_or_path="x", use_tiling=False, architectures=None, sample_size=[64, 64], extra_layers=0)
    assert read_config(folder) == dataclasses.replace(tiny[0], sample_size=(64, 64))


def test_names_missing_and_corrupt_files(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no_such_folder' is not a folder"):
        load_image_encoder(str(folder / "no_such_folder"))
    (folder / WEIGHTS_FILE).write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match=WEIGHTS_FILE):
        load_image_encoder(str(folder))
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=rf"no weights \({WEIGHTS_FILE}\).*convert_weights"):
        load_image_encoder(str(folder))
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match=CONFIG_FILE):
        load_image_encoder(str(folder))


def test_rejects_sizes_that_are_not_multiples_of_the_downsampling(tiny: Saved) -> None:
    encoder = ImageEncoder(*tiny, "tiny")
    with pytest.raises(UserError, match=r"30×31.*multiples of 2"):
        encoder.encode(np.zeros((1, 30, 31, 3), np.float32))


def test_fingerprint_depends_on_weights_and_settings(tiny: Saved, folder: Path) -> None:
    config, parameters = tiny
    first = ImageEncoder(config, parameters, "tiny").fingerprint
    assert load_image_encoder(str(folder)).fingerprint == first
    assert ImageEncoder(dataclasses.replace(config, scaling_factor=1.0), parameters, "tiny").fingerprint != first
    changed = jax.tree.map(lambda leaf: leaf, parameters)
    changed["decoder"]["conv_out"]["bias"] = changed["decoder"]["conv_out"]["bias"].at[0].add(1e-6)
    assert ImageEncoder(config, changed, "tiny").fingerprint != first


def test_finds_the_autoencoder_of_a_pipeline(tiny: Saved, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "pipeline" / "vae", *tiny)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    encoder = load_image_encoder(str(tmp_path / "pipeline"))
    assert (encoder.name, encoder.fingerprint) == ("pipeline", ImageEncoder(*tiny, "tiny").fingerprint)


def test_uint8_images_encode_like_float_images(tiny: Saved) -> None:
    encoder = ImageEncoder(*tiny, "tiny")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    expected = encoder.encode(images / np.float32(127.5) - 1)
    for ours, theirs in zip(encoder.encode(images), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_products_approximate_float32_products(tmp_path: Path) -> None:
    make_reference(WITH_ATTENTION, tmp_path)
    exact, rounded = load_image_encoder(str(tmp_path)), load_image_encoder(str(tmp_path), "bfloat16")
    assert exact.fingerprint == rounded.fingerprint
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    latents, _ = exact.encode(images)
    for ours, theirs in ((rounded.encode(images)[0], latents), (rounded.decode(latents), exact.decode(latents))):
        assert ours.dtype == jnp.float32
        assert 1e-4 < np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean()) < 0.03
    with pytest.raises(UserError, match=r"'float16'\. Choose float32 or bfloat16"):
        load_image_encoder(str(tmp_path), "float16")


def test_reads_bfloat16_weights(tiny: Saved, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    file = folder / WEIGHTS_FILE
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}, file)
    config, parameters = tiny
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), parameters)
    jax.tree.map(np.testing.assert_array_equal, load_parameters(folder, config), rounded)
    save_file({"encoder.conv_in.bias": torch.zeros(3).to(torch.float8_e4m3fn)}, file)
    with pytest.raises(UserError, match=r"encoder\.conv_in\.bias .* has a dtype that is not supported"):
        load_parameters(folder, config)
