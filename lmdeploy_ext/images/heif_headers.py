"""The header of a HEIC file: boxes of ISO 14496-12 and 23008-12, as far as the size needs them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

MAX_PARTS = 16_384
"""Boxes, properties and items. A photo of 200 megapixels has about 800 tiles, each of them an item."""
_CONTAINERS = 4  # bytes of version and flags before the children of ``meta``


class Damaged(ValueError):
    """The boxes do not fit together."""


class Flood(ValueError):
    """The file has more parts than any program writes."""


class HeifHeader(NamedTuple):
    """Width and height of the primary image as a decoder gives it, upright.

    stored: width and height of the largest image in the file, which a decoder may have to hold
    before it crops. channels: of the decoded image. kept_bytes: that libheif keeps beside it.
    complete: whether the file reaches its end.
    """

    width: int
    height: int
    stored: tuple[int, int]
    channels: int
    kept_bytes: int
    complete: bool


def read_heif(data: bytes) -> HeifHeader:
    """The header of a HEIC file.

    Rotation and cropping are properties of the image, which decoders apply; the orientation in EXIF
    repeats them and does not count.

    Raises ``Damaged``, ``Flood``, ``IndexError`` and ``struct.error`` for files that cannot be read.
    """
    complete = True
    meta = b""
    for kind, body, whole in _boxes(data):
        complete = complete and whole
        if kind == b"meta" and not meta:
            meta = body[_CONTAINERS:]
    children = {kind: body for kind, body, _ in _boxes(meta)}
    if b"pitm" not in children or b"iprp" not in children:
        raise Damaged
    pitm = children[b"pitm"]
    (primary,) = struct.unpack_from(">I" if pitm[0] else ">H", pitm, 4)
    width = height = changed = 0
    known = _known_properties(children[b"iprp"])
    for kind, body in _properties(children[b"iprp"], known, primary):
        if kind == b"ispe":
            width, height = struct.unpack_from(">II", body, 4)
        elif kind == b"clap":
            across, of_across, down, of_down = struct.unpack_from(">IIII", body)
            width, height = round(across / max(1, of_across)), round(down / max(1, of_down))
        elif kind == b"irot" and body[0] & 1:
            width, height = height, width
        if kind in (b"clap", b"irot", b"imir"):
            changed = max(changed, width * height)
    if not width or not height:
        raise Damaged
    alpha = any(kind == b"auxC" for kind, _ in known)
    planes = max((_plane_bytes(body) for kind, body in known if kind == b"hvcC"), default=6.0)
    sizes = [struct.unpack_from(">II", body, 4) for kind, body in known if kind == b"ispe"]
    stored = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    pixels = max(width * height, stored[0] * stored[1])
    kept = 2 * (planes + alpha) * (pixels + changed) + pixels / 2
    return HeifHeader(width, height, stored, 3 + alpha, int(kept), complete)


def _plane_bytes(record: bytes) -> float:
    """Bytes of a pixel in all planes of colour, by the decoder configuration record of HEVC."""
    samples = {0: 1.0, 1: 1.5, 2: 2.0}.get(record[16] & 3, 3.0)
    return samples * (2 if record[17] & 7 else 1)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Kind and content of each box, and whether all of it is there."""
    position = 0
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        begin = position + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, begin)
            begin += 8
        end = position + length if length else len(data)
        if end < begin:
            raise Damaged
        yield kind, data[begin:end], end <= len(data)
        position = end
    raise Flood


def _known_properties(iprp: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of the properties of all items."""
    lists = (body for kind, body, _ in _boxes(iprp) if kind == b"ipco")
    return [(kind, content) for kind, content, _ in _boxes(next(lists, b""))]


def _properties(
    iprp: bytes, known: list[tuple[bytes, bytes]], item: int
) -> Iterator[tuple[bytes, bytes]]:
    """The properties of an item, in the order in which a decoder applies them."""
    for kind, body, _ in _boxes(iprp):
        if kind == b"ipma":
            for index in _associations(body, item):
                if 0 < index <= len(known):
                    yield known[index - 1]


def _associations(ipma: bytes, item: int) -> Iterator[int]:
    """The numbers of the properties of an item, from 1."""
    version, wide = ipma[0], ipma[3] & 1
    (entries,) = struct.unpack_from(">I", ipma, 4)
    if entries > MAX_PARTS:
        raise Flood
    position = 8
    for _ in range(entries):
        (found,) = struct.unpack_from(">I" if version else ">H", ipma, position)
        position += 4 if version else 2
        count = ipma[position]
        position += 1
        for _ in range(count):
            value = int.from_bytes(ipma[position : position + 1 + wide], "big")
            position += 1 + wide
            if found == item:
                yield value & (0x7FFF if wide else 0x7F)
