import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from micro_dit.data.images import UnusableImage, center_crop, crop_image, to_rgb
from tests.helpers.pictures import QUADRANTS, encoded, png_of_zeros, quadrants

GRAYS = np.array([[10, 90], [170, 250]], np.uint8)


def corners(data: bytes) -> np.ndarray:
    """Returns the colors at the centers of the four quadrants, (2, 2, 3)."""
    crops, _ = crop_image(data, [16], 1)
    return crops[16][4::8, 4::8].astype(int)


def gray_to_rgb(grays: np.ndarray) -> np.ndarray:
    return np.repeat(grays[..., None], 3, -1).astype(int)


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95}, 4),
        ("JPEG", {"quality": 95, "progressive": True}, 4),
        ("WEBP", {"quality": 95}, 8),
        ("AVIF", {"quality": 95}, 8),
        ("JPEG2000", {}, 1),
    ],
)
def test_formats(format: str, options: dict, tolerance: int) -> None:
    assert np.abs(corners(encoded(quadrants(), format, **options)) - QUADRANTS).max() <= tolerance


def test_color_modes() -> None:
    gray = gray_to_rgb(GRAYS)
    np.testing.assert_array_equal(corners(encoded(quadrants(GRAYS))), gray)
    assert np.abs(corners(encoded(quadrants(GRAYS), "JPEG")) - gray).max() <= 3
    deep = Image.fromarray(GRAYS.astype(np.uint16).repeat(16, 0).repeat(16, 1) * 257)
    assert deep.mode == "I;16"
    np.testing.assert_array_equal(corners(encoded(deep)), gray)
    np.testing.assert_array_equal(corners(encoded(quadrants(GRAYS).point(lambda v: v > 100, "1"))) > 0, gray > 100)
    np.testing.assert_array_equal(corners(encoded(quadrants().quantize(8))), QUADRANTS)
    assert np.abs(corners(encoded(quadrants().convert("CMYK"), "JPEG", quality=95)) - QUADRANTS).max() <= 6
    np.testing.assert_array_equal(corners(encoded(quadrants().convert("CMYK"), "TIFF")), QUADRANTS)
    # Compressed, because Pillow 12 cannot read uncompressed YCbCr files that it has written.
    assert np.abs(corners(encoded(quadrants().convert("YCbCr"), "TIFF", compression="jpeg")) - QUADRANTS).max() <= 6


def test_transparency_becomes_white() -> None:
    white = QUADRANTS.astype(int)
    white[0, 0] = 255
    alpha = np.full((2, 2, 1), 255, np.uint8)
    alpha[0, 0] = 0
    rgba = quadrants(np.concatenate([QUADRANTS, alpha], -1))
    np.testing.assert_array_equal(corners(encoded(rgba)), white)
    np.testing.assert_array_equal(corners(encoded(rgba, "WEBP", lossless=True)), white)
    gray_alpha = quadrants(np.stack([GRAYS, alpha[..., 0]], -1))
    assert corners(encoded(gray_alpha))[:, :, 0].tolist() == [[255, 90], [170, 250]]
    palette = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8).repeat(16, 0).repeat(16, 1), "P")
    palette.putpalette(QUADRANTS.reshape(-1).tolist())
    np.testing.assert_array_equal(corners(encoded(palette, transparency=0)), white)
    np.testing.assert_array_equal(corners(encoded(palette, "GIF", transparency=0)), white)
    half = encoded(Image.new("LA", (16, 16), (0, 128)))
    assert (corners(half) == 127).all()


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_first_frame_of_an_animation_is_used(format: str, options: dict) -> None:
    black = Image.new("RGB", (32, 32))
    data = encoded(quadrants(), format, save_all=True, append_images=[black, black], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames >= 2
    np.testing.assert_array_equal(corners(data), QUADRANTS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(quadrants().resize((32, 48)), format, exif=exif)
    upright = to_rgb(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(upright, ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert upright.size == ((32, 48) if orientation < 5 else (48, 32))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_are_ignored() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40
    assert np.abs(corners(encoded(quadrants(), "JPEG", quality=95, exif=exif)) - QUADRANTS).max() <= 4


def cut(format: str) -> bytes:
    data = encoded(Image.effect_noise((64, 64), 50), format)
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image file is empty"),
        (b"this is no image\n" * 40, "file is not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n", "file is not an image"),
        (encoded(Image.new("RGB", (64, 64)))[:20], r"file is not an image|image is damaged"),
        (cut("JPEG"), r"image is damaged \(OSError\)"),
        (cut("PNG"), r"image is damaged \(OSError\)"),
        (cut("WEBP"), r"file is not an image|image is damaged"),
        (encoded(Image.new("RGB", (1, 1))), "image is smaller than 16 px"),
        (encoded(Image.new("RGB", (2000, 15))), "image is smaller than 16 px"),
        (png_of_zeros(16000), "image has more than 178 megapixels"),
    ],
)
def test_unusable_images_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnusableImage, match=f"^({reason})"):
        crop_image(data, [16], 16)


def test_size_is_checked_before_decoding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns above half of the limit
        with pytest.raises(UnusableImage, match="smaller"):
            crop_image(encoded(Image.new("1", (9000, 20))), [16], 32)


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (31, 17), (16, 16), (8, 200), (257, 255), (640, 427), (7, 5)])
def test_crop_equals_resizing_and_then_cropping(size: tuple[int, int]) -> None:
    # Values far from black and white avoid clipping between Pillow's two passes, whose order depends on the size.
    image = Image.fromarray(np.random.default_rng(0).integers(64, 192, (*size[::-1], 3), np.uint8))
    resized = image.resize(tuple(side * 16 // min(size) for side in size), Image.Resampling.BICUBIC)
    left, top = (round((side - 16) / 2) for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + 16, top + 16))).astype(int)
    crop = center_crop(image, 16)
    assert (crop.shape, crop.dtype) == ((16, 16, 3), np.uint8)
    assert np.abs(crop - expected).max() <= 1


def test_only_the_crop_of_a_very_long_image_is_resized() -> None:
    long = np.zeros((20, 10_000, 3), np.uint8)
    long[:, 5000:] = (0, 0, 255)
    long[:, :5000] = (255, 0, 0)
    crops, side = crop_image(encoded(Image.fromarray(long)), [256, 512], 16)
    assert side == 20
    for resolution, crop in crops.items():  # at 512 px, the whole resized image would have 131 megapixels
        assert crop[:, : resolution // 2 - 40].mean((0, 1)).tolist() == [255, 0, 0]
        assert crop[:, resolution // 2 + 40 :].mean((0, 1)).tolist() == [0, 0, 255]
