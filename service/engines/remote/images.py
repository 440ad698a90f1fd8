"""Images for a remote server: the file as it came where every decoder reads it the same, else PNG.

Orientation, colour profiles, CMYK, transparency, WebP and HEIC never depend on the decoder of the
other server.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

from service.engines.common.reducing import reduce_all
from service.types import ImageRows, ImageSource

MAX_PIXELS = 16_777_216
"""Maximum area of an image that is sent, in pixels: Qwen3-VL reduces larger ones."""
_PNG_LEVEL = 1
"""Compression of PNG files: a higher level takes several times as long and saves little."""
_ENCODE_BYTES = 8
"""Memory for each pixel that is encoded, in bytes: its colours, resized, and the file."""


async def files(images: Sequence[ImageSource]) -> list[tuple[str, bytes]]:
    """Media type and bytes of every image, in order.

    Raises ``ImageError`` for a damaged file, ``Overloaded`` without memory to decode it.
    """
    found: list[tuple[str, bytes] | None] = [await as_sent(image) for image in images]
    others = [index for index, one in enumerate(found) if one is None]

    def encode(index: int, image: ImageSource, rows: ImageRows) -> tuple[str, bytes]:
        return "image/png", png_of(rows, image.min_pixels, image.max_pixels)

    def needs_bytes(image: ImageSource) -> int:
        return _ENCODE_BYTES * max(image.width * image.height, image.min_pixels or 0)

    encoded = await reduce_all([images[index] for index in others], encode, needs_bytes)
    for index, file in zip(others, encoded, strict=True):
        found[index] = file
    return [one for one in found if one is not None]


async def as_sent(image: ImageSource) -> tuple[str, bytes] | None:
    """The file as it came, if it is plain and within the bounds of the image."""
    file = await image.file()
    pixels = image.width * image.height
    low, high = bounds(image.min_pixels, image.max_pixels)
    if file is None or not file.plain or not low <= pixels <= high:
        return None
    return f"image/{file.format.lower()}", file.data


def bounds(min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """Smallest and largest area of an image that is sent, in pixels."""
    high = min(MAX_PIXELS, max_pixels or MAX_PIXELS)
    return min(min_pixels or 0, high), high


def png_of(rows: ImageRows, min_pixels: int | None, max_pixels: int | None) -> bytes:
    """The image as a PNG file: RGB, 8 bits, resized to its bounds."""
    import numpy as np
    from PIL import Image as PillowImage

    image = PillowImage.fromarray(np.asarray(rows))
    low, high = bounds(min_pixels, max_pixels)
    pixels = image.width * image.height
    if not low <= pixels <= high:
        image = image.resize(_resized(image.size, low, high), PillowImage.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=_PNG_LEVEL)
    return file.getvalue()


def _resized(size: tuple[int, int], low: int, high: int) -> tuple[int, int]:
    width, height = size
    pixels = width * height
    if pixels > high:
        scale = math.sqrt(high / pixels)
        return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    scale = math.sqrt(low / pixels)
    return math.ceil(width * scale), math.ceil(height * scale)


def data_url(media_type: str, data: bytes) -> str:
    """The image inside a URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
