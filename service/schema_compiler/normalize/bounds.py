"""How far the expansion of a schema goes before the grammar gets looser.

All bounds are counted, so that a schema gets the same grammar on every machine. A schema is tried
with the first of ``LADDER``; when it is too costly, with the next, which drops more of it. ``WIDE`` is for
schemas of which the first drops something because of too many alternatives; what drops less is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


class TooCostly(Exception):
    """The schema needs looser bounds."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """alternatives: of one type, by multiplying; more grow the grammar and the time of each step past
    their use. steps: conjunctions that are built, about 2 µs each. joined: states that join several
    subschemas; schemas that refer to themselves in parts of ``allOf`` could have exponentially many.
    members: of all objects together, about 30 µs each in the analysis and more in a compiler.
    effort: of the automata of strings, about a µs each.
    patterns_ms: that an engine takes for all patterns, see ``lower/compile_time.py``.
    overlaps: whether strings of one pattern leave out those of another, as ``oneOf`` asks.
    last: whether objects beyond the bounds, and what is in them, are any; else the next bounds are
    taken.
    """

    alternatives: int
    steps: int
    joined: int
    members: int
    effort: int
    last: bool
    patterns_ms: float = math.inf
    overlaps: bool = True


EXACT = Bounds(128, 30_000, 3_000, 2_000, 150_000, last=False)
WIDE = replace(EXACT, alternatives=1_024)
"""For schemas of which ``EXACT`` is too narrow for something: many alternatives hold no value in the end."""
NARROW = Bounds(8, 4_000, 500, 1_000, 100_000, last=True)
LOOSE = Bounds(2, 1_000, 100, 150, 50_000, last=True)
LADDER = (EXACT, WIDE, NARROW, LOOSE)
BEYOND = "the schema is too large for a grammar of all of it"
