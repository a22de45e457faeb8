"""Decodes untrusted image files and crops them to squares.

A file may be empty, truncated, not an image, or small on disk but huge in memory.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

# Other formats that Pillow supports are excluded; some of them start another program (Ghostscript for EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Pillow's own limit (it warns above half of it): 0.5 GB per worker when decoded.
MAXIMUM_PIXELS = 2 * 89_478_485
UPRIGHT = {  # EXIF orientation to the transpose that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # EXIF tag


class UnusableImage(Exception):
    """An image file cannot be used. The reason is one of a small fixed set, so that files can be counted by reason."""


def crop_image(data: bytes, resolutions: Sequence[int], minimum_side: int) -> tuple[dict[int, np.ndarray], int]:
    """Decodes an image file and crops it at every resolution.

    Args:
        data: Contents of the image file.
        resolutions: Sides of the crops in pixels.
        minimum_side: Minimum length in pixels of the smaller side of the image.

    Returns:
        The crops by resolution r, (r, r, 3) uint8, and the smaller side of the image in pixels.

    Raises:
        UnusableImage: The image cannot be decoded, is too large, or is smaller than `minimum_side`.
    """
    if not data:
        raise UnusableImage("image file is empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if min(image.size) < minimum_side:  # known from the header, before decoding
            raise UnusableImage(f"image is smaller than {minimum_side} px")
        if image.width * image.height > MAXIMUM_PIXELS:
            raise Image.DecompressionBombError
        image = to_rgb(image)
    except UnusableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnusableImage("file is not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise UnusableImage(f"image has more than {MAXIMUM_PIXELS // 10**6} megapixels") from error
    except Exception as error:  # Pillow raises many types for damaged files, from SyntaxError to struct.error
        raise UnusableImage(f"image is damaged ({type(error).__name__})") from error
    return {resolution: center_crop(image, resolution) for resolution in resolutions}, min(image.size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes the first frame of an opened image to upright RGB, with transparency composited on white."""
    orientation = read_orientation(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit values instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def read_orientation(image: Image.Image) -> int | None:
    """Returns the EXIF orientation, or None if it is missing or the EXIF data are damaged."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data raise many types, while the pixels may still be intact
        return None


def center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """Resizes the smaller side to `resolution` (bicubic) and crops the center: (resolution, resolution, 3) uint8.

    Equivalent to resizing the whole image and then cropping it, but computes only the pixels that are kept.
    """
    width, height = image.size
    smaller = min(width, height)
    resized = width * resolution // smaller, height * resolution // smaller
    left, top = (round((side - resolution) / 2) for side in resized)
    x, y = width / resized[0], height / resized[1]  # image pixels per resized pixel
    box = (left * x, top * y, min((left + resolution) * x, width), min((top + resolution) * y, height))
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))
