"""Names the format of bytes that are not an accepted image, with advice for the caller."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import NamedTuple

FORMATS = ("JPEG", "PNG", "WebP", "HEIC")
"""Every format that the server can read; HEIC needs the extra ``heif``."""
DEFAULT_FORMATS = ("JPEG", "PNG", "WebP")
_HEAD = 4096
"""Number of bytes at the beginning of a file that determine its format."""
_BASE64 = re.compile(rb"[A-Za-z0-9+/_\-]+={0,2}")  # without spaces, so that it never backtracks


class Found(NamedTuple):
    """A format that is not accepted. advice: an imperative that says what to do instead."""

    name: str
    advice: str


_TO_JPEG, _TO_PNG = "convert it to JPEG", "convert it to PNG"
_MAGIC: tuple[tuple[bytes, Found], ...] = (
    (b"GIF87a", Found("GIF", "save a frame as PNG")),
    (b"GIF89a", Found("GIF", "save a frame as PNG")),
    (b"BM", Found("BMP", _TO_PNG)),
    (b"II*\0", Found("TIFF", _TO_PNG)),
    (b"MM\0*", Found("TIFF", _TO_PNG)),
    (b"II+\0", Found("BigTIFF", _TO_PNG)),
    (b"MM\0+", Found("BigTIFF", _TO_PNG)),
    (b"%PDF-", Found("PDF", "render its pages to PNG")),
    (b"%!PS", Found("PostScript", "render it to PNG")),
    (b"8BPS", Found("a Photoshop document", "export it as PNG")),
    (b"\0\0\1\0", Found("ICO", _TO_PNG)),
    (b"\xff\x0a", Found("JPEG XL", _TO_JPEG)),
    (b"\0\0\0\x0cJXL ", Found("JPEG XL", _TO_JPEG)),
    (b"\0\0\0\x0cjP  ", Found("JPEG 2000", _TO_JPEG)),
    (b"\xff\x4f\xff\x51", Found("JPEG 2000", _TO_JPEG)),
    (b"\x1f\x8b", Found("gzip-compressed data", "decompress it")),
    (b"PK\x03\x04", Found("a ZIP archive", "send the images that it holds")),
)
_HEIC = Found("HEIC", _TO_JPEG)
_BRANDS = {
    b"avif": Found("AVIF", _TO_JPEG),
    b"avis": Found("AVIF", _TO_JPEG),
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), _HEIC
    ),
}
"""Brands of ISO base media files that hold images."""
_VIDEO = Found("an MP4 or QuickTime video", "send single frames as JPEG")


def found_format(data: bytes) -> Found | None:
    """The format of ``data`` if it is a known but not accepted format; else None."""
    for magic, found in _MAGIC:
        if data.startswith(magic):
            return found
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    if re.match(rb"P[1-6]\s", data):
        return Found("a Netpbm image", _TO_PNG)
    return _text(data[:_HEAD])


def known_format(data: bytes) -> str | None:
    """One of ``FORMATS``, by the first bytes."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    return "HEIC" if data[4:8] == b"ftyp" and _iso_media(data) is _HEIC else None


def refusal(data: bytes, accepted: Sequence[str]) -> tuple[str, str]:
    """Why ``data`` is not accepted, with what to do instead; and the name of its format, if known.

    accepted: of ``FORMATS``.
    """
    several = " and ".join(filter(None, (", ".join(accepted[:-1]), accepted[-1])))
    known = known_format(data)
    found = _HEIC if known == "HEIC" else known and Found(known, _TO_JPEG)
    found = found or found_format(data)
    if not found:
        return f"is not in a format that is accepted; accepted are {several}", ""
    advice = found.advice
    for name, other in (("JPEG", "PNG"), ("PNG", "JPEG")):
        if advice.endswith(name) and name not in accepted:
            advice = advice.removesuffix(name) + (other if other in accepted else accepted[0])
    if found is _HEIC:
        advice += ", or ask the operator to accept it: extra `heif`, and setting image_formats of the service"
    elif known is not None:
        advice += ", or ask the operator to accept it: setting image_formats"
    return f"is {found.name}, not an accepted image; {advice} (accepted are {several})", found.name


def _iso_media(data: bytes) -> Found:
    """HEIC and AVIF name themselves by the main brand or by one of the compatible ones."""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]
    if b"avif" in brands or b"avis" in brands:  # AVIF lists mif1, too
        return _BRANDS[b"avif"]
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), _VIDEO)


def _text(head: bytes) -> Found | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    start = text[:256].lower()
    if start.startswith(b"data:"):
        return Found("a data URL", "decode the base64 part and send the bytes of the file")
    if re.match(rb"(https?|file|s3|gs)://", start):
        return Found("a URL", "the server fetches nothing: send the bytes of the file")
    if re.match(rb"(<!doctype\s+html|<html)", start):
        return Found("an HTML page", "check what the address of the image answered")
    if b"<svg" in text and start.startswith(b"<"):
        return Found("SVG", "render it to PNG")
    if start.startswith((b"<?xml", b"{", b"[")):
        return Found("XML or JSON text", "send the bytes of the image file")
    return _base64(text)


def _base64(text: bytes) -> Found | None:
    """Recognise a file in base64, which clients send if they take ``data`` for a string."""
    joined = b"".join(text.split())
    if len(joined) < 16 or not _BASE64.fullmatch(joined):
        return None
    letters = joined.replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
    try:
        start = base64.b64decode(letters[: len(letters) // 4 * 4])
    except binascii.Error:
        return None
    inner = known_format(start)
    if inner is None:
        known = next((found for magic, found in _MAGIC if start.startswith(magic)), None)
        if start[4:8] == b"ftyp":
            known = _iso_media(start)
        if known is None:
            return None
        inner = known.name
    return Found(f"base64 text of {inner}", "decode it and send the bytes of the file")
