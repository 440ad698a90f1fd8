"""An estimate of the time that an engine takes to compile a grammar."""

from __future__ import annotations

import re

MAX_COST = 1_000_000
"""Of a grammar, about in µs of a compiler over single bytes."""
_SMALL = 20_000
"""Characters of a grammar that is never too costly."""
_UNROLLED = 128
"""Repeats that compilers write out."""
_ALTERNATIVE = "| "
_PARTS = re.compile(
    r'"((?:\\U[0-9a-f]{8}|[^"\\])*)"|(\[(?:\\U[0-9a-f]{8}|[^\]\\])*\])|\{(\d+)(?:,(\d*))?\}|(\n|\(|\| (?="))'
)


def cost(text: str) -> int:
    """What a grammar costs to compile, about in µs: a compiler goes through all rules once for each
    of its states, which are characters of literals, and classes. Literals with which alternatives of a
    rule begin share the states of what is equal in them."""
    if len(text) < _SMALL:
        return 0
    states = rules = 0
    before = ""
    begins = False
    for written, class_, least, most, mark in _PARTS.findall(text):
        if mark:
            begins = mark == _ALTERNATIVE
            rules += not begins
            before = before if begins else ""
            continue
        if class_:
            states += 1
        elif least:
            times = min(int(most or least), _UNROLLED)
            states, rules = states + times, rules + times
        elif begins:
            new = written.removeprefix(before)
            states += len(new) - 9 * new.count("\\U")
            before = written
        else:
            states += len(written) - 9 * written.count("\\U")
        begins = False
    return int(states * (8 + rules * 0.006))
