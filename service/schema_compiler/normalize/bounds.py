"""How far the expansion of a schema goes before the grammar gets looser, and what a grammar costs.

All bounds are counted, so that a schema gets the same grammar on every machine. A schema is tried
with the first of ``LADDER``; when it is too costly, with the next, which drops more of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


class TooCostly(Exception):
    """The schema needs looser bounds."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """alternatives: of one type, by multiplying; more grow the grammar and the time of each step past
    their use. steps: conjunctions that are built, about 2 µs each. joined: states that join several
    subschemas; schemas that refer to themselves in parts of ``allOf`` could have exponentially many.
    members: of all objects together, about 30 µs each in the analysis and more in a compiler.
    effort: of the automata of strings, about a µs each.
    last: whether objects beyond the bounds, and what is in them, are any; else the next bounds are
    taken.
    """

    alternatives: int
    steps: int
    joined: int
    members: int
    effort: int
    last: bool


EXACT = Bounds(128, 30_000, 3_000, 2_000, 150_000, last=False)
NARROW = Bounds(8, 4_000, 500, 1_000, 100_000, last=True)
LOOSE = Bounds(2, 1_000, 100, 150, 50_000, last=True)
LADDER = (EXACT, NARROW, LOOSE)
BEYOND = "the schema is too large for a grammar of all of it"
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
