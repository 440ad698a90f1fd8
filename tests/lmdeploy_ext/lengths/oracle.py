"""The lengths of strings in unfinished JSON, found without the follower."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from typing import Any

UNLIMITED = 2**31 - 1
VOCABULARY: list[bytes] = [
    *(bytes([byte]) for byte in range(256)),
    *(text.encode() for text in (
        '", "', '": "', '"}', '": {"', '": ["', '"a', '"ab"', '""', '", "b": "xy', '["', '"]', '["", "',
        '"abc", "', "abc", "hello", "é", "éa", "漢字", "😀", "😀😀", "\\n", "\\n\\n", '\\"', '\\""', "\\\\",
        '\\\\"', "\\u", "\\u00", "\\u00e9", "\\u00e9x", "\\ud83d", "\\ud83d\\u", "\\uDE00", "de00", "00", "e9",
        "d8", "3d", "\\ud83d\\ude00\\", "u0041", 'u0041"', 'n", "', "de00q", "000000000000000000",
    )),
    "漢".encode()[:2], "漢".encode()[2:], "漢".encode()[2:] + b"q", "😀".encode()[2:] + b'", "x', b"ab\xe6",
    b'"\xe6', b'\xa2"', b"",
]  # fmt: skip
"""All bytes, tokens that touch several strings, and tokens that cut escapes and characters; the last
stands for the end of the answer."""
STOP = len(VOCABULARY) - 1

_STRING = re.compile(rb'"((?:[^"\\]|\\.)*)("|\\?$)', re.DOTALL)
_CUT = re.compile(
    r'((?:[^\\]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*)(\\(?:u[0-9a-fA-F]{0,3})?)?', re.DOTALL
)


def strings(text: bytes) -> Iterator[tuple[int, bool]]:
    """The characters of each string that has begun, and whether it is closed."""
    for found in _STRING.finditer(text):
        closed = found[2] == b'"'
        yield _characters(found[1] if closed else found[1] + found[2]), closed


def _characters(data: bytes) -> int:
    cut = 0
    while cut < 4:
        try:
            text = data[: len(data) - cut].decode()
            break
        except UnicodeDecodeError:
            cut += 1
    else:
        raise AssertionError(data)
    parts = _CUT.fullmatch(text)
    assert parts is not None
    value: str = json.loads(f'"{parts[1]}"')
    is_second_half = bool(parts[2]) and bool(re.search("[\ud800-\udbff]$", value))
    return len(value) + (bool(cut) or (bool(parts[2]) and not is_second_half))


def table(*states: tuple[int, int, int, int, list[int], int], root: int = 1) -> bytes:
    """A table without names. A state: minimum, maximum, NONE, other, items, rest."""
    rows: list[int] = []
    items: list[int] = []
    for low, high, names, other, first, rest in [(0, UNLIMITED, -1, 0, [], 0), *states]:
        rows += [low, high, -1, 0, UNLIMITED, names, other, len(items), len(first), rest]
        items += first
    least = min(state[1] for state in states)
    header = [2, len(states) + 1, 0, 0, len(items), root, least]
    numbers: list[Any] = [*header, *rows, *items]
    return struct.pack(f"<{len(numbers)}i", *numbers)


def string_table(low: int, high: int | None) -> bytes:
    """The limits of an answer that is one string."""
    return table((low, UNLIMITED if high is None else high, -1, 0, [], 0))
