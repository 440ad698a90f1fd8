"""Images of messages: data URLs to bytes."""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass

import pybase64

from service.errors import ImageError, InvalidRequest
from service.http_api.fields import ImageSource
from service.http_api.payloads import Payloads
from service.schema_compiler import jsontext
from service.types import EncodedImage

LOW_DETAIL_PIXELS = 512 * 512
"""Most pixels of an image with the detail low."""
BLANKS = re.compile(r"[\t\n\r ]+")


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """An image that has to be fetched. image: what gets its bytes."""

    url: str
    image: EncodedImage


def decode_image(
    source: ImageSource, path: str, payloads: Payloads, *, fetched: bool
) -> EncodedImage | RemoteImage:
    """An image of a message; its bytes are looked at later.

    path: of its part in the request. payloads: base64 that was taken out of the body. fetched: whether
    this server fetches images. Raises ``InvalidRequest`` for a URL that is neither a data URL with
    base64 nor one to fetch.
    """
    field = f"{path}.{source.field}"
    most = LOW_DETAIL_PIXELS if source.detail == "low" else None
    if source.url[:5].lower() == "data:":
        return EncodedImage(field, _bytes(source.url, field, payloads), None, most)
    if fetched and source.url.partition(":")[0].lower() in ("http", "https"):
        return RemoteImage(source.url, EncodedImage(field, b"", None, most))
    raise _refused(source.url, field)


def _bytes(url: str, field: str, payloads: Payloads) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest(field, "must be a data: URL with base64, data:image/…;base64,…")
    taken = payloads.get(data)
    if taken is not None:
        return decode_base64(taken, field)
    return decode_base64(BLANKS.sub("", data).encode(), field)


def decode_base64(text: bytes | memoryview, field: str) -> bytes:
    """Bytes of base64 text; missing padding is accepted, nothing else is."""
    missing = -len(text) % 4
    try:
        if missing in (1, 2):
            text = b"".join((text, b"=" * missing))
        data = pybase64.b64decode(text, validate=True)
    except binascii.Error:
        raise ImageError(
            field, "is not base64 in the standard alphabet", reason="IMAGE_INVALID"
        ) from None
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
