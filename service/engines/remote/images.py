"""Images for a remote server: the file as it came where every decoder reads it the same, else PNG.

Orientation, colour profiles, CMYK, transparency, WebP and HEIC never depend on the decoder of the
other server. A server of this project gets files as they came, because it reads them as this one.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pybase64

from lmdeploy_ext.encoder.sizes import smart_resize
from service.engines.common.reducing import reduce_all
from service.errors import ImageError
from service.types import ImageFile, ImageRows, ImageSource

MAX_PIXELS = 16_777_216
"""Maximum area of an image that is sent, in pixels: Qwen3-VL reduces larger ones."""
STEP = 32
"""Pixels per side of one image token of Qwen3-VL: patches of 16 pixels, two by two."""
OWN_FORMATS = ("JPEG", "PNG", "WebP")
"""Formats that every server of this project reads; HEIC is accepted only where the operator wants it."""
INLINE_BYTES = 256 * 1024
"""Size of images up to which they are encoded in base64 on the event loop, which takes less than a
millisecond: a thread would cost as much."""
_PNG_LEVEL = 1
"""Compression of PNG files: a higher level takes several times as long and saves little."""
_ENCODE_BYTES = 8
"""Memory for each pixel that is encoded, in bytes: its colours, resized, and the file."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """The size in which images are sent.

    resize: in the size of the model's own processing, so that the server has nothing to resize;
    otherwise the image keeps its size within the bounds of its request. min_pixels, max_pixels: of the
    model's own processing, where the request has no bounds.
    """

    resize: bool = False
    min_pixels: int = 65_536
    max_pixels: int = MAX_PIXELS

    def of(self, index: int, image: ImageSource) -> tuple[int, int]:
        """Width and height in which the image is sent. Raises ``ImageError``."""
        if not self.resize:
            return _bounded(image)
        high = min(MAX_PIXELS, image.max_pixels or max(self.max_pixels, image.min_pixels or 0))
        low = min(image.min_pixels or self.min_pixels, high)
        try:
            height, width = smart_resize(image.height, image.width, STEP, low, high)
        except ValueError as error:
            raise ImageError(f"images[{index}].data", str(error)) from None
        return width, height


AS_THEY_ARE = Sizing()


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """An image for a body of JSON. base64: ASCII."""

    media_type: str
    base64: bytes

    @property
    def url(self) -> bytes:
        """The image inside a data URL."""
        return b"data:%s;base64,%s" % (self.media_type.encode("ascii"), self.base64)


@dataclass(frozen=True, slots=True)
class WholeFile:
    """An image for a server of this project, which applies the bounds itself."""

    data: bytes
    min_pixels: int | None
    max_pixels: int | None


class Outgoing:
    """The images of one request, in the order of the prompt, encoded when a server first needs them.

    Every server of the request gets the same bytes. Raises ``ImageError`` for a damaged file,
    ``Overloaded`` without memory to decode it.
    """

    def __init__(self, images: Sequence[ImageSource], sizing: Sizing = AS_THEY_ARE) -> None:
        self._images = tuple(images)
        self._sizing = sizing
        self._encoded: list[EncodedFile] | None = None
        self._files: list[WholeFile] | None = None

    async def encoded(self) -> list[EncodedFile]:
        """Files in base64."""
        if self._encoded is None:
            found = await files(self._images, self._sizing)
            if sum(len(data) for _, data in found) <= INLINE_BYTES:
                self._encoded = _in_base64(found)
            else:
                self._encoded = await asyncio.to_thread(_in_base64, found)
        return self._encoded

    async def files(self) -> list[WholeFile]:
        """Files for a server of this project."""
        if self._files is None:
            self._files = await _whole_files(self._images)
        return self._files


async def files(
    images: Sequence[ImageSource], sizing: Sizing = AS_THEY_ARE
) -> list[tuple[str, bytes]]:
    """Media type and bytes of every image, in order.

    Raises ``ImageError`` for a damaged file, ``Overloaded`` without memory to decode it.
    """
    if not images:
        return []
    sizes = [sizing.of(index, image) for index, image in enumerate(images)]
    came = zip(images, sizes, await _received(images), strict=True)
    found = [_as_it_came(*one) for one in came]
    kept = [one for one in found if one is not None]
    if len(kept) == len(found):
        return kept
    others = [index for index, one in enumerate(found) if one is None]

    def encode(number: int, image: ImageSource, rows: ImageRows) -> tuple[str, bytes]:
        return "image/png", png_of(rows, sizes[others[number]])

    def needs_bytes(image: ImageSource) -> int:
        width, height = sizes[images.index(image)]
        return _ENCODE_BYTES * max(image.width * image.height, width * height)

    encoded = await reduce_all([images[index] for index in others], encode, needs_bytes)
    for index, file in zip(others, encoded, strict=True):
        found[index] = file
    return [one for one in found if one is not None]


def _as_it_came(
    image: ImageSource, size: tuple[int, int], file: ImageFile | None
) -> tuple[str, bytes] | None:
    """Media type and bytes of a file that is plain and has the size in which it is sent."""
    if file is None or not file.plain or size != (image.width, image.height):
        return None
    return f"image/{file.format.lower()}", file.data


async def _received(images: Sequence[ImageSource]) -> list[ImageFile | None]:
    """The files of all images. Each small file is looked through on the event loop, which takes
    milliseconds where it was made to take long, so that other calls have their turn in between."""
    found: list[ImageFile | None] = []
    for image in images:
        if found:
            await asyncio.sleep(0)
        found.append(await image.file())
    return found


async def _whole_files(images: Sequence[ImageSource]) -> list[WholeFile]:
    """Files as they came; others as PNG in their own size."""
    came = await _received(images)
    data = [one.data if one is not None and one.format in OWN_FORMATS else None for one in came]
    others = [index for index, one in enumerate(data) if one is None]

    def encode(number: int, image: ImageSource, rows: ImageRows) -> bytes:
        return png_of(rows, (image.width, image.height))

    def needs_bytes(image: ImageSource) -> int:
        return _ENCODE_BYTES * image.width * image.height

    encoded = await reduce_all([images[index] for index in others], encode, needs_bytes)
    for index, file in zip(others, encoded, strict=True):
        data[index] = file
    return [
        WholeFile(one, image.min_pixels, image.max_pixels)
        for one, image in zip(data, images, strict=True)
        if one is not None
    ]


def png_of(rows: ImageRows, size: tuple[int, int]) -> bytes:
    """The image as a PNG file of this width and height: RGB, 8 bits. Resized by bicubic
    interpolation, as the model's own processing does."""
    import numpy as np
    from PIL import Image as PillowImage

    image = PillowImage.fromarray(np.asarray(rows))
    if image.size != size:
        image = image.resize(size, PillowImage.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=_PNG_LEVEL)
    return file.getvalue()


def _bounded(image: ImageSource) -> tuple[int, int]:
    """Width and height within the bounds of the request."""
    width, height = image.width, image.height
    high = min(MAX_PIXELS, image.max_pixels or MAX_PIXELS)
    low = min(image.min_pixels or 0, high)
    pixels = width * height
    if pixels > high:
        scale = math.sqrt(high / pixels)
        return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    if pixels < low:
        scale = math.sqrt(low / pixels)
        return math.ceil(width * scale), math.ceil(height * scale)
    return width, height


def _in_base64(found: Sequence[tuple[str, bytes]]) -> list[EncodedFile]:
    return [EncodedFile(media_type, pybase64.b64encode(data)) for media_type, data in found]
