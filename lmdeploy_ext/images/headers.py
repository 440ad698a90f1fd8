"""Reads the header of an image file: format, size, orientation, colour profile.

This module never decodes pixels, and never allocates memory by the claims of a file. The number of
parts of a file is limited, because each part takes time here and in the decoder.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lmdeploy_ext.images.errors import ImageRefused
from lmdeploy_ext.images.formats import DEFAULT_FORMATS, known_format, refusal
from lmdeploy_ext.images.heif_headers import MAX_PARTS, Damaged, Flood, read_heif
from lmdeploy_ext.images.webp_lossless import table_bytes

Format = Literal["JPEG", "PNG", "WebP", "HEIC"]

MAX_JPEG_SCANS = 100
"""Encoders write about ten. Each one is a pass over all pixels, and 95 bytes ask for it: without a
bound, a file within the limits keeps the decoder busy for an hour."""
MAX_JPEG_SEGMENTS = 2048
"""Segments are up to 64 KiB: this many hold more metadata than any image has."""
MAX_CHUNKS = 16_384
"""Of a PNG or WebP file. libpng writes 8 KiB of pixels in each: 128 MiB of compressed pixels."""
_MAX_FILLING = 65_536
"""Bytes between segments of a JPEG file that mean nothing."""
_MAX_METADATA = 1 << 20
"""Bytes of EXIF or XMP, decompressed, that are kept and searched for the orientation."""
_MAX_ICC = 4 << 20
"""Bytes of a colour profile. Large ones, of printing presses, have two million."""

# One byte of filling, not \xff+, which would take time quadratic in the length of a run of \xff.
_MARKER = re.compile(rb"\xff([^\xff\x00])")
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # compressed data holds only the excluded
_STANDALONE = frozenset({0x01, 0xD8, *range(0xD0, 0xD8)})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_USUAL_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Frames with Huffman codes: baseline, extended and progressive. Few decoders read the others."""
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_EOI, _SOS = 0xD9, 0xDA
_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
_DECODED_CHUNKS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_UNUSUAL_CHUNKS = frozenset({b"tRNS", b"iCCP", b"cICP", b"eXIf", b"acTL"})
"""Chunks that decoders of PNG files treat differently, even where their checksum is right."""
_COMPRESSED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG file, beside the pixels, that are decompressed to read a header."""
_QUICK_BYTES = 128 * 1024
_RAW_PROFILES = (b"Raw profile type exif", b"Raw profile type APP1")
_WEBP_CANVAS_BYTES = 8
"""Bytes of a pixel that libwebp keeps beside the pixels: two canvases."""
_GREY, _TRUE_COLOURS, _PALETTE = 0, 2, 3
"""Kinds of colours of a PNG file: grey and palettes take one value per pixel."""
_XMP_KEYWORD = b"XML:com.adobe.xmp"
_METADATA_KEYWORDS = frozenset({_XMP_KEYWORD, *_RAW_PROFILES})
_MAX_KEYWORD = 80
"""Bytes of the keyword of a PNG text, with its end."""
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_ORIENTATION_TAG = 0x0112
_EXIF_TYPES = {1: "B", 3: "H", 4: "I"}


@dataclass(frozen=True, slots=True)
class Header:
    """The properties of an image file that are known before it is decoded.

    Attributes:
        width, height: size of the decoded image in pixels, before it is turned upright.
        orientation: 1 to 8, as in EXIF.
        icc: the embedded colour profile; empty without one.
        pixel_bytes: bytes per pixel that the decoder keeps.
        kept_bytes: bytes that the decoder needs beside the pixels, such as the coefficients of a
            progressive JPEG.
        stored: width and height of the largest image in a HEIC file, of which ``width`` and
            ``height`` may be a small crop; (0, 0) for other formats.
        scale: a JPEG file is decoded at 1/scale of its sides, which gives ``width`` and ``height``.
        parts: the ranges of a PNG file that the decoder gets, without metadata, which may be
            damaged; None: the whole file.
        first_scan: offset of the compressed data in a JPEG file.
        complete: whether the file has an end; always False for JPEG, see ``is_complete``.
        rgb: whether the file has 8-bit RGB in a form that every decoder reads the same: a baseline or
            progressive JPEG of three components, or a PNG of true colours without transparency.
    """

    format: Format
    width: int
    height: int
    orientation: int = 1
    icc: bytes = b""
    pixel_bytes: int = 4
    kept_bytes: int = 0
    stored: tuple[int, int] = (0, 0)
    scale: int = 1
    parts: tuple[tuple[int, int], ...] | None = None
    first_scan: int = 0
    complete: bool = False
    rgb: bool = False

    @property
    def plain(self) -> bool:
        """Whether every decoder gives the same upright image of sRGB."""
        return self.rgb and self.orientation == 1 and not self.icc

    @property
    def file_pixels(self) -> int:
        """Pixels of the file, whatever the scale at which it is decoded, and before a crop."""
        return max(self.width * self.height * self.scale**2, self.stored[0] * self.stored[1])

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        turned = self.orientation >= 5
        return (self.height, self.width) if turned else (self.width, self.height)


def read_header(data: bytes, field: str, formats: Sequence[str] = DEFAULT_FORMATS) -> Header:
    """The header of a file in one of the accepted formats. Raises ``ImageRefused`` on ``field``."""
    kind = known_format(data)
    if kind is None or kind not in formats:
        what, found = refusal(data, formats)
        metadata = {"found": found} if found else {}
        raise ImageRefused(field, what, reason="IMAGE_FORMAT_UNSUPPORTED", metadata=metadata)
    return _READERS[kind](data, field)


def reads_quickly(data: bytes) -> bool:
    """Whether `read_header` and `is_complete` take microseconds, and some milliseconds for a file that is
    made to take long, with thousands of chunks: a small file of which nothing has to be decompressed."""
    if len(data) > _QUICK_BYTES:
        return False
    kind = known_format(data)
    return kind == "JPEG" or (kind == "PNG" and not any(one in data for one in _COMPRESSED_CHUNKS))


def is_complete(data: bytes, header: Header) -> bool:
    """Whether the file contains the end of its image. Data after the end is ignored."""
    if header.format != "JPEG":
        return header.complete
    return _scans(data, header.first_scan)[1]


def check_complete(data: bytes, header: Header, field: str) -> None:
    """Raises ``ImageRefused`` on ``field`` for a file that ends before its image does."""
    if not is_complete(data, header):
        raise truncated(field)


def truncated(field: str) -> ImageRefused:
    """The error for a truncated file."""
    what = "ends before the image is complete; send the whole file"
    return ImageRefused(field, what, reason="IMAGE_TRUNCATED")


def _damaged(field: str) -> ImageRefused:
    return ImageRefused(field, "has a damaged header")


def _too_many(field: str, limit: int, parts: str) -> ImageRefused:
    what = f"has more than {limit} {parts}; save the image again, without metadata"
    return ImageRefused(field, what, reason="IMAGE_INVALID", metadata={"limit": str(limit)})


# JPEG


def _jpeg(data: bytes, field: str) -> Header:
    size = None
    filling = segments = 0
    sampling: list[tuple[int, int]] = []
    progressive = usual = False
    exif, xmp = bytearray(), b""
    profile: dict[int, bytes] = {}
    position = 2
    while True:
        found = _MARKER.search(data, position)
        if found is None:
            raise truncated(field)
        filling += found.end() - 2 - position
        segments += 1
        if segments > MAX_JPEG_SEGMENTS:
            raise _too_many(field, MAX_JPEG_SEGMENTS, "segments")
        if filling > _MAX_FILLING:
            raise _damaged(field)
        marker, position = found.group(1)[0], found.end()
        if marker in _STANDALONE:
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        if marker == _EOI or position + 2 > len(data):
            raise truncated(field)
        if length < 2:
            raise _damaged(field)
        body = data[position + 2 : position + length]
        position += length
        if marker in _FRAMES and size is None:
            if len(body) < 6:
                raise truncated(field) if position > len(data) else _damaged(field)
            height, width = struct.unpack_from(">HH", body, 1)
            size, progressive = (width, height), marker in _PROGRESSIVE
            if len(body) < 6 + 3 * body[5]:
                raise truncated(field) if position > len(data) else _damaged(field)
            usual = marker in _USUAL_FRAMES and body[0] == 8 and body[5] == 3
            sampling = [(one >> 4, one & 15) for one in body[7 : 7 + 3 * body[5] : 3]]
        elif marker == 0xE1 and body.startswith(_EXIF):
            # Continued where it needs more than one segment.
            exif += body[len(_EXIF) : len(_EXIF) + _MAX_METADATA - len(exif)]
        elif marker == 0xE1 and body.startswith(_XMP):
            xmp = body[len(_XMP) :]
        elif marker == 0xE2 and body.startswith(_ICC) and len(body) > 14:
            profile[body[12]] = body[14:]
        elif marker == _SOS:
            break
    if size is None:
        raise truncated(field) if position > len(data) else _damaged(field)
    several = progressive or (len(body) > 0 and body[0] < len(sampling))
    if several and _scans(data, position)[0] > MAX_JPEG_SCANS:
        what = f"is stored in more than {MAX_JPEG_SCANS} scans; save it again"
        raise ImageRefused(field, what, reason="IMAGE_INVALID")
    icc = b"".join(part for _, part in sorted(profile.items()))
    return Header(
        "JPEG",
        *size,
        _orientation(bytes(exif), xmp),
        _bounded(icc),
        pixel_bytes=1 if len(sampling) == 1 else 4,
        kept_bytes=_coefficients(*size, sampling) if several else 0,
        first_scan=position,
        rgb=usual,
    )


def _coefficients(width: int, height: int, sampling: list[tuple[int, int]]) -> int:
    """Bytes of all coefficients of a JPEG file, which a decoder keeps where there are several scans.

    sampling: horizontal and vertical factor of each component. A coefficient takes two bytes.
    """
    across = max((one for one, _ in sampling), default=1) or 1
    down = max((one for _, one in sampling), default=1) or 1
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    return sum(units * one * other * 128 for one, other in sampling)


def _scans(data: bytes, position: int) -> tuple[int, bool]:
    """The scans of a JPEG file from the first one, and whether the file reaches its end.

    Stops one above the limit. What follows the end of the image belongs to something else.
    """
    scans = segments = 1
    while scans <= MAX_JPEG_SCANS and segments <= MAX_JPEG_SEGMENTS:
        found = _AFTER_SCAN.search(data, position)
        if found is None:
            return scans, False
        marker, position = data[found.end() - 1], found.end()
        if marker == _EOI:
            return scans, True
        segments += 1
        if marker not in _STANDALONE:
            scans += marker == _SOS
            position += int.from_bytes(data[position : position + 2], "big")
    return MAX_JPEG_SCANS + 1, False


# PNG


def _png(data: bytes, field: str) -> Header:
    if data[12:16] != b"IHDR":
        raise truncated(field) if len(data) < 16 else _damaged(field)
    if len(data) < 26:
        raise truncated(field)
    width, height, depth, colours = struct.unpack_from(">IIBB", data, 16)
    parts: list[tuple[int, int]] = [(0, 8)]
    exif = b""
    icc: bytes | None = None
    usual = depth == 8 and colours == _TRUE_COLOURS
    texts: dict[bytes, bytes] = {}
    position, complete = 8, False
    for _ in range(MAX_CHUNKS):
        length, kind = (
            int.from_bytes(data[position : position + 4], "big"),
            data[position + 4 : position + 8],
        )
        start, end = position, position + 12 + length
        position = end
        wanted = kind in _DECODED_CHUNKS
        usual &= kind not in _UNUSUAL_CHUNKS
        if (
            not wanted
            and end <= len(data)
            and kind in (b"tRNS", b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt")
        ):
            body = data[start + 8 : end - 4]
            # Like browsers, ignore metadata with a wrong checksum. Of each kind the first chunk
            # counts: a file of thousands that are all decompressed would take minutes.
            if zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(data[end - 4 : end], "big"):
                if kind == b"tRNS":
                    wanted = True
                elif kind == b"eXIf":
                    exif = body
                elif kind == b"iCCP":
                    if icc is None:
                        icc = _inflated(body.partition(b"\0")[2][1:], _MAX_ICC)
                else:
                    keyword = body[:_MAX_KEYWORD].partition(b"\0")[0]
                    if keyword in _METADATA_KEYWORDS and keyword not in texts:
                        texts[keyword] = _text(kind, body[len(keyword) + 1 :])
        if wanted or end > len(data):
            if parts[-1][1] == start:
                parts[-1] = (parts[-1][0], end)
            else:
                parts.append((start, end))
        if kind == b"IEND" and end <= len(data):
            complete = True
            break
        if position >= len(data):
            break
    else:
        raise _too_many(field, MAX_CHUNKS, "chunks")
    whole = len(parts) == 1 and parts[0][1] >= len(data)
    profiles = (_raw_profile(text) for keyword, text in texts.items() if keyword in _RAW_PROFILES)
    return Header(
        "PNG",
        width,
        height,
        _orientation(exif or next(filter(None, profiles), b""), texts.get(_XMP_KEYWORD, b"")),
        icc or b"",
        pixel_bytes=_png_bytes(depth, colours),
        kept_bytes=0 if whole else sum(end - start for start, end in parts),
        parts=None if whole else tuple(parts),
        complete=complete,
        rgb=usual,
    )


def _png_bytes(depth: int, colours: int) -> int:
    """Bytes of a pixel of a PNG file in Pillow."""
    if colours in (_GREY, _PALETTE):
        return 2 if depth > 8 else 1
    return 4


def _text(kind: bytes, rest: bytes) -> bytes:
    """The text of a chunk of a PNG file. rest: what follows the keyword and its zero byte."""
    if kind == b"tEXt":
        return rest[:_MAX_METADATA]
    if kind == b"zTXt":
        return _inflated(rest[1:], _MAX_METADATA, cut=True)
    compressed, rest = rest[:1] == b"\1", rest[2:]
    text = rest.partition(b"\0")[2].partition(b"\0")[2]  # language and translated keyword
    return _inflated(text, _MAX_METADATA, cut=True) if compressed else text[:_MAX_METADATA]


def _inflated(data: bytes, limit: int, *, cut: bool = False) -> bytes:
    """Decompressed data, truncated at the limit; empty if the data is damaged."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, limit)
    except zlib.error:
        return b""
    return text if cut or not inflater.unconsumed_tail else b""


def _raw_profile(text: bytes) -> bytes:
    """EXIF as ImageMagick writes it into text: a name, the length, and hexadecimal digits."""
    digits = b"".join(text.split(b"\n")[3:])
    try:
        return bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))
    except ValueError:  # UnicodeDecodeError is a ValueError
        return b""


# WebP


def _webp(data: bytes, field: str) -> Header:
    width, height = _webp_size(data, field)
    complete = int.from_bytes(data[4:8], "little") + 8 <= len(data)
    extended = data[12:16] == b"VP8X"
    exif = xmp = icc = b""
    position = 12
    for _ in range(MAX_CHUNKS if extended else 0):
        kind = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        start, position = position + 8, position + 8 + length + (length & 1)
        if kind == b"EXIF":
            exif = data[start : start + length]
        elif kind == b"XMP ":
            xmp = data[start : start + length]
        elif kind == b"ICCP":
            icc = data[start : start + length]
        if position >= len(data):
            break
    else:
        if extended:
            raise _too_many(field, MAX_CHUNKS, "chunks")
    return Header(
        "WebP",
        width,
        height,
        _orientation(exif, xmp),
        _bounded(icc),
        kept_bytes=width * height * _WEBP_CANVAS_BYTES + len(data) + _webp_tables(data),
        complete=complete,
    )


def _webp_tables(data: bytes) -> int:
    """Memory of the tables of codes of the first image in a WebP file, or of its alpha channel."""
    position, end = 12, len(data)
    alpha: int | None = None  # of the first chunk; a decoder uses one
    sides = (0, 0)
    while position + 8 <= end:
        kind = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        start, position = position + 8, position + 8 + length + (length & 1)
        if kind == b"VP8X":
            sides = _webp_sides(data, start + 4)
        elif kind == b"ANMF":  # the first frame, whose chunks follow its 16 bytes
            sides = _webp_sides(data, start + 6)
            position, end = start + 16, min(end, start + length)
        elif kind == b"ALPH" and alpha is None and start < end:
            coded = data[start + 1 : start + length]
            alpha = table_bytes(coded, *sides) if data[start] & 3 == 1 else 0
        elif kind == b"VP8L" and start + 5 <= end:
            bits = int.from_bytes(data[start + 1 : start + 5], "little")
            sides = (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
            return max(alpha or 0, table_bytes(data[start + 5 : start + length], *sides))
        elif kind == b"VP8 ":
            break
    return alpha or 0


def _webp_sides(data: bytes, at: int) -> tuple[int, int]:
    width, height = (1 + int.from_bytes(data[one : one + 3], "little") for one in (at, at + 3))
    return width, height


def _webp_size(data: bytes, field: str) -> tuple[int, int]:
    chunk = data[12:16]
    if len(data) < (25 if chunk == b"VP8L" else 30):
        raise truncated(field)
    if chunk == b"VP8X":
        width, height = _webp_sides(data, 24)
    elif chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif chunk == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise _damaged(field)
    return width, height


# HEIC


def _heic(data: bytes, field: str) -> Header:
    """Decoders turn the image upright themselves."""
    try:
        found = read_heif(data)
    except Flood:
        raise _too_many(field, MAX_PARTS, "boxes or items") from None
    except (Damaged, IndexError, struct.error):
        raise _damaged(field) from None
    return Header(
        "HEIC",
        found.width,
        found.height,
        pixel_bytes=found.channels,
        kept_bytes=found.kept_bytes + len(data),
        stored=found.stored,
        complete=found.complete,
    )


# Metadata


def _bounded(icc: bytes) -> bytes:
    return icc if len(icc) <= _MAX_ICC else b""


def _orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8; EXIF first, then XMP, and 1 where neither says anything sensible."""
    found = _exif_orientation(exif)
    if found is None and xmp:
        match = _XMP_ORIENTATION.search(xmp[:_MAX_METADATA])
        found = int(match.group(1)) if match else None
    return found if found is not None and 1 <= found <= 8 else 1


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of a TIFF structure; None where there is none."""
    exif = exif[:_MAX_METADATA]
    start = 0
    while exif.startswith(_EXIF, start):
        start += len(_EXIF)
    exif = exif[start:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(entries):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, directory + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG and kind in _EXIF_TYPES and count == 1:
                value: int
                (value,) = struct.unpack_from(
                    order + _EXIF_TYPES[kind], exif, directory + 10 + 12 * entry
                )
                return value
    except struct.error:
        return None
    return None


_READERS: dict[str, Callable[[bytes, str], Header]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WebP": _webp,
    "HEIC": _heic,
}
