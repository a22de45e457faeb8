import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from micro_dit import precompute as command
from micro_dit.data.pipeline import load_split, make_train_iterator
from micro_dit.data.shards import Manifest, check_shards, read_manifest
from micro_dit.data.sources import Example
from micro_dit.errors import UserError
from micro_dit.precompute import center_crop, decode_image, map_in_threads, precompute, write_shards


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(width: int, height: int, color: str = "red") -> bytes:
    return encoded(Image.new("RGB", (width, height), color))


class ListSource:
    """Examples from lists."""

    name, attribution = "list", "nobody, CC0"

    def __init__(self, **splits: list[Example]):
        self.splits, self._examples = tuple(splits), splits

    def examples(self, split: str) -> list[Example]:
        return self._examples[split]


class MeanColor:
    """An image encoder whose latents are the mean color of each 8×8 patch, and 0.5."""

    name, fingerprint, channels, downsample = "mean-color", "0123", 3, 8

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count, height, width, _ = images.shape
        mean = images.reshape(count, height // 8, 8, width // 8, 8, 3).mean((2, 4))
        return mean, np.full_like(mean, 0.5)


class Letters:
    """A text encoder with a token for each letter."""

    name, fingerprint, tokens, channels = "letters", "4567", 5, 2

    def encode(self, captions: list[str]) -> np.ndarray:
        embeddings = np.zeros((len(captions), self.tokens, self.channels), np.float32)
        for row, caption in enumerate(captions):
            for token, letter in enumerate(caption[: self.tokens]):
                embeddings[row, token] = ord(letter)
        return embeddings

    def count_tokens(self, captions: list[str]) -> list[int]:
        return list(map(len, captions))


def write(source: ListSource, out: Path, **changed) -> Manifest:
    arguments = {
        "resolutions": (16,),
        "image_encoder": MeanColor(),
        "text_encoder": Letters(),
        "posterior": "mean_std",
        "batch_size": 3,
        "examples_per_shard": 4,
        "minimum_side": 16,
        "seed": 0,
        "report": lambda line: None,
    }
    return write_shards(source, str(out), **arguments | changed)


def test_images_and_captions_arrive_in_order(tmp_path: Path):
    colors = ["red", "lime", "blue", "white", "black"]
    examples = [Example(f"id-{color}", plain(16, 16, color), color) for color in colors]
    manifest = write(ListSource(train=examples, validation=examples[:1], empty=[]), tmp_path / "shards")
    assert manifest == read_manifest(tmp_path / "shards")
    check_shards(manifest, tmp_path / "shards", resolution=16, channels=3, caption_tokens=5, checksums=True)
    assert [file.records for file in manifest.splits["train"]] == [4, 1]
    assert manifest.splits["empty"] == ()
    assert (manifest.source, manifest.attribution) == ("list", "nobody, CC0")
    assert (manifest.dropped, manifest.altered) == ({}, {})

    train = load_split(tmp_path / "shards", "train", 16)
    assert train["text"] == colors
    assert train["id"] == [f"id-{color}" for color in colors]
    np.testing.assert_allclose(
        train["latent_mean"][:, 0, 0], [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1]]
    )
    assert (train["latent_std"] == 0.5).all()
    np.testing.assert_array_equal(train["caption"], Letters().encode(colors))
    assert next(make_train_iterator(tmp_path / "shards", "train", 16, 8, 0))["caption"].shape == (8, 5, 2)


def test_unusable_inputs_are_counted_and_named(tmp_path: Path):
    good = plain(16, 16)
    examples = [
        Example("good", good, "ok"),
        Example("not an image", b"hello", "x"),
        Example("nothing", b"", "x"),
        Example("truncated", encoded(Image.effect_noise((64, 64), 50))[:-200], "x"),
        Example("small", plain(99, 15), "x"),
        Example("surrogate", good, "\ud83d"),
        Example("also good", good, "ok"),
    ]
    manifest = write(ListSource(train=examples), tmp_path / "shards")
    assert {reason: tally.ids for reason, tally in manifest.dropped.items()} == {
        "image cannot be decoded (UnidentifiedImageError)": ["not an image", "nothing"],
        "image cannot be decoded (OSError)": ["truncated"],
        "image is smaller than 16 px": ["small"],
        "caption is not valid Unicode": ["surrogate"],
    }
    assert load_split(tmp_path / "shards", "train", 16)["id"] == ["good", "also good"]
    assert sum(tally.count for tally in manifest.dropped.values()) + manifest.records("train") == len(examples)
    assert read_manifest(tmp_path / "shards") == manifest


def test_latents_that_float16_cannot_hold_are_dropped(tmp_path: Path):
    class Bright(MeanColor):
        def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            mean, std = super().encode(images)
            return np.where(mean > 0.9, 1e6, mean), std

    examples = [Example(color, plain(16, 16, color), "x") for color in ("red", "black")]
    manifest = write(ListSource(train=examples), tmp_path / "shards", image_encoder=Bright())
    assert manifest.dropped["latents are not finite in float16"].ids == ["red"]
    assert manifest.records("train") == 1


def test_altered_inputs_are_counted_and_named(tmp_path: Path):
    examples = [
        Example("long", plain(32, 32), "abcdef"),
        Example("fits", plain(32, 40), "abcde"),
        Example("empty", plain(31, 32), " "),
    ]
    manifest = write(ListSource(train=examples), tmp_path / "shards", resolutions=(32, 16))
    assert {reason: tally.ids for reason, tally in manifest.altered.items()} == {
        "caption was cut to 5 tokens": ["long"],
        "caption is empty, and trains the unconditional model": ["empty"],
        "image was enlarged to 32 px": ["empty"],
    }
    assert manifest.resolutions == (16, 32)
    assert load_split(tmp_path / "shards", "train", 32)["latent_mean"].shape == (3, 4, 4, 3)


def test_only_the_first_ids_are_named(tmp_path: Path):
    examples = [Example(str(number), b"", "x") for number in range(100)] + [Example("good", plain(16, 16), "x")]
    (tally,) = write(ListSource(train=examples), tmp_path / "shards").dropped.values()
    assert (tally.count, len(tally.ids)) == (100, 20)


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(UserError, match=r"No example of list is usable: image cannot be decoded .* \(2\)\.$"):
        write(ListSource(train=[Example("1", b"", ""), Example("2", b"", "")]), tmp_path / "shards")
    with pytest.raises(UserError, match="it is empty"):
        write(ListSource(train=[]), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_samples_have_the_posteriors_moments_and_depend_on_the_id_alone(tmp_path: Path):
    examples = [Example(str(number), plain(64, 64), "x") for number in range(20)]

    def samples(name: str, examples: list[Example], **changed) -> np.ndarray:
        write(ListSource(train=examples), tmp_path / name, resolutions=(64,), posterior="sample", **changed)
        return load_split(tmp_path / name, "train", 64)["latent_mean"]

    first = samples("first", examples)
    noise = (first - np.array([1, -1, -1])) / 0.5
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert len(np.unique(noise[:, 0, 0, 0])) == len(examples)
    np.testing.assert_array_equal(samples("reversed", examples[::-1], batch_size=7)[::-1], first)
    assert not np.array_equal(samples("seeded", examples, seed=1), first)


def test_decoding_turns_upright_and_puts_transparency_on_white():
    upright = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(encoded(upright, "JPEG", exif=exif)).size == (10, 20)

    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert decode_image(encoded(transparent)).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("LA", (4, 4), (0, 128))
    assert decode_image(encoded(half)).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (4, 4))
    assert decode_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "TIFF")).getpixel((0, 0)) == (0, 0, 0)
    deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert decode_image(encoded(deep)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (31, 17), (16, 16), (8, 200)])
def test_a_crop_is_the_middle_at_full_height_or_width(size: tuple[int, int]):
    width, height = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = 250 * (np.arange(width) + 0.5) / width
    ramp[..., 1] = 250 * (np.arange(height) + 0.5)[:, None] / height
    crop = center_crop(Image.fromarray(ramp), 16).astype(float)
    assert crop.shape == (16, 16, 3)
    for channel, axis, side in ((0, 1, width), (1, 0, height)):
        line = crop[..., channel].mean(1 - axis)
        assert line.mean() == pytest.approx(125, abs=10)
        shown = min(width, height) / side  # the part of the ramp that is inside
        assert line[-1] - line[0] == pytest.approx(250 * shown * 15 / 16, abs=14)


def test_threads_keep_the_order():
    assert list(map_in_threads(lambda index: index, 200)) == list(range(200))
    assert list(map_in_threads(lambda index: index, 0)) == []


def test_progress_is_reported_at_the_end_of_each_split(tmp_path: Path):
    lines: list[str] = []
    examples = [Example(str(number), plain(16, 16), "x") for number in range(5)]
    write(ListSource(train=examples, validation=examples[:2]), tmp_path / "shards", report=lines.append)
    assert [line.partition(",")[0] for line in lines] == ["train: 5 of 5 examples", "validation: 2 of 2 examples"]


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes precompute open the small source and encoders of this file."""
    image = plain(16, 16)
    examples = [Example("good", image, "ok"), Example("bad", b"", "x"), Example("long", image, "abcdef")]
    monkeypatch.setattr(command, "open_source", lambda spec, px: ListSource(train=examples))
    monkeypatch.setattr(command, "load_image_encoder", lambda path: MeanColor())
    monkeypatch.setattr(command, "load_text_encoder", lambda name, tokens: Letters())


@pytest.mark.usefixtures("loaders")
def test_the_summary_says_what_was_made_dropped_and_altered(tmp_path: Path):
    lines: list[str] = []
    precompute("list", str(tmp_path / "shards"), (16,), "vae", report=lines.append)
    first, dropped, altered = lines[-1].split("\n")
    assert "train 2 examples" in first
    assert dropped == "dropped 1: image cannot be decoded (UnidentifiedImageError): bad"
    assert altered == "altered 1: caption was cut to 5 tokens: long"


@pytest.mark.usefixtures("loaders")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resolutions": ()}, "must be positive"),
        ({"resolutions": (0,)}, "must be positive"),
        ({"batch_size": 0}, "must be positive"),
        ({"resolutions": (16, 20)}, "Resolution 20 is not a multiple of 8"),
        ({"posterior": "mode"}, "Unknown posterior 'mode': choose one of mean_std, sample"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, changed: dict, message: str):
    arguments = {"source": "list", "out": str(tmp_path / "shards"), "resolutions": (16,), "vae": "vae"}
    with pytest.raises(UserError, match=message):
        precompute(**arguments | changed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("loaders")
def test_finished_shards_are_kept(tmp_path: Path):
    precompute("list", str(tmp_path / "shards"), (16,), "vae", report=lambda line: None)
    with pytest.raises(UserError, match="holds finished shards already"):
        precompute("list", str(tmp_path / "shards"), (16,), "vae", report=lambda line: None)


def test_the_command_prints_one_line_for_an_error_and_its_flags_for_help(tmp_path: Path):
    def run(*flags: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "micro_dit.precompute", *flags], capture_output=True, text=True)

    failed = run("--source=nothing", f"--out={tmp_path / 'shards'}", "--vae=nowhere", "--resolutions=16")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.count("\n") == 1
    assert "nothing" in failed.stderr
    shown = run("--help").stdout
    for flag in ("--source", "--out", "--vae", "--resolutions", "--text_encoder", "--posterior", "--minimum_side"):
        assert flag in shown
