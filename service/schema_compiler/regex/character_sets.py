"""What the sets of characters in regular expressions contain: exactly what the matcher says.

Ranges are computed; Unicode properties, and letters outside ASCII without regard to case, are asked
of the matcher, whose version of Unicode is not Python's.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from functools import lru_cache

from service.schema_compiler.regex.codepoints import ALL, Ranges, complement, ranges, union
from service.schema_compiler.regex.matching import matcher, spelled_class
from service.schema_compiler.regex.syntax import Chars, Property

_LONGEST = 16_384
"""Characters that the matcher is asked for at once."""
_UTF32 = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
_KELVIN, _LONG_S = 0x212A, 0x017F
"""The only characters outside ASCII that are equal to ASCII letters without regard to case."""


@lru_cache(maxsize=1024)
def resolve(chars: Chars) -> Ranges:
    """The code points of a set of characters. Raises ``PatternError`` where a property is unknown."""
    found: list[Ranges] = []
    for member in chars.members:
        if isinstance(member, Property):
            return _asked(spelled_class(chars))
        found.append(resolve(member) if isinstance(member, Chars) else ranges([member]))
    inside = union(found)
    if chars.fold:
        if inside and inside[-1][1] > 0x7F:
            return _asked(spelled_class(chars))
        inside = union([inside, _other_case(inside)])
    return complement(inside) if chars.negated else inside


def _other_case(inside: Ranges) -> Ranges:
    """What ASCII letters in the set are equal to without regard to case."""
    found = []
    for low, high in inside:
        for first, other in ((0x41, 0x61), (0x61, 0x41)):
            start, end = max(low, first), min(high, first + 25)
            if start <= end:
                found.append((start - first + other, end - first + other))
    folded = ranges(found)
    extra = (
        [(_KELVIN, _KELVIN)] if any(lo <= ord("k") <= hi for lo, hi in (*inside, *folded)) else []
    )
    if any(lo <= ord("s") <= hi for lo, hi in (*inside, *folded)):
        extra.append((_LONG_S, _LONG_S))
    return union([folded, tuple(sorted(extra))])


@lru_cache(maxsize=64)
def _asked(spelling: str) -> Ranges:
    """The set by the matcher, run after run of characters that are in it, or are not."""
    inside, some = matcher(rf"\A{spelling}*\z"), matcher(spelling)
    found: list[tuple[int, int]] = []
    for first, last in ALL:
        text = array("I", range(first, last + 1)).tobytes().decode(_UTF32)
        at = 0
        while at < len(text):
            if inside.isinstance_python(text[at]):
                end = _run(text, at + 1, inside.isinstance_python)
                found.append((first + at, first + end - 1))
            else:
                end = _run(text, at + 1, lambda piece: not some.isinstance_python(piece))
            at = end
    return tuple(found)


def _run(text: str, at: int, same: Callable[[str], bool]) -> int:
    """Where the longest piece from here ends of which all is the same: in steps that double until
    one is too long, and are halved from there."""
    step = 1
    while at < len(text) and same(text[at : at + step]):
        at += step
        step = min(2 * step, _LONGEST)
    while step > 1:
        step //= 2
        if at < len(text) and same(text[at : at + step]):
            at += step
    return min(at, len(text))
