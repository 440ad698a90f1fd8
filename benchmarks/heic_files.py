"""HEIC files without an encoder: one coded tile, put into boxes as cameras do.

The tiles were encoded once with x265. A grid shows its tile again and again.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A coded image of side x side pixels. config: its decoder configuration record."""

    side: int
    config: bytes
    coded: bytes


QUADRANTS = Tile(
    64,
    base64.b64decode(
        "AQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQArQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq"
        "SSmubgIaDAgAAAMAyAAAAwAIQGIAAQAHRAHBcrAiQA=="
    ),
    base64.b64decode(
        "AAAAPSgBrwT4QTJp2//Fh///+qRvZf2qoYX7n7XQ9//KG7//y2izT7/TD+jftw6P/8Fat/L/8t49//MqdY/MtZg="
    ),
)
"""Red (200, 30, 30), green (30, 200, 30), blue (30, 30, 200) and grey (220, 220, 220), row by row."""
PLAIN = Tile(
    512,
    base64.b64decode(
        "AQNwAAAAkAAAAAAAWvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAWroCQGEAAQArQgEBA3AAAAMAkAAAAwAAAwBaoAQCAIBZ"
        "bqSSmubgIaDAgAAADIAAAAMAhGIAAQAHRAHBcrBiQA=="
    ),
    base64.b64decode(
        "AAAA5CgBrwTxBr3Wl1lVIEEyadv+lf/kfzFR//9tDST0cYM7GDOTinQihDqlAAADAAADAAADAAADAAADAAASkABlUvVKAAADAAADAAADAAAD"
        "AAADAAADAAADAAAFvAAAAwAAAwAAAwAAAwAAAwAAAwAAAwAAAwABtwAAAwAAAwAAAwAAAwAAAwAAAwAAAwABZwAAAwAAAwAAAwAAAwAAAwAA"
        "AwAAAwMaAAADAAADAAADAAADAAADAAADAAB5wAAAAwAAAwAAAwAAAwAAAwAAAwAE7AAAAwAAAwAAAwAAAwAAAwAAAwAUUA=="
    ),
)
"""One colour, (90, 120, 200)."""
BT601 = b"nclx" + struct.pack(">HHHB", 1, 13, 6, 0x80)


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", len(body) + 8, kind) + body


def full(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    """A box with version and flags."""
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def turned(quarters: int) -> bytes:
    """Rotation, in quarters of a turn against the clock."""
    return box(b"irot", bytes([quarters]))


def mirrored(axis: int) -> bytes:
    """0: top and bottom change places; 1: left and right do."""
    return box(b"imir", bytes([axis]))


def cropped(width: int, height: int, from_width: int, from_height: int) -> bytes:
    """The part at the top left."""
    left, top = (width - from_width, height - from_height)  # twice the offset of the centre
    return box(b"clap", struct.pack(">IIIIiIiI", width, 1, height, 1, left, 2, top, 2))


def heic(
    tile: Tile = QUADRANTS,
    columns: int = 1,
    rows: int = 1,
    *,
    size: tuple[int, int] | None = None,
    properties: Sequence[bytes] = (),
    claimed: tuple[int, int] | None = None,
    exif: bytes = b"",
    profile: bytes = b"",
) -> bytes:
    """A file of one image, or of a grid of tiles.

    size: of the grid, cut to that. properties: further ones of the image, in order. claimed: a size
    that the header states instead. exif: TIFF data. profile: ICC.
    """
    width, height = size or (columns * tile.side, rows * tile.side)
    grid = columns * rows > 1 or size is not None
    primary = 1
    tiles = range(2, 2 + columns * rows) if grid else range(1, 2)
    coded = [tile.coded]
    items = [(number, b"hvc1", 0, int(grid)) for number in tiles]
    references = b""
    if grid:
        items.insert(0, (primary, b"grid", 1, 0))
        coded.append(bytes([0, 0, rows - 1, columns - 1]) + struct.pack(">HH", width, height))
        numbers = struct.pack(f">HH{len(tiles)}H", primary, len(tiles), *tiles)
        references += box(b"dimg", numbers)
    if exif:
        number = len(items) + 1
        items.append((number, b"Exif", len(coded), 0))
        coded.append(struct.pack(">I", 0) + exif)
        references += box(b"cdsc", struct.pack(">HHH", number, 1, primary))
    claim = claimed or (width, height)
    colour = box(b"colr", b"prof" + profile) if profile else box(b"colr", BT601)
    known = [
        box(b"hvcC", tile.config),
        full(b"ispe", struct.pack(">II", tile.side, tile.side)),
        full(b"ispe", struct.pack(">II", *claim)),
        box(b"colr", BT601),
        colour,
        *properties,
    ]
    own = [0x80 | number for number in range(6, 6 + len(properties))]
    of_image = bytes([3, 5, *own] if grid else [0x81, 3, 5, *own])
    of_tile = bytes([0x81, 2, 4])
    associations = struct.pack(">HB", primary, len(of_image)) + of_image
    if grid:
        associations += b"".join(struct.pack(">HB", number, 3) + of_tile for number in tiles)
    properties_box = box(
        b"iprp",
        box(b"ipco", *known),
        full(b"ipma", struct.pack(">I", 1 + len(tiles) * grid), associations),
    )
    entries = [
        full(b"infe", struct.pack(">HH", number, 0), kind, b"\0", version=2, flags=hidden)
        for number, kind, _, hidden in items
    ]

    def meta(begin: int) -> bytes:
        places = [begin + sum(map(len, coded[:index])) for index in range(len(coded))]
        located = b"".join(
            struct.pack(">HHHII", number, 0, 1, places[index], len(coded[index]))
            for number, _, index, _ in items
        )
        return full(
            b"meta",
            full(b"hdlr", bytes(4), b"pict", bytes(13)),
            full(b"pitm", struct.pack(">H", primary)),
            full(b"iloc", b"\x44\x00", struct.pack(">H", len(items)), located),
            full(b"iinf", struct.pack(">H", len(items)), *entries),
            full(b"iref", references) if references else b"",
            properties_box,
        )

    head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    begin = len(head) + len(meta(0)) + 8
    return head + meta(begin) + box(b"mdat", *coded)
