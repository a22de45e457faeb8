"""Image files for tests."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

QUADRANTS = np.array([[[200, 30, 40], [20, 190, 60]], [[30, 50, 220], [230, 220, 210]]], np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def quadrants(colors: np.ndarray = QUADRANTS, side: int = 32) -> Image.Image:
    """Returns an image of four squares of different colors."""
    return Image.fromarray(colors.repeat(side // 2, 0).repeat(side // 2, 1))


def png_of_zeros(side: int) -> bytes:
    """Returns a black PNG file that is small on disk but huge when decoded, without allocating its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj()
    rows = b"".join(compressor.compress(bytes(1 + side // 8)) for _ in range(side)) + compressor.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
