"""Regular expressions as they are written, where no automaton is needed.

``^[a-z]{1,500}$`` is 501 states and twelve characters. So an expression keeps its form where a
matcher that reads it has one way to go on at each character, or a few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from service.schema_compiler.regex.character_sets import resolve
from service.schema_compiler.regex.codepoints import ALL, Ranges, intersection, union
from service.schema_compiler.regex.syntax import (
    END,
    START,
    Ahead,
    Assertion,
    Chars,
    Choice,
    Node,
    Repeat,
    Sequence,
)

_WRITTEN_OUT = 200
"""Repeats that compilers write out; beyond, they count."""
ANY = Chars((), negated=True)
ANYTHING = Repeat(ANY, 0, None)
Span = tuple[int, int | None]
"""The least and the greatest number of characters; None: any number."""


def unanchored(node: Node, *, whole: bool) -> Node | None:
    """The expression that matches from end to end what this one is found in (or with ``whole``,
    matches from end to end), without anchors; None where they stand elsewhere than at the ends."""
    if isinstance(node, Choice):
        parts = [unanchored(item, whole=whole) for item in node.items]
        found = tuple(part for part in parts if part is not None)
        return Choice(found) if len(found) == len(parts) else None
    items = flat(node)
    first, last = 0, len(items)
    while first < last and items[first] == START:
        first += 1
    while last > first and items[last - 1] == END:
        last -= 1
    inner = items[first:last]
    if not all(map(_is_plain, inner)):
        return None
    before = [] if first or whole else [ANYTHING]
    after = [] if last < len(items) or whole else [ANYTHING]
    return Sequence((*before, *inner, *after))


def flat(node: Node) -> list[Node]:
    """The items of an expression, one after the other, none of which is a sequence."""
    if not isinstance(node, Sequence):
        return [node]
    return [part for item in node.items for part in flat(item)]


def _is_plain(node: Node) -> bool:
    if isinstance(node, Assertion | Ahead):
        return False
    if isinstance(node, Chars):
        return bool(resolve(node))
    return all(map(_is_plain, (node.item,) if isinstance(node, Repeat) else node.items))


def span(node: Node) -> Span:
    """How long the texts are that an expression without assertions matches from end to end."""
    if isinstance(node, Sequence):
        return _sum([span(item) for item in node.items])
    if isinstance(node, Choice):
        spans = [span(item) for item in node.items]
        highs = [high for _, high in spans]
        return min(low for low, _ in spans), None if None in highs else max(
            h for h in highs if h is not None
        )
    if isinstance(node, Repeat):
        low, high = span(node.item)
        if high == 0 or node.high == 0:
            return 0, 0
        return low * node.low, None if high is None or node.high is None else high * node.high
    return 1, 1


def _sum(spans: list[Span]) -> Span:
    highs = [high for _, high in spans if high is not None]
    return sum(low for low, _ in spans), sum(highs) if len(highs) == len(spans) else None


def within(node: Node, low: int, high: int | None) -> Node | None:
    """The expression for those of the texts whose length is within bounds; None where it takes more
    than new bounds of a repeat, or nothing is left."""
    least, greatest = span(node)
    if least >= low and (high is None or (greatest is not None and greatest <= high)):
        return node
    items = flat(node)
    spans = [span(item) for item in items]
    free = [at for at, (shortest, longest) in enumerate(spans) if shortest != longest]
    if len(free) != 1:
        return None
    at = free[0]
    item = items[at]
    if not isinstance(item, Repeat) or span(item.item) != (1, 1):
        return None
    fixed = least - spans[at][0]
    least = max(item.low, low - fixed)
    bounds = [
        bound for bound in (item.high, None if high is None else high - fixed) if bound is not None
    ]
    if bounds and min(bounds) < least:
        return None
    items[at] = replace(item, low=least, high=min(bounds, default=None))
    return Sequence(tuple(items))


def loosened(node: Node, most: int, is_counted: Callable[[Repeat], bool]) -> Node:
    """The expression with no bound above ``most`` for the repeats that are counted; it matches all
    that the other one does."""
    if isinstance(node, Repeat):
        if not is_counted(node):
            return replace(node, item=loosened(node.item, most, is_counted))
        low = node.low if node.low <= most else 0
        high = None if node.high is None or node.high > most else node.high
        return replace(node, low=low, high=high)
    if isinstance(node, (Sequence, Choice)):
        return replace(node, items=tuple(loosened(one, most, is_counted) for one in node.items))
    return node


@dataclass(frozen=True, slots=True)
class _Ends:
    """How an expression begins and ends, for the ambiguity that a reader of it has.

    first: characters that it can begin with. more: characters with which a text that it matches can
    go on. ambiguity: the greatest number of places at which a reader can be at once, about.
    """

    optional: bool
    first: Ranges
    more: Ranges
    ambiguity: int


MANY = 1_000_000
"""Ways that are not counted."""


def ambiguity(node: Node) -> int:
    """The places in the expression at which a reader can be at once; 1 where each character decides
    how to go on."""
    return _ends(node).ambiguity


@lru_cache(maxsize=1024)
def _ends(node: Node) -> _Ends:
    if isinstance(node, Chars):
        return _Ends(False, resolve(node), (), 1)
    if isinstance(node, Repeat):
        return _ends_of_repeat(node)
    if isinstance(node, Choice):
        parts = [_ends(item) for item in node.items]
        first = union(part.first for part in parts)
        apart = sum(map(_size, (part.first for part in parts))) == _size(first)
        several = (max if apart else sum)(part.ambiguity for part in parts)
        return _Ends(any(p.optional for p in parts), first, union(p.more for p in parts), several)
    assert isinstance(node, Sequence)
    return _ends_of_sequence(node)


def _ends_of_sequence(node: Sequence) -> _Ends:
    found = _Ends(True, (), (), 1)
    rest: Span = (0, 0)
    for item in reversed(node.items):
        part = _ends(item)
        going_on = union([part.more, part.first]) if part.optional else part.more
        several = max(part.ambiguity, found.ambiguity)
        if intersection(going_on, found.first):
            several = part.ambiguity + found.ambiguity * (
                MANY if rest[1] is None else max(rest[1], 1)
            )
        found = _Ends(
            optional=part.optional and found.optional,
            first=union([part.first, found.first]) if part.optional else part.first,
            more=union([found.more, found.first, part.more]) if found.optional else found.more,
            ambiguity=several,
        )
        rest = _sum([span(item), rest])
    return found


def _ends_of_repeat(node: Repeat) -> _Ends:
    part = _ends(node.item)
    if node.high is not None and node.high <= 1:
        return replace(part, optional=part.optional or node.low == 0)
    again = intersection(union([part.more, part.first]) if part.optional else part.more, part.first)
    several = MANY if again or part.optional or part.ambiguity > 1 else 1
    more = part.more if node.low == node.high else union([part.more, part.first])
    return _Ends(part.optional or node.low == 0, part.first, more, several)


def _size(characters: Ranges) -> int:
    return sum(high - low + 1 for low, high in characters)


def weight(node: Node) -> int:
    """Ranges of characters, with the repeats as compilers write them out."""
    if isinstance(node, Chars):
        return len(resolve(node))
    if isinstance(node, Repeat):
        times = node.low if node.high is None else node.high
        return weight(node.item) * min(max(times, 1), _WRITTEN_OUT)
    if isinstance(node, Assertion | Ahead):
        return 0
    return sum(map(weight, node.items))


def is_anything(node: Node) -> bool:
    """Whether the expression matches any text."""
    return (
        isinstance(node, Repeat)
        and (node.low, node.high) == (0, None)
        and isinstance(node.item, Chars)
        and resolve(node.item) == ALL
    )
