"""EBNF of callers, with classes of characters in a form that every xgrammar reads alike.

See `service.schema_compiler.emit.json_escapes.encoded`. The rest stays as it is, and so do mistakes: what is
wrong with a grammar is said by its compiler.
"""

from __future__ import annotations

import re

from service.schema_compiler.emit.json_escapes import character_class
from service.schema_compiler.regex.codepoints import complement, ranges

_CLASS = re.compile(r'"(?:[^"\\\n\r]|\\.)*"|#[^\n\r]*|\[(\^?)((?:[^\]\\\n\r]|\\.)*)\]')
"""A string or a comment, which may hold brackets, or a class."""
_UNIT = r"\\x[0-9A-Fa-f]+|\\u[0-9A-Fa-f]{4}|\\U[0-9A-Fa-f]{8}|\\[^xuU]|[^\\]"
_MEMBER = re.compile(rf"({_UNIT})(?:-({_UNIT}))?")
_SHORT = {
    "a": 0x07, "b": 0x08, "t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "e": 0x1B, "0": 0x00,
} | {char: ord(char) for char in "'\"?\\/^$.*+()[]{}|-"}  # fmt: skip


def portable(source: str) -> str:
    """The same grammar, with the classes that hold more than ASCII written anew."""
    return _CLASS.sub(_rewritten, source)


def _rewritten(token: re.Match[str]) -> str:
    if not token[0].startswith("["):
        return token[0]
    pairs, at = [], 0
    while at < len(token[2]):
        member = _MEMBER.match(token[2], at)
        low, high = (_code(member[1]), _code(member[2] or member[1])) if member else (-1, -1)
        if member is None or not 0 <= low <= high <= 0x10FFFF:
            return token[0]
        pairs.append((low, high))
        at = member.end()
    found = complement(ranges(pairs)) if token[1] else ranges(pairs)
    return character_class(found) if found and found[-1][1] >= 0x80 else token[0]


def _code(unit: str) -> int:
    """The character of a class, escaped or not; negative where there is no such escape."""
    if not unit.startswith("\\"):
        return ord(unit)
    return int(unit[2:], 16) if unit[1] in "xuU" else _SHORT.get(unit[1], -1)
