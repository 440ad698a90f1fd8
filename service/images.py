"""Bytes of a caller to a safe RGB picture.

The header alone decides first: format, width, height. Only what is within the limits is decoded,
and only to its end: a truncated file is refused. What decoders say stays here; callers get our
own words.
"""

from __future__ import annotations

import asyncio
import io
import os
import struct
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import ImageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint8]

Kind: TypeAlias = type[JpegImageFile] | type[PngImageFile] | type[WebPImageFile]
FORMATS = "JPEG, PNG and WebP"
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_THREADS = min(8, os.cpu_count() or 1)
_EXECUTOR = ThreadPoolExecutor(_THREADS, thread_name_prefix="decode-image")
# Pillow keeps this many freed blocks of at most 16 MiB. Without, each picture of some 100 KB costs
# about 370 page faults, a third of the time of its decoding.
Image.core.set_blocks_max(_THREADS)  # type: ignore[attr-defined]  # documented, not exported
MAX_JPEG_SCANS = 100
"""Of a progressive picture; encoders write about ten. Each one is a pass over all pixels, and 95 bytes
ask for it: without a bound, a file within the limits keeps the decoder busy for an hour."""
_SCAN = b"\xff\xda"
_Transpose = Image.Transpose
_UPRIGHT = {
    2: _Transpose.FLIP_LEFT_RIGHT,
    3: _Transpose.ROTATE_180,
    4: _Transpose.FLIP_TOP_BOTTOM,
    5: _Transpose.TRANSPOSE,
    6: _Transpose.ROTATE_270,
    7: _Transpose.TRANSVERSE,
    8: _Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds of an encoded picture. ``max_aspect_ratio`` is the longer side over the shorter."""

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 64_000_000
    min_side: int = 1
    max_aspect_ratio: float = 200.0


def decode_image(data: bytes, field: str, limits: ImageLimits) -> Pixels:
    """Decode a JPEG, PNG or WebP file to (height, width, 3) uint8 RGB, upright, C-contiguous.

    Transparent parts lie on white. Of an animation, the first frame counts. 16 bits become 8 by
    scaling.
    Raises ``ImageError`` on ``field``.
    """
    _check_bytes(data, field, limits)
    kind = _kind(data, field)
    if kind is not JpegImageFile:  # their decoders reserve memory when they open a file
        _check_size(*_size(data, kind, field), field, limits)
    try:
        # The class itself: Image.open would apply a global pixel limit and global warnings filters.
        with kind(io.BytesIO(data)) as image:
            if kind is JpegImageFile:
                _check_size(*image.size, field, limits)
                if "progressive" in image.info:
                    _check_scans(data, field)
            # Process-wide, and LMDeploy turns it on when it is imported: half a picture would pass.
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            image.load()
            return _pixels(image)
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever they like on hostile data
        raise _undecodable(data, kind, error, field) from None


async def decode_images(
    items: Sequence[tuple[str, bytes]], limits: ImageLimits, executor: Executor | None = None
) -> list[Pixels]:
    """Decode (field, data) pairs beside the event loop, in order. The first bad one ends it.

    When the caller is cancelled, or a picture is bad, those that have not begun are dropped.
    """
    loop = asyncio.get_running_loop()
    futures = [
        loop.run_in_executor(executor or _EXECUTOR, decode_image, data, field, limits)
        for field, data in items
    ]
    try:
        return [await future for future in futures]
    finally:
        for future in futures:
            future.cancel()
        await asyncio.gather(*futures, return_exceptions=True)


def _check_bytes(data: bytes, field: str, limits: ImageLimits) -> None:
    if not data:
        raise ImageError(field, "is empty", reason="IMAGE_EMPTY")
    if len(data) > limits.max_bytes:
        raise ImageError(
            field,
            f"has {len(data)} bytes, at most {limits.max_bytes} are allowed",
            reason="IMAGE_TOO_LARGE",
            metadata={"limit": str(limits.max_bytes), "actual": str(len(data))},
        )


def _check_scans(data: bytes, field: str) -> None:
    # Compressed data never holds the marker, since there a 0 follows each 255.
    if data.count(_SCAN) > MAX_JPEG_SCANS:
        what = f"is stored in more than {MAX_JPEG_SCANS} scans; save it anew"
        raise ImageError(field, what, reason="IMAGE_INVALID")


def _kind(data: bytes, field: str) -> Kind:
    """The decoder by the content of the file."""
    if data.startswith(_JPEG):
        return JpegImageFile
    if data.startswith(_PNG):
        return PngImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    raise ImageError(
        field,
        f"is not in a format that is accepted; accepted are {FORMATS}",
        reason="IMAGE_FORMAT_UNSUPPORTED",
    )


def _size(data: bytes, kind: Kind, field: str) -> tuple[int, int]:
    """Width and height as the header of a PNG or WebP file tells."""
    chunk = data[12:16]
    try:
        if kind is PngImageFile and chunk == b"IHDR":
            width, height = struct.unpack_from(">II", data, 16)
        elif chunk == b"VP8X":
            width = 1 + int.from_bytes(_part(data, 24, 3), "little")
            height = 1 + int.from_bytes(_part(data, 27, 3), "little")
        elif chunk == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif chunk == b"VP8 ":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        else:
            raise ImageError(field, "has a damaged header")
    except struct.error:
        raise _truncated(field) from None
    return width, height


def _part(data: bytes, start: int, length: int) -> bytes:
    if len(data) < start + length:
        raise struct.error
    return data[start : start + length]


def _check_size(width: int, height: int, field: str, limits: ImageLimits) -> None:
    actual = f"{width}x{height}"
    if width * height > limits.max_pixels:
        raise ImageError(
            field,
            f"has {width * height} pixels ({actual}), at most {limits.max_pixels} are allowed",
            reason="IMAGE_TOO_MANY_PIXELS",
            metadata={"limit": str(limits.max_pixels), "actual": str(width * height)},
        )
    short, long = sorted((width, height))
    least = max(1, limits.min_side)
    if short < least:
        raise ImageError(
            field,
            f"is {actual} pixels, each side needs at least {least}",
            reason="IMAGE_TOO_SMALL",
            metadata={"limit": str(least), "actual": str(short)},
        )
    if long > short * limits.max_aspect_ratio:
        raise ImageError(
            field,
            f"is {actual} pixels, one side may be at most {limits.max_aspect_ratio:g} times "
            "the other",
            reason="IMAGE_ASPECT_RATIO",
            metadata={"limit": f"{limits.max_aspect_ratio:g}", "actual": f"{long / short:.1f}"},
        )


def _pixels(image: Image.Image) -> Pixels:
    """A loaded picture as an upright RGB array. RGB without orientation passes straight through."""
    method = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode != "RGB" or "transparency" in image.info:
        image = _flat(image)
    if method is not None:
        image = image.transpose(method)
    return np.asarray(image)


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except (
        Exception
    ):  # damaged EXIF, in one of many ways: the pixels are sound, so take them as they lie
        return 1
    return value if isinstance(value, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale, scaled; ``convert`` would clip it. One value may stand for transparent."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).clip(0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _flat(image: Image.Image) -> Image.Image:
    """RGB of any other mode; transparent parts become white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _undecodable(data: bytes, kind: Kind, error: Exception, field: str) -> ImageError:
    tail = data[-4096:]
    cut = (
        (kind is JpegImageFile and b"\xff\xd9" not in tail)
        or (kind is PngImageFile and b"IEND" not in tail)
        or (kind is WebPImageFile and int.from_bytes(data[4:8], "little") + 8 > len(data))
    )
    if cut or "truncated" in str(error).lower():
        return _truncated(field)
    return ImageError(field, "is damaged and cannot be decoded", reason="IMAGE_INVALID")


def _truncated(field: str) -> ImageError:
    return ImageError(
        field, "ends before the picture is complete; send the whole file", reason="IMAGE_TRUNCATED"
    )
