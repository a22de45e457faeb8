import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from micro_dit import sample
from micro_dit.encoders import image, text
from micro_dit.errors import UserError
from micro_dit.sample import Generator, to_uint8

CONFIG = tiny.network(in_channels=3)


class Pixels:
    """An image encoder whose latents are the image."""

    def decode(self, latents: Any) -> Any:
        return jnp.clip(latents, -1, 1)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(CONFIG, Pixels(), guidance=2.0, steps=3, sigma_data=0.9)


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return tiny.random_params(CONFIG)


CAPTIONS = np.random.default_rng(0).standard_normal((4, 4, 12)).astype(np.float32)


def test_an_image_depends_on_its_caption_and_seed_and_not_on_the_batch(
    generator: Generator, params: dict[str, jax.Array], monkeypatch: pytest.MonkeyPatch
):
    images = generator(params, CAPTIONS, [5, 6, 7, 8])
    assert images.shape == (4, 8, 8, 3)
    assert images.dtype == np.uint8
    backwards = generator(params, CAPTIONS[::-1], [8, 7, 6, 5])[::-1]
    assert np.abs(images.astype(int) - backwards).max() <= 1
    monkeypatch.setattr(sample, "MAX_BATCH", 3)  # in turns of two
    assert np.abs(images.astype(int) - generator(params, CAPTIONS, [5, 6, 7, 8])).max() <= 1
    changed = generator(params, CAPTIONS[[0, 0, 2, 3]], [5, 6, 9, 8])
    differs = np.abs(images.astype(int) - changed).max(axis=(1, 2, 3)) > 1
    assert differs.tolist() == [False, True, True, False]


def test_turns_are_filled_up_and_cut(
    generator: Generator, params: dict[str, jax.Array], monkeypatch: pytest.MonkeyPatch
):
    whole = generator(params, CAPTIONS[[0, 1, 2]], [1, 2, 3])
    monkeypatch.setattr(sample, "MAX_BATCH", 2)  # two and one, which makes two of two
    assert np.abs(whole.astype(int) - generator(params, CAPTIONS[[0, 1, 2]], [1, 2, 3])).max() <= 1


def test_no_steps_are_refused():
    with pytest.raises(UserError, match="0 sampling steps: use at least 1"):
        Generator(CONFIG, Pixels(), guidance=1.0, steps=0, sigma_data=0.9)


def test_bytes_are_rounded_and_clipped():
    assert to_uint8(jnp.asarray([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.fixture
def command(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The command's flags, with small encoders; `.params` is what the generator was called with."""
    flags = SimpleNamespace(
        workdir=str(finished_run), prompt=["one", "two"], out=str(tmp_path / "out.png"), num=2, guidance=None,
        steps=None, seed=3, step=None, params=None, seeds=None, made=None, encoded=None,
    )  # fmt: skip

    class Fake:
        def __init__(self, config: Any, image_encoder: Any, **settings: Any):
            flags.made = settings

        def __call__(self, params: Any, captions: np.ndarray, seeds: list[int]) -> np.ndarray:
            assert captions.shape == (len(seeds), 4, 12)
            flags.params, flags.seeds = params, seeds
            return np.zeros((len(seeds), 64, 64, 3), np.uint8)

    def encode(prompts: list[str]) -> np.ndarray:
        flags.encoded = prompts
        return np.zeros((len(prompts), 4, 12), np.float32)

    encoder = SimpleNamespace(encode=encode)
    monkeypatch.setattr(sample, "FLAGS", flags)
    monkeypatch.setattr(sample, "Generator", Fake)
    monkeypatch.setattr(image, "load_image_encoder", lambda name: Pixels())
    monkeypatch.setattr(text, "load_text_encoder", lambda name, tokens: encoder)
    return flags


def test_the_command_samples_from_the_moving_average(command: SimpleNamespace, finished_run: Path):
    sample.main(["sample"])
    end = tiny.read_checkpoint(finished_run)
    jax.tree.map(np.testing.assert_array_equal, command.params, end["ema"])
    assert any(not np.array_equal(end["ema"][name], end["params"][name]) for name in end["ema"])
    assert command.seeds == [3, 4, 3, 4]
    run = json.loads((finished_run / "config.json").read_text())["config"]["sampling"]
    assert (command.made["guidance"], command.made["steps"]) == (run["guidance"], run["steps"])
    with Image.open(command.out) as picture:
        assert picture.text["prompt"] == "one | two"
        assert picture.text["attribution"] == "nobody"
        assert picture.text["checkpoint"].startswith("step 84 of")


def test_an_earlier_checkpoint_and_other_settings(command: SimpleNamespace, finished_run: Path):
    command.step, command.guidance, command.steps, command.num, command.prompt = 48, 0.0, 1, 1, ["one"]
    sample.main(["sample"])
    jax.tree.map(np.testing.assert_array_equal, command.params, tiny.read_checkpoint(finished_run, 48)["params"])
    assert (command.made["guidance"], command.made["steps"]) == (0.0, 1)
    with Image.open(command.out) as picture:
        assert picture.size == (64, 64)


def test_prompts_are_cleaned_as_the_shards_captions_were(command: SimpleNamespace, finished_run: Path, tmp_path: Path):
    command.prompt = ["A <b>Red</b> Heart #12", "plain"]
    sample.main(["sample"])
    assert command.encoded == command.prompt
    run = json.loads((finished_run / "config.json").read_text())
    assert run["shards"]["caption_cleaning"] == "none"
    run["shards"]["caption_cleaning"] = "deepfloyd-2"
    workdir = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (workdir / "config.json").write_text(json.dumps(run))
    command.workdir = str(workdir)
    sample.main(["sample"])
    assert command.encoded == ["a red heart", "plain"]
    with Image.open(command.out) as picture:
        assert picture.text["prompt"] == "A <b>Red</b> Heart #12 | plain"  # in the user's words


def test_what_is_missing_is_named(command: SimpleNamespace, tmp_path: Path):
    command.step = 7
    with pytest.raises(UserError, match=r"no checkpoint of step 7 \(it has steps 48, 80, 84\)"):
        sample.main(["sample"])
    command.workdir = str(tmp_path)
    with pytest.raises(UserError, match="is no work directory of a run"):
        sample.main(["sample"])
