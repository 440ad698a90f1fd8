"""Decodes the bytes of a caller safely to an RGB image.

The header is checked first: format, width and height. Only files within the limits are decoded, and
truncated files are refused. Messages of decoders are never passed on to callers.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import ExifTags, Image, ImageFile, _webp
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from lmdeploy_ext.images.errors import ImageRefused
from lmdeploy_ext.images.formats import DEFAULT_FORMATS
from lmdeploy_ext.images.headers import Header, is_complete, read_header, truncated
from lmdeploy_ext.images.rows import (
    STRIP_PIXELS,
    ArrayFrame,
    Colour,
    DecodedImage,
    Frame,
    PillowFrame,
    Pixels,
)

THREADS = min(8, os.cpu_count() or 1)
# Pillow keeps this many freed blocks of at most 16 MiB. Without, each image of some 100 KB costs
# about 370 page faults, a third of the time of its decoding.
Image.core.set_blocks_max(THREADS)  # type: ignore[attr-defined]  # documented, not exported
_STRIP_PIXEL_BYTES = 32
"""Of a pixel of the strip that is converted: in up to five modes, and as an array."""
_WORKING_BYTES = 1 << 20
"""Memory that decoders allocate for an image of any size, in bytes."""
_JPEG_SCALES = (2, 4, 8)
"""Scales at which libjpeg can decode: 1/2, 1/4 and 1/8 of the sides."""
SCALED_FACTOR = 4
"""A JPEG file that is decoded at a reduced size may have this many times the maximum number of
pixels."""
WHITE: Colour = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of accepted images, and options of decoding.

    max_request_pixels: of all images of a request together. max_aspect_ratio: the longer side over
    the shorter. formats: of ``FORMATS``. background: the colour behind transparent parts.
    jpeg_scaled_pixels: JPEG files of more pixels are decoded at 1/2, 1/4 or 1/8 of their sides, and
    may have up to ``SCALED_FACTOR`` times ``max_pixels``; None: never.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_request_pixels: int = 800_000_000
    min_side: int = 1
    max_aspect_ratio: float = 200.0
    formats: tuple[str, ...] = DEFAULT_FORMATS
    background: Colour = WHITE
    jpeg_scaled_pixels: int | None = None


def check_header(data: bytes, field: str, limits: ImageLimits) -> Header:
    """The header of an image that is within the limits. Raises ``ImageRefused`` on ``field``."""
    _check_bytes(data, field, limits)
    header = read_header(data, field, limits.formats)
    most = limits.max_pixels
    if header.format == "JPEG" and limits.jpeg_scaled_pixels is not None:
        most *= SCALED_FACTOR
    stored = max((header.width, header.height), header.stored, key=lambda size: size[0] * size[1])
    _check_pixels(*stored, field, most)
    _check_sides(header.width, header.height, field, limits)
    return _scaled(header, limits)


def _scaled(header: Header, limits: ImageLimits) -> Header:
    """The header of a JPEG file that is decoded at a part of its size where it is above the bound."""
    if header.format != "JPEG" or limits.jpeg_scaled_pixels is None:
        return header
    sides = (header.width, header.height)
    found = header
    for scale in _JPEG_SCALES:
        if found.width * found.height <= limits.jpeg_scaled_pixels:
            break
        width, height = (-(-side // scale) for side in sides)
        found = replace(header, width=width, height=height, scale=scale)
    return found


def check_request_pixels(headers: Sequence[Header], limits: ImageLimits) -> None:
    """Raises ``ImageRefused`` on ``images`` when they have too many pixels together."""
    pixels = sum(header.file_pixels for header in headers)
    if pixels > limits.max_request_pixels:
        raise ImageRefused(
            "images",
            f"have {pixels} pixels together, at most {limits.max_request_pixels} are allowed in a "
            "request; send fewer or smaller images",
            reason="IMAGES_TOO_MANY_PIXELS",
            metadata={"limit": str(limits.max_request_pixels), "actual": str(pixels)},
        )


def decode_image(data: bytes, field: str, limits: ImageLimits) -> Pixels:
    """Decode a JPEG, PNG, WebP or HEIC file to (height, width, 3) uint8 RGB, upright, C-contiguous.

    Transparent parts lie on ``limits.background``. Of an animation, the first frame counts. 16 bits become 8 by
    scaling. Colours of an embedded profile other than sRGB are converted to sRGB.
    Raises ``ImageRefused`` on ``field``.
    """
    return decode(data, check_header(data, field, limits), field, limits)[:]


def decode(data: bytes, header: Header, field: str, limits: ImageLimits) -> DecodedImage:
    """`decode_image` for a header that has been checked; its rows are converted when they are read.

    Raises ``MemoryError`` if the machine has too little memory, never ``ImageRefused``.
    """
    try:
        frame = _FRAMES[header.format](data, header)
        return DecodedImage(frame, header, limits.background, field)
    except MemoryError:
        short_of_memory = True
    except Exception:  # decoders raise exceptions of any type on hostile data, and without memory
        short_of_memory = not _allocatable(decoding_bytes(header))
    # Raised outside the `except` block, so that the error keeps no frames of the decoder, with
    # their images, in memory.
    if short_of_memory:
        raise MemoryError
    if not is_complete(data, header):
        raise truncated(field)
    raise ImageRefused(field, "is damaged and cannot be decoded", reason="IMAGE_INVALID")


def from_pillow(image: Image.Image, field: str, limits: ImageLimits) -> Pixels:
    """The pixels of an image that a program has opened or made with Pillow, as `decode_image`.

    The number of pixels and the sides are checked. Raises ``ImageRefused`` on ``field``.
    """
    _check_pixels(*image.size, field, limits.max_pixels)
    _check_sides(*image.size, field, limits)
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        image.load()
    except OSError:  # Pillow reads the pixels late
        damaged = True
    else:
        damaged = False
    if damaged:
        raise truncated(field)
    if image.mode == "I" and image.format is None:  # 32 bits, and nobody knows their range
        image = image.convert("RGB")
    # Only the size, the orientation and the profile of a header matter for rows.
    header = Header(
        "PNG",
        *image.size,
        orientation=_orientation(image),
        icc=image.info.get("icc_profile") or b"",
    )
    return DecodedImage(PillowFrame(image), header, limits.background, field)[:]


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def decoding_bytes(header: Header) -> int:
    """Upper estimate of the memory to decode an image, from measurements: see
    ``benchmarks/image_memory.py``."""
    pixels = header.width * header.height
    strip = min(pixels, STRIP_PIXELS) * _STRIP_PIXEL_BYTES
    return pixels * header.pixel_bytes + header.kept_bytes + strip + _WORKING_BYTES


def _allocatable(size: int) -> bool:
    try:
        np.empty(size, np.uint8)
    except MemoryError:
        return False
    return True


def _check_bytes(data: bytes, field: str, limits: ImageLimits) -> None:
    if not data:
        raise ImageRefused(field, "is empty", reason="IMAGE_EMPTY")
    if len(data) > limits.max_bytes:
        raise ImageRefused(
            field,
            f"has {len(data)} bytes, at most {limits.max_bytes} are allowed",
            reason="IMAGE_TOO_LARGE",
            metadata={"limit": str(limits.max_bytes), "actual": str(len(data))},
        )


def _check_pixels(width: int, height: int, field: str, most: int) -> None:
    if width * height > most:
        raise ImageRefused(
            field,
            f"has {width * height} pixels ({width}x{height}), at most {most} are allowed",
            reason="IMAGE_TOO_MANY_PIXELS",
            metadata={"limit": str(most), "actual": str(width * height)},
        )


def _check_sides(width: int, height: int, field: str, limits: ImageLimits) -> None:
    actual = f"{width}x{height}"
    short, long = sorted((width, height))
    least = max(1, limits.min_side)
    if short < least:
        raise ImageRefused(
            field,
            f"is {actual} pixels, each side needs at least {least}",
            reason="IMAGE_TOO_SMALL",
            metadata={"limit": str(least), "actual": str(short)},
        )
    if long > short * limits.max_aspect_ratio:
        raise ImageRefused(
            field,
            f"is {actual} pixels, one side may be at most {limits.max_aspect_ratio:g} times "
            "the other",
            reason="IMAGE_ASPECT_RATIO",
            metadata={"limit": f"{limits.max_aspect_ratio:g}", "actual": f"{long / short:.1f}"},
        )


def _jpeg(data: bytes, header: Header) -> Frame:
    image = JpegImageFile(io.BytesIO(data))
    if header.scale > 1:
        image.draft(None, (image.width // header.scale, image.height // header.scale))
    return _loaded(image, header)


def _png(data: bytes, header: Header) -> Frame:
    if header.parts is not None:
        data = b"".join(data[begin:end] for begin, end in header.parts)
    return _loaded(PngImageFile(io.BytesIO(data)), header)


def _loaded(image: ImageFile.ImageFile, header: Header) -> Frame:
    """The classes themselves: Image.open would apply a global pixel limit and warnings filters."""
    with image:
        _check_decoder(image.size, header)
        # Process-wide, and LMDeploy turns it on when it is imported: half an image would pass.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        image.load()
    return PillowFrame(image)


def _webp_frame(data: bytes, header: Header) -> Frame:
    """Pillow's class would copy the pixels, and apply a global pixel limit."""
    decoder = _webp.WebPAnimDecoder(data)
    size, *_, mode = decoder.get_info()
    _check_decoder(size, header)
    found = decoder.get_next()
    if found is None:
        raise ValueError("the first frame cannot be decoded")
    pixels = np.frombuffer(found[0], np.uint8).reshape(header.height, header.width, 4)
    return ArrayFrame(pixels if mode == "RGBA" else pixels[..., :3])


def _heic_frame(data: bytes, header: Header) -> Frame:
    """pi-heif's extension module: its Python classes would copy the metadata of all images first."""
    from _pi_heif import load_file

    threads, eight_bits, bgr, packed, sixteen_bits, decoder, unlimited = (
        1, True, False, True, False, "", False,
    )  # fmt: skip
    found = load_file(data, threads, eight_bits, bgr, packed, sixteen_bits, decoder, unlimited)
    image = next(one for one in found if one is not None and one.primary)
    size, mode = image.size_mode
    _check_decoder(size, header)
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.frombuffer(image.data, np.uint8).reshape(header.height, header.width, channels)
    profile = image.color_profile or {}
    icc = profile["data"] if profile.get("type") in ("rICC", "prof") else b""
    return ArrayFrame(pixels[..., 0] if mode == "L" else pixels, icc, owner=image)


def _check_decoder(size: tuple[int, int], header: Header) -> None:
    if size != (header.width, header.height):
        raise ValueError("the decoder sees another size than the header")


_FRAMES: dict[str, Callable[[bytes, Header], Frame]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WebP": _webp_frame,
    "HEIC": _heic_frame,
}
