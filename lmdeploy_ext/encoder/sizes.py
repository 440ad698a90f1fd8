"""The size to which Qwen3-VL resizes an image. Imports nothing heavy: it is also needed without torch."""

from __future__ import annotations

import math

MAX_ASPECT_RATIO = 200  # of the sides of an image; the limit of transformers' smart_resize


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width of the resized image.

    Both are multiples of ``factor``; the area is kept between ``min_pixels`` and ``max_pixels``,
    the aspect ratio as closely as that allows. Same numbers as transformers' ``smart_resize``.

    Raises:
        ValueError: an empty image, or sides more than 1:200 apart.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image of {height}x{width} pixels is empty")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"aspect ratio of {height}x{width} pixels exceeds {MAX_ASPECT_RATIO}:1; crop it"
        )
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor
