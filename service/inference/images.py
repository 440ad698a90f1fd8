"""Reads images of callers with `lmdeploy_ext.images`, and reports its errors as errors of the
service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from lmdeploy_ext.images import files
from lmdeploy_ext.images.errors import ImageRefused
from lmdeploy_ext.images.files import ImageLimits
from lmdeploy_ext.images.headers import Header
from lmdeploy_ext.images.rows import DecodedImage
from service.errors import ImageError, Overloaded, ServiceError

if TYPE_CHECKING:
    from service.types import Pixels

P = ParamSpec("P")
T = TypeVar("T")

_RETRY_AFTER_S = 5.0


def check_header(data: bytes, field: str, limits: ImageLimits) -> Header:
    """The header of an image that is within the limits. Raises ``ImageError`` on ``field``."""
    return reported(files.check_header, data, field, limits)


def check_request_pixels(headers: Sequence[Header], limits: ImageLimits) -> None:
    """Raises ``ImageError`` on ``images`` when they have too many pixels together."""
    reported(files.check_request_pixels, headers, limits)


def decode_image(data: bytes, field: str, limits: ImageLimits) -> Pixels:
    """`lmdeploy_ext.images.files.decode_image`. Raises ``ImageError`` on ``field``, or
    ``Overloaded`` if the machine has too little memory."""
    return reported(files.decode_image, data, field, limits)


def decode(data: bytes, header: Header, field: str, limits: ImageLimits) -> DecodedImage:
    """`decode_image` for a header that has been checked. The rows are converted when they are read,
    which raises ``ImageRefused``: read them with `reported`."""
    return reported(files.decode, data, header, field, limits)


def reported(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a function that reads an image, with the errors of the service.

    They are raised outside the ``except`` blocks, so that they keep no frames of the decoder, with
    their images, in memory.
    """
    found: ServiceError
    try:
        return function(*args, **kwargs)
    except ImageRefused as error:
        found = ImageError(
            error.field, error.description, reason=error.reason, metadata=error.metadata
        )
    except MemoryError:
        found = out_of_memory()
    raise found


def out_of_memory() -> Overloaded:
    """The error for a lack of memory, which is never reported as an image error."""
    return Overloaded(
        "The server has too little free memory to decode the images now; try again later, or send "
        "smaller images.",
        retry_after_s=_RETRY_AFTER_S,
    )
