"""Sampling with the generator, the Python API and the command, with stub encoders."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from micro_dit import sample
from micro_dit.api import Model, load
from micro_dit.diffusion import edm
from micro_dit.diffusion import generate as generators
from micro_dit.diffusion.generate import Generator, Sampling, draw_noise, to_uint8
from micro_dit.diffusion.guidance import guide
from micro_dit.diffusion.samplers import SAMPLERS, noise_levels
from micro_dit.diffusion.samplers import sample as sample_latents
from micro_dit.encoders import image, text
from micro_dit.errors import UserError
from micro_dit.interop.model_folder import save_model_folder
from tests.helpers import tiny
from tests.helpers.tiny import Blocks, Words

CONFIG = tiny.network()
CAPTIONS = np.random.default_rng(0).standard_normal((4, 4, 12)).astype(np.float32)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Words:
    """Replaces the encoders with small stubs."""
    encoder = Words()
    monkeypatch.setattr(image, "load_image_encoder", lambda name: Blocks())
    monkeypatch.setattr(text, "load_text_encoder", lambda name, tokens: encoder)
    return encoder


# ---- The generator ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return tiny.random_params(CONFIG)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(CONFIG, sigma_data=0.9)


def images_of(
    generator: Generator, params: dict[str, jax.Array], captions: np.ndarray, seeds: list[int], batch_size: int = 32
) -> np.ndarray:
    return generator.images(params, captions, seeds, Sampling(3, 2.0), Blocks().decode, batch_size).astype(int)


def test_image_depends_on_its_caption_and_seed_but_not_on_the_batch(
    generator: Generator, params: dict[str, jax.Array]
) -> None:
    images = generator.images(params, CAPTIONS, [5, 6, 7, 8], Sampling(3, 2.0), Blocks().decode)
    assert images.shape == (4, 16, 16, 3)
    assert images.dtype == np.uint8
    backwards = images_of(generator, params, CAPTIONS[::-1], [8, 7, 6, 5])[::-1]
    assert np.abs(images - backwards).max() <= 1
    in_batches_of_two = images_of(generator, params, CAPTIONS, [5, 6, 7, 8], batch_size=3)
    assert np.abs(images - in_batches_of_two).max() <= 1
    changed = images_of(generator, params, CAPTIONS[[0, 0, 2, 3]], [5, 6, 9, 8])
    differs = np.abs(images - changed).max(axis=(1, 2, 3)) > 1
    assert differs.tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", SAMPLERS)
def test_generator_matches_the_sampler_with_the_guided_denoiser(
    generator: Generator, params: dict[str, jax.Array], name: str
) -> None:
    noise, D_x = draw_noise(CONFIG, [5, 6]), list[Any]()
    F = guide(generators.bind(CONFIG, params), 2.0)

    @jax.jit
    def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return edm.denoise(F, x, sigma, CAPTIONS[:2], 0.9)

    expected = sample_latents(lambda x, sigma: denoise(x, np.float32([sigma])), noise, noise_levels(3), name)
    latents = generator.latents(params, CAPTIONS[:2], noise, Sampling(3, 2.0, name), after_call=D_x.append)
    tiny.assert_close(latents, expected)
    tiny.assert_close(D_x[0], denoise(80 * noise, np.float32([80])))
    np.testing.assert_allclose(D_x[-1], latents, atol=1e-5)  # the last step returns the denoised latents
    assert len(D_x) == Sampling(3, 2.0, name).calls


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_abstract_denoiser_is_the_compiled_program(params: dict[str, jax.Array], guidance: float) -> None:
    generator, place = Generator(CONFIG, sigma_data=0.9), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    call, programs = generator._denoise, set()

    def recording(*arguments: Any, **static: Any) -> Any:
        programs.add(call.lower(*arguments, **static).as_text())
        return call(*arguments, **static)

    generator._denoise = recording  # type: ignore[assignment]
    noise = draw_noise(CONFIG, [5, 6, 7, 8])
    generator.latents(jax.device_put(params, place), CAPTIONS, noise, Sampling(2, guidance))
    abstract = {n: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place) for n, p in params.items()}
    function, arguments = generator.abstract_denoise(abstract, 4, 4, place, guided=guidance != 1)
    assert programs == {jax.jit(function, out_shardings=place).lower(*arguments).as_text()}


def test_changing_steps_guidance_scale_or_sampler_does_not_recompile(
    params: dict[str, jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    bind = generators.bind
    monkeypatch.setattr(generators, "bind", lambda *arguments: traced.append(1) or bind(*arguments))
    generator, noise = Generator(CONFIG, sigma_data=0.9), draw_noise(CONFIG, [5, 6, 7, 8])

    def latents(*settings: Any) -> np.ndarray:
        return generator.latents(params, CAPTIONS, noise, Sampling(*settings))

    latents(2, 2.0, "euler")
    latents(3, 2.0, "heun")
    lower, higher = latents(3, 2.0, "euler"), latents(3, 4.0, "euler")
    assert len(traced) == 1
    assert np.abs(lower - higher).max() > 1e-3
    # With guidance only at noise levels 1 to 100, the lower levels need a second program.
    part = latents(3, 4.0, "euler", (1.0, 100.0))
    assert len(traced) == 2
    assert np.abs(part - higher).max() > 1e-3
    np.testing.assert_array_equal(latents(3, 4.0, "euler", (0.0, 100.0)), higher)


def test_zero_steps_are_rejected() -> None:
    with pytest.raises(UserError, match=r"The number of sampling steps is 0\. Set steps to at least 1"):
        Sampling(0)


def test_pixels_are_rounded_and_clipped() -> None:
    assert to_uint8(jnp.asarray([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


# ---- The API ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(finished_run: Path) -> Model:
    return load(finished_run)


@pytest.fixture
def model(loaded: Model, words: Words) -> Model:
    loaded._encoders, loaded._embeddings, loaded.warn = {}, {}, pytest.fail
    return loaded


SHORT: dict[str, Any] = dict(steps=2, guidance=2.0)


def random_image(side: int = 16) -> Image.Image:
    colors = np.random.default_rng(3).integers(0, 256, (side // 2, side // 2, 3), np.uint8)
    return Image.fromarray(colors.repeat(2, 0).repeat(2, 1))


def test_same_prompt_and_seed_produce_the_same_image_in_every_batch(model: Model) -> None:
    together = model.latents(["one", "two", "three"], num=2, seed=4, **SHORT)
    assert together.shape == (6, 8, 8, 4)
    np.testing.assert_array_equal(model.latents("two", seed=5, **SHORT)[0], together[3])
    np.testing.assert_array_equal(model.latents(["three", "two"], seed=5, **SHORT), together[[5, 3]])
    assert np.abs(together[0] - together[1]).max() > 1e-3
    assert np.abs(together[0] - together[2]).max() > 1e-3
    images = model.generate("two", seed=5, **SHORT)
    assert [i.size for i in images] == [(16, 16)]
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(model.decode(together)[3]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_returns_finite_latents(model: Model, sampler: str) -> None:
    latents = model.latents("one", sampler=sampler, **SHORT)
    assert np.isfinite(latents).all()


def test_empty_prompt_is_unconditional(model: Model, words: Words) -> None:
    empty, unguided = model.latents("", steps=2, guidance=3.0), model.latents("one", steps=2, guidance=0.0)
    tiny.assert_close(empty, unguided)
    assert words.encoded == [["one"]]


def test_negative_prompt_changes_the_image_unless_it_is_empty(model: Model) -> None:
    plain = model.latents("one", **SHORT)
    assert np.abs(model.latents("one", negative_prompt="two", **SHORT) - plain).max() > 1e-3
    np.testing.assert_array_equal(model.latents("one", negative_prompt=" ", **SHORT), plain)
    # If the negative prompt is the prompt, guidance has no effect.
    same = model.latents("one", negative_prompt="one", **SHORT)
    tiny.assert_close(same, model.latents("one", steps=2, guidance=1.0))


def test_autoguidance_steers_away_from_the_earlier_checkpoint(model: Model, finished_run: Path) -> None:
    weak = load(finished_run, 48)
    unguided = model.latents("one", steps=2, guidance=1.0)
    tiny.assert_close(model.latents("one", steps=2, guidance=1.0, autoguidance=weak), unguided)
    assert np.abs(model.latents("one", steps=2, guidance=2.0, autoguidance=weak) - unguided).max() > 1e-4
    tiny.assert_close(
        model.latents("one", steps=2, guidance=0.0, autoguidance=weak),
        Model({n: np.asarray(v) for n, v in weak.params.items()}, weak.config, weak.about).latents(
            "one", steps=2, guidance=1.0
        ),
    )
    with pytest.raises(UserError, match="Autoguidance can't be combined with a negative prompt"):
        model.latents("one", autoguidance=weak, negative_prompt="two", **SHORT)


def test_start_image_changes_more_with_higher_strength(model: Model) -> None:
    original = model.encode(random_image())
    assert model.generate("one", image=random_image(), strength=0.0)[0].tobytes() == random_image().tobytes()
    differences = [
        np.abs(model.latents("one", image=random_image(), strength=strength, steps=8, guidance=1.0) - original).mean()
        for strength in (0.0, 0.01, 0.5, 1.0)
    ]
    assert differences[0] == 0
    assert differences[1] < 0.02
    assert differences[1] < differences[2] < differences[3]


def test_only_the_masked_part_is_resampled(model: Model) -> None:
    mask = np.zeros((16, 16), bool)
    mask[5:, :3] = True  # latents in rows 2 and above, columns 0 and 1
    resampled = model.latents(["one", "two"], image=random_image(), mask=mask, **SHORT)
    original = model.encode(random_image())
    kept = np.ones((8, 8), bool)
    kept[2:, :2] = False
    for latents in resampled:
        np.testing.assert_array_equal(latents[kept], original[kept])
        assert np.abs(latents[~kept] - original[~kept]).min(axis=-1).max() > 1e-3
    mask_image = Image.fromarray(255 * mask.astype(np.uint8))
    from_mask_image = model.latents(["one", "two"], image=random_image(), mask=mask_image, **SHORT)
    np.testing.assert_array_equal(from_mask_image, resampled)


def test_long_prompt_is_truncated_with_a_warning(model: Model, words: Words) -> None:
    warnings: list[str] = []
    model.warn = warnings.append
    model.embed(["one two three", "one two three four five"])
    assert warnings == [
        "The prompt has 6 tokens, but the limit of the text encoder is 4. It is truncated to 'one two three', without "
        "'four five'."
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "number of sampling steps is 0"),
        (dict(steps=1, sampler="dpmpp_2m"), "dpmpp_2m needs at least 2 steps"),
        (dict(sampler="ddim"), r"Unknown sampler 'ddim'\. Choose one of heun, euler, dpmpp_2m"),
        (dict(num=0), r"number of images is 0\. Set num to at least 1"),
        (dict(seed=-1), "Set seed to an integer from 0"),
        (dict(guidance_interval=(2.0, 1.0)), "interval from 2 to 1 is empty"),
        (dict(strength=0.5), "needs a start image"),
        (dict(image=random_image(18)), "The image has 18×18 pixels, but the model needs 16×16"),
        (dict(image=random_image(), strength=1.5), r"The strength is 1\.5\. Set strength to a number from 0 to 1"),
        (dict(image=random_image(), mask=np.ones((4, 4), bool)), "The mask has 4×4 pixels"),
        (dict(image=random_image(), mask=np.zeros((16, 16), bool)), "The mask is completely black"),
    ],
)
def test_invalid_settings_are_rejected(model: Model, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.generate("one", **settings)


def test_encoders_that_do_not_match_the_model_are_rejected(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blocks, "channels", 16)
    with pytest.raises(UserError, match="noise has latents with 16 channels, but the model needs 4"):
        model.decode(np.zeros((1, 8, 8, 4), np.float32))
    monkeypatch.setattr(Words, "fingerprint", "89ab")
    with pytest.raises(UserError, match=r"another version of noise \(fingerprint 4567, found 89ab\)"):
        model.embed(["one"])


def test_model_folder_samples_the_same_images_as_its_run(model: Model, tmp_path: Path) -> None:
    about = model.about
    fields = {name: getattr(about, name) for name in ("sigma_data", "vae", "text_encoder", "caption_tokens")}
    fields |= {"caption_cleaning": about.caption_cleaning, "source": "a test"}
    save_model_folder(tmp_path / "model", {n: np.asarray(v) for n, v in model.params.items()}, model.config, fields)
    folder = load(tmp_path / "model")
    assert (folder.about.step, folder.about.source, folder.about.steps) == (None, "a test", 30)
    np.testing.assert_array_equal(folder.latents("one", **SHORT), model.latents("one", **SHORT))
    with pytest.raises(UserError, match="Remove --step and --params"):
        load(tmp_path / "model", 3)


def test_missing_models_and_checkpoints_are_rejected(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 7\. Set --step to one of 48, 80, 84"):
        load(finished_run, 7)
    with pytest.raises(UserError, match="is neither the work directory of a run nor a model folder"):
        load(tmp_path)
    shutil.copy(finished_run / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoints yet"):
        load(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Words) -> SimpleNamespace:
    """The flags of the command."""
    flags = SimpleNamespace(
        workdir=str(finished_run), prompt=["one", "two"], prompts_file="", out=str(tmp_path / "out.png"), num=2,
        guidance=2.0, steps=2, seed=3, step=None, sampler="heun", guidance_interval="", path_drop=None,
        negative_prompt="", autoguidance="", image="", mask="", strength=None, batch_size=4, params=None,
    )  # fmt: skip
    monkeypatch.setattr(sample, "FLAGS", flags)
    return flags


def read(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")), dict(opened.text)


def test_command_writes_the_images_of_the_api(
    command: SimpleNamespace, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sample.main()
    assert "4 images from step 84 of run: " in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["000_one_seed_3.png", "001_one_seed_4.png", "002_two_seed_3.png", "003_two_seed_4.png"]
    pixels, metadata = read(tmp_path / "out" / files[3])
    np.testing.assert_array_equal(pixels, np.asarray(model.generate("two", seed=4, **SHORT)[0]))
    assert metadata == {
        "prompt": "two", "seed": "4", "sampler": "heun, 2 steps", "guidance": "2.0", "checkpoint": "step 84 of run",
        "config": model.about.config_hash, "attribution": "nobody",
    }  # fmt: skip
    _, metadata = read(tmp_path / "out.png")
    assert (metadata["prompt"], metadata["seed"]) == ("one | two", "3 to 4")


def test_ema_weights_are_loaded_if_the_checkpoint_has_them(loaded: Model, finished_run: Path) -> None:
    end = tiny.read_checkpoint(finished_run)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, end["ema"])
    assert any(not np.array_equal(end["ema"][name], end["params"][name]) for name in end["ema"])
    earlier = load(finished_run, 48).params
    jax.tree.map(np.testing.assert_array_equal, earlier, tiny.read_checkpoint(finished_run, 48)["params"])


def test_default_settings_are_those_of_the_run(command: SimpleNamespace, finished_run: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    run = json.loads((workdir / "config.json").read_text())
    run["config"]["sampling"].update(guidance=0.5, steps=1)
    (workdir / "config.json").write_text(json.dumps(run))
    vars(command).update(workdir=str(workdir), guidance=None, steps=None, num=1, prompt=["one"], autoguidance="48")
    sample.main()
    pixels, metadata = read(Path(command.out))
    assert pixels.shape == (16, 16, 3)
    recorded = [metadata[name] for name in ("sampler", "guidance", "autoguidance")]
    assert recorded == ["heun, 1 steps", "0.5", "step 48 of run"]


def test_prompts_are_cleaned_like_the_captions_of_the_shards(
    command: SimpleNamespace, finished_run: Path, tmp_path: Path, words: Words
) -> None:
    run = json.loads((finished_run / "config.json").read_text())
    assert run["shards"]["caption_cleaning"] == "none"
    run["shards"]["caption_cleaning"] = "deepfloyd-2"
    workdir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (workdir / "config.json").write_text(json.dumps(run))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A <b>Red</b> Heart #12\n\nplain\n")
    vars(command).update(workdir=str(workdir), prompt=[], prompts_file=str(prompts), num=1)
    sample.main()
    assert words.encoded == [["a red heart"], ["plain"]]
    assert read(Path(command.out))[1]["prompt"] == "A <b>Red</b> Heart #12 | plain"  # the original prompts


def test_start_image_is_unchanged_at_strength_0(command: SimpleNamespace, tmp_path: Path) -> None:
    random_image().save(tmp_path / "start.png")
    vars(command).update(image=str(tmp_path / "start.png"), strength=0.0, num=1, prompt=[""])
    sample.main()
    pixels, metadata = read(Path(command.out))
    np.testing.assert_array_equal(pixels, np.asarray(random_image()))
    assert metadata["strength"] == "0.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompt=[]), "There are no prompts"),
        (dict(prompts_file="none.txt"), "prompts file none.txt can't be read"),
        (dict(prompts_file="blank"), "prompts file .*blank is empty"),
        (dict(out="image.jpg"), "--out=image.jpg does not end in .png"),
        (dict(guidance_interval="1"), "Set it to two noise levels, for example --guidance_interval=0.3,5"),
        (dict(image="none.png"), "The image none.png can't be read"),
        (dict(workdir="nowhere"), "nowhere is neither the work directory"),
        (dict(autoguidance="7"), "no checkpoint of step 7"),
    ],
)
def test_missing_and_invalid_inputs_are_rejected(
    command: SimpleNamespace, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if change.get("prompts_file") == "blank":
        (tmp_path / "blank").write_text("\n  \n")
        change = {"prompts_file": str(tmp_path / "blank")}
    vars(command).update(change)
    with pytest.raises(UserError, match=message):
        sample.main()


def test_flags_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    from absl import flags

    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    for name in ("string", "multi_string", "integer", "float", "enum"):
        define = getattr(flags, f"DEFINE_{name}")
        monkeypatch.setattr(flags, f"DEFINE_{name}", lambda *a, d=define, **k: d(*a, flag_values=values, **k))
    sample.define_flags()
    values(["sample", "--workdir=runs/mask75", "--prompt=a", "--prompt=b", "--sampler=dpmpp_2m"])
    assert (values.prompt, values.sampler, values.steps, values.num) == (["a", "b"], "dpmpp_2m", None, 1)
