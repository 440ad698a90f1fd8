"""An estimate of the time that an engine takes to compile a grammar."""

from __future__ import annotations

import re

MAX_COST = 700_000
"""Of a grammar, about in µs of a compiler over single bytes."""
_SMALL = 20_000
"""Characters of a grammar that is never too costly."""
_UNROLLED = 128
"""Repeats that compilers write out."""
_PARTS = re.compile(
    r'"((?:\\U[0-9a-f]{8}|[^"\\])*)"|(\[(?:\\U[0-9a-f]{8}|[^\]\\])*\])|\{(\d+)(?:,(\d*))?\}|(\n|\()'
)


def cost(text: str) -> int:
    """What a grammar costs to compile, about in µs: a compiler goes through all rules once for each
    of its states, which are characters of literals, and classes."""
    if len(text) < _SMALL:
        return 0
    states = rules = 0
    for written, class_, least, most, mark in _PARTS.findall(text):
        if mark:
            rules += 1
        elif class_:
            states += 1
        elif least:
            times = min(int(most or least), _UNROLLED)
            states, rules = states + times, rules + times
        else:
            states += len(written) - 9 * written.count("\\U")
    return int(states * (8 + rules * 0.006))
