"""Images of messages: data URLs to bytes."""

from __future__ import annotations

import binascii
import re

from service.errors import ImageError, InvalidRequest
from service.http_api.models import ImagePart
from service.schema_compiler import jsontext
from service.types import EncodedImage

LOW_DETAIL_PIXELS = 512 * 512
"""Most pixels of an image with the detail low."""
STEP = 256 * 1024
"""Characters of base64 that are decoded at a time: the interpreter runs nothing else meanwhile."""
BLANKS = re.compile(r"[\t\n\r ]+")
PLAIN = re.compile(r"[A-Za-z0-9+/]*")


def decode_image(part: ImagePart, path: str) -> EncodedImage:
    """A part of a message -> EncodedImage; its bytes are looked at later.

    path: of the part in the request. Raises ``InvalidRequest`` for a URL that is not a data URL with
    base64.
    """
    given = part.image_url
    url, field = (
        (given, f"{path}.image_url")
        if isinstance(given, str)
        else (given.url, f"{path}.image_url.url")
    )
    low = not isinstance(given, str) and given.detail == "low"
    return EncodedImage(field, _bytes(url, field), None, LOW_DETAIL_PIXELS if low else None)


def _bytes(url: str, field: str) -> bytes:
    if url[:5].lower() != "data:":
        raise _refused(url, field)
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest(field, "must be a data: URL with base64, data:image/…;base64,…")
    return decode_base64(data, field)


def decode_base64(text: str, field: str) -> bytes:
    """Bytes of base64 text; blanks and missing padding are accepted, nothing else is.

    Takes milliseconds for megabytes, so large texts are decoded outside of the event loop.
    """
    if any(blank in text for blank in "\n\r\t "):
        text = BLANKS.sub("", text)
    digits = text.rstrip("=")
    padding = len(text) - len(digits)
    if not PLAIN.fullmatch(digits) or padding > 2 or len(digits) % 4 == 1:
        raise ImageError(field, "is not base64 in the standard alphabet", reason="IMAGE_INVALID")
    pieces = [
        binascii.a2b_base64(digits[begin : begin + STEP])
        for begin in range(0, len(digits) - STEP, STEP)
    ]
    last = digits[len(pieces) * STEP :]
    pieces.append(binascii.a2b_base64(last + "=" * (-len(last) % 4)))
    data = b"".join(pieces)
    if not data:
        raise ImageError(field, "has no bytes", reason="IMAGE_EMPTY")
    return data


def _refused(url: str, field: str) -> InvalidRequest:
    """The error of an image that is not in the request itself. Nothing is opened or looked up."""
    scheme = url.partition(":")[0].lower() if ":" in url[:32] else ""
    if scheme in ("http", "https"):
        what = f"{scheme} URLs are not fetched by this server"
    elif scheme:
        what = f"{jsontext.short(scheme)} URLs are not supported"
    else:
        what = "it is not a URL"
    return InvalidRequest(
        field,
        f"{what}; send the image itself as a data: URL, data:image/…;base64,…",
        reason="IMAGE_URL_REFUSED",
    )
