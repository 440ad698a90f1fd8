"""The number of Huffman groups of a lossless WebP image, for which libwebp allocates tables.

Written after the specification of the WebP lossless bitstream (RFC 9649, section 3). The images of
the transforms stand before the number, so their codes are read here, but never their pixels.
"""

from __future__ import annotations

from typing import NamedTuple

_GROUP_BYTES = 6144
"""Memory of one group: five tables of 256 entries, and what libwebp keeps beside them."""
_LARGE_CODES_BYTES = 6656
"""What the tables of one group take beyond that if its codes are long, which takes bits: the tables
grow by at most ``_BYTES_PER_BYTE`` for each byte of the file."""
_BYTES_PER_BYTE = 128
_MAX_GROUPS = 65_536
_UNMAPPED_GROUPS = 1000
"""Up to this number libwebp keeps groups that no block uses."""
_GROUP_BITS = 20
"""Bits of the smallest group in a file: five codes of one symbol each."""
_MAX_STEPS = 1 << 17
"""Symbols that are read of a file; about 0.1 s. Beyond, the largest possible number is assumed."""
_PREDICTOR, _CROSS_COLOUR, _SUBTRACT_GREEN = 0, 1, 2
_LENGTH_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
_LITERALS, _LENGTHS, _DISTANCES = 256, 24, 40


class _Unknown(Exception):
    """The file is damaged, or needs more steps than are taken."""


class _Code(NamedTuple):
    """A prefix code. masks: the lengths in use, each with its mask. symbols: by length and bits."""

    masks: tuple[tuple[int, int], ...]
    symbols: dict[tuple[int, int], int]


def table_bytes(data: bytes, width: int, height: int) -> int:
    """Upper estimate of the memory for the tables of the groups of an image, in bytes.

    data: the bitstream behind the size, from its transforms on.
    """
    try:
        blocks = _Reader(data).blocks(width, height)
    except _Unknown:
        blocks = -(-width // 4) * -(-height // 4)
    if blocks > 1:
        blocks = max(blocks, min(_UNMAPPED_GROUPS, width * height))
    groups = min(_MAX_GROUPS, blocks, 8 * len(data) // _GROUP_BITS)
    return groups * _GROUP_BYTES + min(groups * _LARGE_CODES_BYTES, len(data) * _BYTES_PER_BYTE)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._steps = 0

    def blocks(self, width: int, height: int) -> int:
        """The blocks of the image to which groups are assigned; 1: the image has one group."""
        seen = set()
        while self._bits(1):
            kind = self._bits(2)
            if kind in seen:
                raise _Unknown
            seen.add(kind)
            if kind in (_PREDICTOR, _CROSS_COLOUR):
                size = self._bits(3) + 2
                self._skip_image(-(-width >> size) * -(-height >> size))
            elif kind != _SUBTRACT_GREEN:
                colours = self._bits(8) + 1
                self._skip_image(colours)
                packed = 3 if colours <= 2 else 2 if colours <= 4 else 1 if colours <= 16 else 0
                width = -(-width >> packed)
        if self._bits(1):
            self._bits(4)  # size of the cache of colours
        if not self._bits(1):
            return 1
        size = self._bits(3) + 2
        return max(2, -(-width >> size) * -(-height >> size))

    def _bits(self, count: int) -> int:
        window = self._window()
        self._at += count
        return window & ((1 << count) - 1)

    def _window(self) -> int:
        """At least 32 bits from the current one on."""
        start = self._at >> 3
        self._steps += 1
        if start >= len(self._data) or self._steps > _MAX_STEPS:
            raise _Unknown
        return int.from_bytes(self._data[start : start + 5], "little") >> (self._at & 7)

    def _symbol(self, code: _Code) -> int:
        if not code.masks:
            return code.symbols[0, 0]
        window = self._window()
        for length, mask in code.masks:
            found = code.symbols.get((length, window & mask))
            if found is not None:
                self._at += length
                return found
        raise _Unknown

    def _skip_image(self, pixels: int) -> None:
        """Pass over the codes of an image of a transform, which has one group."""
        cached = 1 << self._bits(4) if self._bits(1) else 0
        green = self._code(_LITERALS + _LENGTHS + cached)
        others = [code for _ in range(3) if (code := self._code(_LITERALS)).masks]
        distance = self._code(_DISTANCES)
        if not green.masks and not others and green.symbols[0, 0] < _LITERALS:
            return  # its pixels take no bits
        at = 0
        while at < pixels:
            symbol = self._symbol(green)
            if symbol < _LITERALS:
                for code in others:
                    self._symbol(code)
                at += 1
            elif symbol < _LITERALS + _LENGTHS:
                at += self._number(symbol - _LITERALS)
                self._number(self._symbol(distance))
            else:
                at += 1

    def _number(self, prefix: int) -> int:
        """A length or a distance."""
        if prefix < 4:
            return prefix + 1
        extra = (prefix - 2) >> 1
        return ((2 + (prefix & 1)) << extra) + self._bits(extra) + 1

    def _code(self, alphabet: int) -> _Code:
        lengths = [0] * alphabet
        if self._bits(1):
            several, wide = self._bits(1), self._bits(1)
            symbols = [self._bits(8 if wide else 1), *([self._bits(8)] if several else [])]
            if max(symbols) >= alphabet:
                raise _Unknown
            for symbol in symbols:
                lengths[symbol] = 1
            return _made(lengths)
        of_lengths = [0] * 19
        for place in range(self._bits(4) + 4):
            of_lengths[_LENGTH_ORDER[place]] = self._bits(3)
        code = _made(of_lengths)
        left = 2 + self._bits(2 + 2 * self._bits(3)) if self._bits(1) else alphabet
        at, previous = 0, 8
        while at < alphabet and left:
            left -= 1
            symbol = self._symbol(code)
            if symbol < 16:
                lengths[at] = symbol
                previous = symbol or previous
                at += 1
                continue
            base, extra = ((3, 2), (3, 3), (11, 7))[symbol - 16]
            count = base + self._bits(extra)
            if at + count > alphabet:
                raise _Unknown
            if symbol == 16:
                lengths[at : at + count] = [previous] * count
            at += count
        return _made(lengths)


def _made(lengths: list[int]) -> _Code:
    """The canonical code of these lengths. The first bit of a code is the lowest one here."""
    used = [symbol for symbol, length in enumerate(lengths) if length]
    if len(used) == 1:
        return _Code((), {(0, 0): used[0]})
    if not used:
        raise _Unknown
    symbols, code, before = {}, 0, 0
    for length, symbol in sorted((lengths[symbol], symbol) for symbol in used):
        code <<= length - before
        before = length
        if code >> length:
            raise _Unknown
        symbols[length, int(f"{code:0{length}b}"[::-1], 2)] = symbol
        code += 1
    masks = tuple((length, (1 << length) - 1) for length in sorted({*lengths} - {0}))
    return _Code(masks, symbols)
