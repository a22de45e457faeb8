"""From the bytes of an image file, whatever is in them, to square crops.

Nothing here is trusted: a file may be empty, cut short, no image at all, or small on disk and huge in memory.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

# Photographs and drawings. Pillow reads more, and starts another program for some of it (Ghostscript for EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Decoded, that is 0.5 GB for each worker. Pillow itself refuses more, and warns from half of it.
MAXIMUM_PIXELS = 2 * 89_478_485
UPRIGHT = {  # how to turn an image, by its EXIF orientation
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
    """Says why an image file cannot be used: one of a small fixed set of reasons, without ids or numbers of its own."""


def crop_image(data: bytes, resolutions: Sequence[int], minimum_side: int) -> tuple[dict[int, np.ndarray], int]:
    """Decodes an image file and crops it at every resolution.

    Returns:
        The crops by resolution r, (r, r, 3) uint8, and the smaller side of the image in pixels.

    Raises:
        UnusableImage: It cannot be decoded, is too large, or its smaller side is below `minimum_side`.
    """
    if not data:
        raise UnusableImage("image file is empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if min(image.size) < minimum_side:  # the header says so; no need to decode the rest
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
    except Exception as error:  # a broken file makes Pillow raise nearly anything, from SyntaxError to struct.error
        raise UnusableImage(f"image is damaged ({type(error).__name__})") from error
    return {resolution: center_crop(image, resolution) for resolution in resolutions}, min(image.size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decodes an opened image (the first frame) to RGB, upright, on white where it is transparent."""
    orientation = read_orientation(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def read_orientation(image: Image.Image) -> int | None:
    """The EXIF orientation; None without one, also where the EXIF data are damaged, the pixels can still be good."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # as above: nearly anything
        return None


def center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """Resizes the smaller side to `resolution` (bicubic) and takes the middle: (resolution, resolution, 3) uint8.

    The pixels are those of resizing the whole image and cropping it then, without computing what is cut off.
    """
    width, height = image.size
    smaller = min(width, height)
    resized = width * resolution // smaller, height * resolution // smaller
    left, top = (round((side - resolution) / 2) for side in resized)
    x, y = width / resized[0], height / resized[1]  # pixels of the image for each one of the resized image
    box = (left * x, top * y, min((left + resolution) * x, width), min((top + resolution) * y, height))
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))
