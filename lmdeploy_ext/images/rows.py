"""Upright RGB rows of a decoded image, made strip by strip when they are asked for.

A decoder keeps four bytes for a pixel of most images, and the full image as an RGB array would take
three more. Whoever reduces the image reads it in strips instead.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from lmdeploy_ext.images.errors import ImageRefused
from lmdeploy_ext.images.headers import Header

Convert: TypeAlias = Callable[[Image.Image], Image.Image]
Colour: TypeAlias = tuple[int, int, int]
Box: TypeAlias = tuple[int, int, int, int]
Pixels: TypeAlias = npt.NDArray[np.uint8]
"""(height, width, 3) uint8, RGB, C-contiguous, upright."""

STRIP_PIXELS = 1 << 18
"""Converted at a time, so that a large image needs no second copy in another mode."""
_SAME_COLOUR = 4
"""A colour profile that moves no channel by more, of 255, is taken for sRGB."""
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}


class Frame(Protocol):
    """The pixels of an image as its decoder left them."""

    icc: bytes
    """The colour profile that the decoder has found; empty where the header has it, or none."""

    @property
    def sample(self) -> Image.Image:
        """An image of the same mode, with the same palette and transparent colour."""
        ...

    def strip(self, box: Box) -> Image.Image:
        """The pixels of a box (left, top, right, bottom)."""
        ...


class PillowFrame:
    """An image that Pillow has loaded."""

    icc = b""

    def __init__(self, image: Image.Image) -> None:
        self._image = image

    @property
    def sample(self) -> Image.Image:
        return self._image

    def strip(self, box: Box) -> Image.Image:
        whole = box == (0, 0, *self._image.size)
        return self._image if whole else self._image.crop(box)


class ArrayFrame:
    """uint8 of shape (height, width, 3 or 4), RGB or RGBA, or (height, width), grey; any strides.

    owner: what has the memory of the pixels, where the array does not keep it.
    """

    def __init__(self, pixels: Pixels, icc: bytes = b"", owner: object = None) -> None:
        self._pixels = pixels
        self._owner = owner
        self.icc = icc

    @property
    def sample(self) -> Image.Image:
        return self.strip((0, 0, 1, 1))

    def strip(self, box: Box) -> Image.Image:
        left, top, right, bottom = box
        return Image.fromarray(np.ascontiguousarray(self._pixels[top:bottom, left:right]))


class DecodedImage:
    """An image of a file: shape (height, width, 3), uint8, RGB, upright. ``image[top:bottom]`` is an
    array of these rows.

    ground: the colour behind transparent parts. field: of the image in the request, for errors.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, frame: Frame, header: Header, ground: Colour, field: str) -> None:
        width, height = header.upright
        self.shape = (height, width, 3)
        self._frame = frame
        self._stored = (header.width, header.height)
        self._orientation = header.orientation
        self._convert = _conversion(frame.sample, header.icc or frame.icc, ground)
        self._field = field

    def __getitem__(self, rows: slice) -> Pixels:
        """Some rows as an array, C-contiguous. Raises ``ImageRefused`` where they cannot be converted."""
        height, width, _ = self.shape
        top, bottom, _ = rows.indices(height)
        result = np.empty((max(0, bottom - top), width, 3), np.uint8)
        try:
            self._convert_into(result, top, bottom)
        except MemoryError:
            raise
        except Exception:  # whatever a library does not like in palettes, profiles and the like
            damaged = True
        else:
            damaged = False
        if damaged:
            raise ImageRefused(self._field, "has colours that cannot be converted")
        return result

    def _convert_into(self, result: Pixels, top: int, bottom: int) -> None:
        width = self.shape[1]
        step = max(1, STRIP_PIXELS // width)
        for begin in range(top, bottom, step):
            end = min(begin + step, bottom)
            strip = self._convert(self._frame.strip(self._box(begin, end)))
            _as_stored(result[begin - top : end - top], self._orientation)[...] = np.asarray(strip)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Pixels:
        return self[:]

    def _box(self, top: int, bottom: int) -> Box:
        """Where upright rows lie in the image as it is stored."""
        width, height = self._stored
        along_columns, backwards = _ROWS[self._orientation]
        if backwards:
            length = width if along_columns else height
            top, bottom = length - bottom, length - top
        return (top, 0, bottom, height) if along_columns else (0, top, width, bottom)


_ROWS = {
    orientation: (
        orientation >= 5,
        orientation in ((2, 3, 7, 8) if orientation >= 5 else (3, 4, 6, 7)),
    )
    for orientation in range(1, 9)
}
"""Orientation -> whether upright rows are stored columns, and whether they run backwards."""


def _as_stored(upright: Pixels, orientation: int) -> Pixels:
    """A view of an upright image in which its pixels lie as they are stored."""
    if orientation >= 5:
        upright = upright.transpose(1, 0, 2)
    # 1 to 8: which of the stored axes (rows, columns) run backwards.
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    return upright[::rows, ::columns]


def _conversion(image: Image.Image, icc: bytes, ground: Colour) -> Convert:
    """What makes RGB of a strip of an image like this one. RGB of sRGB passes as it is."""
    if image.mode.startswith("I"):
        return partial(_eight_bits, ground=ground)
    profile = _profile(image.mode, icc, ground) if icc else None
    if profile is not None:
        return profile
    if image.mode != "RGB" or "transparency" in image.info:
        return partial(_flat, ground=ground)
    return lambda strip: strip


def _eight_bits(image: Image.Image, ground: Colour) -> Image.Image:
    """16-bit greyscale, scaled; ``convert`` would clip it. One value may stand for transparent."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).clip(0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return Image.fromarray(grey).convert("RGB")
    colours = np.repeat(grey[..., None], 3, axis=2)
    colours[values == clear] = ground
    return Image.fromarray(colours)


def _flat(image: Image.Image, ground: Colour) -> Image.Image:
    """RGB of any other mode; transparent parts get the colour of the ground."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    return _on(ground, image.convert("RGBA"))


def _on(ground: Colour, image: Image.Image) -> Image.Image:
    below = Image.new("RGBA", image.size, (*ground, 255))
    return Image.alpha_composite(below, image).convert("RGB")


def _profile(mode: str, icc: bytes, ground: Colour) -> Convert | None:
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
        return _on(ground, colours)

    return convert


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves a grid of colours as they are, but for rounding."""
    steps = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3)
    probe = Image.fromarray(grid if mode == "RGB" else np.ascontiguousarray(grid[..., 0]))
    before, after = np.asarray(probe.convert("RGB")).astype(int), np.asarray(transform.apply(probe))
    return bool(np.abs(before - after).max() <= _SAME_COLOUR)
