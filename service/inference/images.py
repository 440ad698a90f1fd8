"""Bytes of a caller to a safe RGB image.

The header alone decides first: format, width, height. Only what is within the limits is decoded, and
only to its end: a truncated file is refused. What decoders say stays here; callers get our own words.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageCms, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import ImageError, Overloaded
from service.inference.image_headers import Header, is_complete, read_header, truncated

if TYPE_CHECKING:
    from service.types import Pixels

Convert: TypeAlias = Callable[[Image.Image], Image.Image]

THREADS = min(8, os.cpu_count() or 1)
# Pillow keeps this many freed blocks of at most 16 MiB. Without, each image of some 100 KB costs
# about 370 page faults, a third of the time of its decoding.
Image.core.set_blocks_max(THREADS)  # type: ignore[attr-defined]  # documented, not exported
_DECODERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
}
_STRIP_PIXELS = 1 << 20
"""Converted at a time, so that a large image needs no second copy in another mode."""
_SAME_COLOUR = 4
"""A colour profile that moves no channel by more, of 255, is taken for sRGB."""
_RETRY_AFTER_S = 5.0
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds of encoded images. ``max_aspect_ratio`` is the longer side over the shorter.

    max_request_pixels: of all images of a request together.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_request_pixels: int = 800_000_000
    min_side: int = 1
    max_aspect_ratio: float = 200.0


def check_header(data: bytes, field: str, limits: ImageLimits) -> Header:
    """The header of an image that is within the limits. Raises ``ImageError`` on ``field``."""
    _check_bytes(data, field, limits)
    header = read_header(data, field)
    _check_size(header.width, header.height, field, limits)
    return header


def check_request_pixels(headers: Sequence[Header], limits: ImageLimits) -> None:
    """Raises ``ImageError`` on ``images`` when they have too many pixels together."""
    pixels = sum(header.width * header.height for header in headers)
    if pixels > limits.max_request_pixels:
        raise ImageError(
            "images",
            f"have {pixels} pixels together, at most {limits.max_request_pixels} are allowed in a "
            "request; send fewer or smaller images",
            reason="IMAGES_TOO_MANY_PIXELS",
            metadata={"limit": str(limits.max_request_pixels), "actual": str(pixels)},
        )


def decode_image(data: bytes, field: str, limits: ImageLimits) -> Pixels:
    """Decode a JPEG, PNG or WebP file to (height, width, 3) uint8 RGB, upright, C-contiguous.

    Transparent parts lie on white. Of an animation, the first frame counts. 16 bits become 8 by
    scaling. Colours of an embedded profile other than sRGB are converted to sRGB.
    Raises ``ImageError`` on ``field``.
    """
    return decode(data, check_header(data, field, limits), field)


def decode(data: bytes, header: Header, field: str) -> Pixels:
    """`decode_image` for a header that has been checked.

    Raises ``Overloaded`` where the memory of the machine does not suffice.
    """
    try:
        return _decoded(data, header)
    except MemoryError:
        short_of_memory = True
    except Exception:  # decoders raise whatever they like on hostile data, and short of memory, too
        short_of_memory = not _allocatable(decoding_bytes(header))
    # Raised out here: an error raised above would keep the frames of the decoder, and their images.
    if short_of_memory:
        raise out_of_memory()
    if not is_complete(data, header):
        raise truncated(field)
    raise ImageError(field, "is damaged and cannot be decoded", reason="IMAGE_INVALID")


def decoding_bytes(header: Header) -> int:
    """Most memory that decoding takes, by measurement: Pillow's image, the result, and what the
    decoder keeps beside them."""
    beside = {"JPEG": 6 if header.extra_passes else 0, "PNG": 0, "WebP": 11}[header.format]
    return header.width * header.height * (4 + 3 + beside)


def out_of_memory() -> Overloaded:
    """The error where memory does not suffice, which is never the fault of an image."""
    return Overloaded(
        "The server has too little free memory to decode the images now; try again later, or send "
        "smaller images.",
        retry_after_s=_RETRY_AFTER_S,
    )


def _allocatable(size: int) -> bool:
    try:
        np.empty(size, np.uint8)
    except MemoryError:
        return False
    return True


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


def _decoded(data: bytes, header: Header) -> Pixels:
    if header.parts is not None:
        data = b"".join(data[begin:end] for begin, end in header.parts)
    # The class itself: Image.open would apply a global pixel limit and global warnings filters.
    with _DECODERS[header.format](io.BytesIO(data)) as image:
        if image.size != (header.width, header.height):
            raise ValueError("the decoder sees another size than the header")
        # Process-wide, and LMDeploy turns it on when it is imported: half an image would pass.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        image.load()
        return _pixels(image, header)


def _pixels(image: Image.Image, header: Header) -> Pixels:
    """A loaded image as an upright RGB array, made strip by strip."""
    convert = _conversion(image, header.icc)
    width, height = header.upright
    result = np.empty((height, width, 3), np.uint8)
    stored = _as_stored(result, header.orientation)
    for top, strip in _strips(image):
        part = np.asarray(convert(strip))
        stored[top : top + len(part)] = part
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Rows of an image, and where they begin."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    if rows >= height:
        yield 0, image
        return
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _as_stored(upright: Pixels, orientation: int) -> Pixels:
    """A view of an upright image in which its pixels lie as they are stored."""
    if orientation >= 5:
        upright = upright.transpose(1, 0, 2)
    # 1 to 8: which of the stored axes (rows, columns) run backwards.
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    return upright[::rows, ::columns]


def _conversion(image: Image.Image, icc: bytes) -> Convert:
    """What makes RGB of a strip of the image. RGB of sRGB passes as it is."""
    if image.mode.startswith("I"):
        return _eight_bits
    profile = _profile(image.mode, icc) if icc else None
    if profile is not None:
        return profile
    if image.mode != "RGB" or "transparency" in image.info:
        return _flat
    return lambda strip: strip


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
    return _on_white(image.convert("RGBA"))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _profile(mode: str, icc: bytes) -> Convert | None:
    """Conversion of an embedded profile to sRGB.

    None where the profile is sRGB, of another colour space than the pixels, or broken: a viewer, too,
    then shows the pixels as they are.
    """
    source = {"P": "RGB", "RGBA": "RGB", "LA": "L", "1": "L"}.get(mode, mode)
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if _PROFILE_MODES.get(profile.profile.xcolor_space) != source:
            return None
        transform = ImageCms.buildTransform(profile, _SRGB, source, "RGB")
        if source != "CMYK" and _changes_nothing(transform, source):
            return None
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None

    def convert(strip: Image.Image) -> Image.Image:
        if not strip.has_transparency_data:
            return transform.apply(strip if strip.mode == source else strip.convert(source))
        clear = strip.convert("RGBA")
        colours = transform.apply(clear.convert(source))
        colours.putalpha(clear.getchannel("A"))
        return _on_white(colours)

    return convert


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves a grid of colours as they are, but for rounding."""
    steps = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3)
    probe = Image.fromarray(grid if mode == "RGB" else np.ascontiguousarray(grid[..., 0]))
    before, after = np.asarray(probe.convert("RGB")).astype(int), np.asarray(transform.apply(probe))
    return bool(np.abs(before - after).max() <= _SAME_COLOUR)
