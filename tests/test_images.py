"""Tests of caption grids and of image and animation files."""

from pathlib import Path
from typing import Any, Never

import numpy as np
import pytest
from PIL import Image, ImageColor

from micro_dit import images as grids
from micro_dit.images import PAPER, caption_grid, save_gif, save_png

RED = (200, 10, 10)


def red_images(n: int, side: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(RED), (n, side, side, 3)).copy()


def red_tiles(sheet: Any) -> list[tuple[int, int, int, int]]:
    """Returns the bounding boxes (left, top, width, height) of the images on a sheet."""
    red = (np.asarray(sheet) == RED).all(-1)
    rows, columns = red.any(1), red.any(0)

    def spans(line: Any) -> list[tuple[int, int]]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(int), [0]])))
        return list(zip(edges[::2], edges[1::2] - edges[::2], strict=True))

    return [(x, y, w, h) for y, h in spans(rows) for x, w in spans(columns) if red[y, x]]


@pytest.mark.parametrize(("side", "scale", "shown"), [(32, 1, 96), (64, 1, 128), (128, 1, 128), (128, 2, 256)])
def test_small_images_are_enlarged_by_integer_factors(side: int, scale: int, shown: int) -> None:
    tiles = red_tiles(caption_grid(red_images(5, side), ["a cat"] * 5, columns=3, scale=scale))
    assert len(tiles) == 5
    assert {tile[2:] for tile in tiles} == {(shown, shown)}
    assert len({tile[0] for tile in tiles}) == 3


def test_pixels_are_unchanged_without_enlargement() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8)
    sheet = np.asarray(caption_grid(images, [""]))
    windows = [sheet[y : y + 128, x : x + 128] for y in range(30) for x in range(30)]
    assert any(window.shape == images[0].shape and (window == images[0]).all() for window in windows)


def test_long_captions_enlarge_the_grid_and_stay_inside() -> None:
    short = caption_grid(red_images(2, 96), ["cat", "dog"])
    long = caption_grid(red_images(2, 96), ["cat", "a very long caption " * 40])
    assert long.height > short.height
    endless = "x" * 500
    assert caption_grid(red_images(2, 96), ["cat", endless]).height <= long.height
    margin = np.asarray(long)[:, -8:]
    assert (margin == ImageColor.getrgb(PAPER)).all(), "text extends over the edge"


@pytest.mark.parametrize("text", ["two words", "incomprehensibilities " * 3, "one " * 100, "", "猫 と 犬"])
def test_wrapped_lines_fit_and_keep_all_words(text: str) -> None:
    font = grids._font(12)
    lines = grids._wrap(text, font, 90, most=1000)
    assert all(grids._length(line, font) <= 90 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(lines)


def test_truncated_text_ends_with_an_ellipsis() -> None:
    font = grids._font(12)
    lines = grids._wrap("one two three " * 30, font, 90, most=3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert grids._length(lines[-1], font) <= 90


def test_title_is_above_the_images() -> None:
    plain = caption_grid(red_images(4, 96), ["x"] * 4)
    titled = caption_grid(red_images(4, 96), ["x"] * 4, title="step 1,000")
    assert titled.width == plain.width
    assert red_tiles(titled)[0][1] > red_tiles(plain)[0][1]


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (7, 4), (8, 4), (12, 4), (16, 4)])
def test_number_of_columns_fills_the_grid(n: int, columns: int) -> None:
    assert grids._columns_that_fill(n) == columns


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), ["a", "b"]),
        (np.zeros((8, 8, 3), np.uint8), ["a"] * 8),
        (np.zeros((0, 8, 8, 3), np.uint8), []),
        (np.zeros((2, 8, 8, 3), np.uint8), ["a"]),
    ],
)
def test_invalid_input_raises_an_error(images: Any, captions: Any) -> None:
    with pytest.raises(ValueError, match="images"):
        caption_grid(images, captions)


def test_png_keeps_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "grid.png"
    metadata = {"prompt": "grinning cat", "caption": "σ = 0.5, 猫 🐱", "seed": "7"}
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    save_png(image, path, metadata)
    with Image.open(path) as read:
        assert read.text == metadata
        assert (np.asarray(read) == image).all()
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_png(red_images(1, 4)[0], path)
    before = path.read_bytes()

    def half(self: Any, file: Any, **options: Any) -> Never:
        file.write_bytes(b"incomplete")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_png(red_images(1, 8)[0], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_gif_has_all_frames_and_durations(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sheets = [caption_grid(rng.integers(0, 256, (2, 96, 96, 3), np.uint8), ["a", "b"], title=f"{i}") for i in range(4)]
    frames = [Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8)), *sheets]
    path = tmp_path / "training.gif"
    save_gif(frames, path, seconds_per_frame=0.2, hold_last=1.5)
    with Image.open(path) as gif:
        assert gif.n_frames == 5
        assert gif.size == sheets[-1].size
        assert gif.info["loop"] == 0
        durations = []
        for i in range(5):
            gif.seek(i)
            durations.append(gif.info["duration"])
            if i:
                assert gif.convert("RGB").getpixel((2, 2)) == ImageColor.getrgb(PAPER)
        assert durations == [200, 200, 200, 200, 1500]
        actual, expected = np.asarray(gif.convert("RGB"), int), np.asarray(sheets[-1], int)
    assert np.abs(actual - expected).mean() < 8  # a palette of 256 colors for random noise
