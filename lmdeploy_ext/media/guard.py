"""Replacements for functions of LMDeploy that read images and video.

Each function returns the replacement for one record in `lmdeploy_ext.media.records`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from PIL import Image

from lmdeploy_ext.images import files
from lmdeploy_ext.images.errors import ImageRefused
from lmdeploy_ext.images.files import ImageLimits
from lmdeploy_ext.images.formats import DEFAULT_FORMATS, FORMATS
from lmdeploy_ext.media import VIDEO_VARIABLE

logger = logging.getLogger("lmdeploy_ext")

LIMITS = ImageLimits(formats=FORMATS if find_spec("_pi_heif") else DEFAULT_FORMATS)
"""The defaults of the service; HEIC files are accepted if pi-heif is installed."""
PARSED_ROLES = ("user", "tool")
"""The roles whose parts LMDeploy reads."""
SHOWN = 300
"""Maximum number of characters of an error of LMDeploy, which may contain the whole image."""


@dataclass(slots=True)
class _Part:
    """The part of a conversation that is read now, in this thread.

    Attributes:
        place: path of the part, as in ``messages[1].content[0]``.
        pixels: pixels of the images of this request that were read before.
    """

    place: str
    pixels: int = 0


_part: ContextVar[_Part | None] = ContextVar("part", default=None)


@contextmanager
def _reading(part: _Part) -> Iterator[None]:
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def load_bytes(original: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the header before the pixels are decoded, and decodes with `lmdeploy_ext.images`."""

    @functools.wraps(original)
    def replacement(self: Any, data: bytes) -> Image.Image:
        return _decoded(data, self.image_mode)

    return replacement


def load_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a local file, of which at most one byte more than the limit is read."""

    @functools.wraps(original)
    def replacement(self: Any, file_path: Path) -> Image.Image:
        with open(file_path, "rb") as file:
            data = file.read(LIMITS.max_bytes + 1)
        return _decoded(data, self.image_mode)

    return replacement


def _decoded(data: bytes, mode: str) -> Image.Image:
    part = _part.get() or _Part("the image")
    try:
        header = files.check_header(data, part.place, LIMITS)
        _check_sum(part, header.file_pixels)
        pixels = files.decode(data, header, part.place, LIMITS)[:]
    except MemoryError:
        raise _too_little_memory() from None
    part.pixels += header.file_pixels
    return _of_mode(Image.fromarray(pixels), mode)


def _of_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _check_sum(part: _Part, pixels: int) -> None:
    most = LIMITS.max_request_pixels
    if part.pixels + pixels > most:
        raise ImageRefused(
            part.place,
            f"and the images before it have {part.pixels + pixels} pixels together, at most {most} "
            "are allowed in a request; send fewer or smaller images",
            reason="IMAGES_TOO_MANY_PIXELS",
        )


def _too_little_memory() -> RequestError:
    return RequestError(
        ErrorCode.ENGINE_UNAVAILABLE,
        "The server has too little free memory to decode the images now; try again later, or send "
        "smaller images.",
    )


def parse(original: Callable[..., None]) -> Callable[..., None]:
    """Reads each part by itself, so that an error names its place in the conversation."""

    @functools.wraps(original)
    def replacement(
        i: int,
        in_messages: Sequence[dict[str, Any]],
        out_messages: list[Any],
        media_io_kwargs: dict[str, Any],
        allowed_media_domains: list[str] | None = None,
    ) -> None:
        message = in_messages[i]
        content = message.get("content")
        if message["role"] not in PARSED_ROLES or not isinstance(content, list):
            original(i, in_messages, out_messages, media_io_kwargs, allowed_media_domains)
            return
        part = _Part("", _pixels(out_messages))
        parts: list[Any] = []
        for j, item in enumerate(content):
            part.place = f"messages[{i}].content[{j}]"
            read: list[Any] = [None]
            with _reading(part), _named(part.place):
                one = {**message, "content": [_upright(item, part)]}
                original(0, [one], read, media_io_kwargs, allowed_media_domains)
            parts += read[0]["content"]
        out_messages[i] = {**message, "content": parts}

    return replacement


def _pixels(messages: Sequence[Any]) -> int:
    """Pixels of the images of the messages that have been read, which other threads do, too."""
    parts = (part for one in messages if one for part in one["content"] if isinstance(part, dict))
    images = (part.get("data") for part in parts)
    return sum(one.width * one.height for one in images if isinstance(one, Image.Image))


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Turn errors about a part into ``ValueError`` with its place, which LMDeploy answers with HTTP
    400. Addresses, paths and the bytes of files are not repeated."""
    try:
        yield
    except RequestError:
        raise
    except ImageRefused as error:
        raise ValueError(f"{error.reason}: {error.field} {error.description}") from None
    except (ValueError, TypeError, NotImplementedError) as error:
        text = str(error)
        raise ValueError(f"{place}: {text[:SHOWN]}{'…' if len(text) > SHOWN else ''}") from error
    except OSError as error:  # of the file system, or of requests
        logger.warning("%s cannot be fetched or opened", place, exc_info=True)
        kind = type(error).__name__
        raise ValueError(f"{place}: cannot be fetched or opened ({kind})") from None


def _upright(item: Any, part: _Part) -> Any:
    """The part with its Pillow image, if a program gave one, as a viewer would show it."""
    if not isinstance(item, dict):
        return item
    kind = item.get("type")
    value = item.get(kind)
    if isinstance(value, Image.Image):
        return {**item, kind: _from_pillow(value, part)}
    if isinstance(value, dict):
        images = {key: one for key, one in value.items() if isinstance(one, Image.Image)}
        read = {key: _from_pillow(one, part) for key, one in images.items()}
        return {**item, kind: {**value, **read}} if read else item
    return item


def _from_pillow(image: Image.Image, part: _Part) -> Image.Image:
    _check_sum(part, image.width * image.height)
    part.pixels += image.width * image.height
    try:
        return Image.fromarray(files.from_pillow(image, part.place, LIMITS))
    except MemoryError:
        raise _too_little_memory() from None


def chat_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    """Reads the images of a prompt of `lmdeploy chat`, which prints a ``ValueError`` of its prompt
    parser and continues."""

    @functools.wraps(original)
    def replacement(prompt: str) -> Any:
        content = original(prompt)
        if isinstance(content, list):
            for block in content:
                if block["type"] == "image_url":
                    block["image_url"]["url"] = _opened(block["image_url"]["url"])
        return content

    return replacement


def _opened(source: str) -> Image.Image:
    from lmdeploy.vl.media.connection import load_from_url
    from lmdeploy.vl.media.image import ImageMediaIO

    part = _Part(source if len(source) <= SHOWN else "the image")
    with _reading(part), _named(part.place):
        image: Image.Image = load_from_url(source, ImageMediaIO())
    return image


class VideoDisabledError(RequestError, ValueError):  # type: ignore[misc]  # LMDeploy has no types
    """A request contains video while video is refused."""

    def __init__(self, place: str) -> None:
        super().__init__(
            ErrorCode.UNSUPPORTED_FEATURE,
            f"VIDEO_DISABLED: {place} is video, which is refused here ({VIDEO_VARIABLE}=off). "
            "Send single frames as images.",
        )


def refuse_video(original: Callable[..., None]) -> Callable[..., None]:
    """Refuses video before anything of it is fetched or decoded."""

    @functools.wraps(original)
    def replacement(self: Any, *arguments: Any, **keywords: Any) -> None:
        part = _part.get()
        raise VideoDisabledError(part.place if part else "a part of the conversation")

    return replacement
