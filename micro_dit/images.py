"""Draws grids of captioned images, writes image and animation files, and defines the style of plots."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from micro_dit.files import replacing

PAPER, INK, FAINT = "#fbfaf7", "#26241f", "#8a857a"
ImageLike = Image.Image | np.ndarray  # an array is (H, W, 3) uint8
SMALLEST_TILE = 96  # pixels; smaller images are enlarged to leave room for their captions
CAPTION_LINES = 6

# ---- Grids -----------------------------------------------------------------------------------------------------------


def caption_grid(
    images: np.ndarray, captions: Sequence[str], columns: int | None = None, title: str = "", scale: int = 1
) -> Image.Image:
    """Returns a grid of images, each with its caption below.

    Args:
        images: (n, H, W, 3) uint8; images narrower than 96 pixels are enlarged by an integer factor.
        captions: n strings, wrapped to the width of an image and truncated after six lines.
        columns: Number of images per row; by default chosen to fill the grid.
        title: Title above the images.
        scale: Integer factor by which all images are enlarged, applied before the minimum width.

    Raises:
        ValueError: The images have a wrong shape or dtype, or the number of captions differs from that of images.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise ValueError(f"images must be uint8 (n, H, W, 3) with n > 0, not {images.dtype} {images.shape}.")
    n, H, W, _ = images.shape
    if len(captions) != n:
        raise ValueError(f"The number of captions must equal that of images, got {len(captions)} and {n}.")
    columns = min(n, columns or _columns_that_fill(n))
    scale *= math.ceil(SMALLEST_TILE / (W * scale)) if W * scale < SMALLEST_TILE else 1
    tile_width, tile_height = W * scale, H * scale

    size = min(22, max(11, tile_width // 14))
    font, title_font = _font(size), _font(round(1.5 * size))
    line, gap, margin = round(1.3 * size), max(10, tile_width // 14), max(16, tile_width // 8)
    wrapped = [_wrap(caption, font, tile_width, CAPTION_LINES) for caption in captions]
    rows = [range(first, min(first + columns, n)) for first in range(0, n, columns)]
    row_heights = [tile_height + size // 2 + line * max(len(wrapped[i]) for i in row) for row in rows]
    width = 2 * margin + columns * tile_width + (columns - 1) * gap
    title_lines = _wrap(title, title_font, width - 2 * margin, CAPTION_LINES) if title else []
    title_height = len(title_lines) * round(1.95 * size) + (gap if title else 0)

    grid = Image.new("RGB", (width, 2 * margin + title_height + sum(row_heights) + (len(rows) - 1) * gap), PAPER)
    for i, text in enumerate(title_lines):
        _draw_text(grid, margin, margin + i * round(1.95 * size), text, title_font)
    y = margin + title_height
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            x = margin + column * (tile_width + gap)
            tile = Image.fromarray(images[i]).resize((tile_width, tile_height), Image.Resampling.BICUBIC)
            grid.paste(tile, (x, y))
            for j, text in enumerate(wrapped[i]):
                indent = (tile_width - _length(text, font)) / 2
                _draw_text(grid, x + indent, y + tile_height + size // 2 + j * line, text, font)
        y += row_height + gap
    return grid


def _columns_that_fill(n: int) -> int:
    """Returns the number of columns for an almost square grid with few empty cells."""
    square = math.ceil(math.sqrt(n))
    return min(range(square, square + 3), key=lambda columns: -n % columns)


# Font hinting spaces small letters unevenly, so text is drawn enlarged and then downscaled.
_OVERSAMPLE = 4


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(_OVERSAMPLE * size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _length(text: str, font: ImageFont.FreeTypeFont) -> float:
    return font.getlength(text) / _OVERSAMPLE


def _draw_text(image: Image.Image, x: float, y: int, text: str, font: ImageFont.FreeTypeFont) -> None:
    width, height = math.ceil(_length(text, font)) + 2, math.ceil(1.4 * font.size / _OVERSAMPLE)
    ink = Image.new("L", (_OVERSAMPLE * width, _OVERSAMPLE * height))
    ImageDraw.Draw(ink).text((_OVERSAMPLE * (x % 1), 0), text, 255, font)
    ink = ink.resize((width, height), Image.Resampling.LANCZOS)
    image.paste(INK, (int(x), y), ink)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """Wraps text to `width` pixels, breaking words that are too long; truncates to `most` lines with an ellipsis."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if _length(candidate, font) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and _length(lines[-1] + letter, font) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        lines = lines[:most]
        while lines[-1] and _length(lines[-1] + "…", font) > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "…"
    return lines if lines[0] else []


# ---- Files -----------------------------------------------------------------------------------------------------------


def save_png(image: ImageLike, path: str | os.PathLike, metadata: Mapping[str, str] = {}) -> None:
    """Writes an image as a PNG file atomically, and creates its folder if it does not exist.

    `PIL.Image.open(path).text` returns the metadata (prompt, seed, checkpoint …). Non-ASCII text is stored as iTXt.
    """
    info = PngInfo()
    for key, value in metadata.items():
        (info.add_text if value.isascii() else info.add_itxt)(key, value)
    with replacing(path) as temporary:
        _as_image(image).save(temporary, format="PNG", pnginfo=info)


def save_gif(
    frames: Sequence[ImageLike], path: str | os.PathLike, seconds_per_frame: float = 0.25, hold_last: float = 2.0
) -> None:
    """Writes a looping GIF animation atomically. All frames are resized to the size of the last one.

    Args:
        frames: PIL images or (H, W, 3) uint8 arrays; at least one.
        path: Path of the GIF file.
        seconds_per_frame: Duration of each frame but the last.
        hold_last: Duration of the last frame in seconds.
    """
    if not frames:
        raise ValueError("An animation requires at least one frame.")
    images = [_as_image(frame).convert("RGB") for frame in frames]
    size = images[-1].size
    images = [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC) for image in images]
    # One palette avoids flicker. Its colors come from frames of the whole animation, because the first are noise.
    chosen = [images[i] for i in np.linspace(0, len(images) - 1, min(8, len(images))).round().astype(int)]
    palette = Image.fromarray(np.concatenate(chosen, axis=1)).quantize(255, Image.Quantize.MEDIANCUT)
    palette.putpalette((palette.getpalette() or [])[: 3 * 255] + list(ImageColor.getrgb(PAPER)))
    quantized = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    for image, frame in zip(images, quantized, strict=True):
        # Pillow's approximate color lookup would tint the background.
        frame.paste(255, mask=Image.fromarray((np.asarray(image) == ImageColor.getrgb(PAPER)).all(-1)))
    milliseconds = [round(1000 * seconds_per_frame)] * (len(quantized) - 1) + [round(1000 * hold_last)]
    options: Any = dict(format="GIF", save_all=True, append_images=quantized[1:], duration=milliseconds, loop=0)
    with replacing(path) as temporary:
        quantized[0].save(temporary, **options)


def _as_image(image: ImageLike) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def file_name(number: int, prompt: str, seed: int) -> str:
    """Returns the PNG file name of a sample, from its number, prompt and seed."""
    words = re.sub(r"\W+", "_", prompt).strip("_")[:40]
    return f"{number:03}_{words or 'unconditional'}_seed_{seed}.png"


# ---- Curves ----------------------------------------------------------------------------------------------------------

TRAIN, HELDOUT, HELDOUT_EMA = "#3b6ea8", "#d07a2d", "#3f8f5f"
STYLE: Any = {  # matplotlib rcParams
    "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT,
    "ytick.color": FAINT, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": PAPER,
    "axes.grid": True, "grid.color": FAINT, "grid.alpha": 0.18, "grid.linewidth": 0.6, "legend.frameon": False,
}  # fmt: skip
