"""The bounds on lengths of strings that a grammar leaves to the decoder.

Beside a pattern, the decoder counts what the grammar cannot: bounds above ``MAX_COUNTED``, and the repeat
of a pattern such as ``^[a-z]{1,255}$``, whose texts are those of ``^[a-z]+$`` with 1 to 255 characters. It
counts the characters of formats with long counts, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from service.schema_compiler.ir.values import AcceptedText, MatchedText, TextSet
from service.schema_compiler.lower.format_patterns import FORMAT_PATTERNS
from service.schema_compiler.lower.string_constraints import MAX_COUNTED
from service.schema_compiler.lower.string_patterns import implied_lengths
from service.schema_compiler.normalize.constraints import Literal
from service.schema_compiler.regex.dfa import Dfa, Effort, TooLarge
from service.schema_compiler.regex.nfa import Alphabet, recognised
from service.schema_compiler.regex.syntax import Expression, Node

MAX_STEPS = 20_000
"""Of the automaton of one pattern that is written as it stands, 4 µs each; most take some dozens."""
MAX_ALL_STEPS = 3 * MAX_STEPS
"""Of all of a schema; further lengths are not left to the decoder."""


@dataclass(frozen=True, slots=True)
class LeftLengths:
    """keywords: the kinds of keywords, of ``minLength``, ``maxLength``, ``pattern`` and ``format``, whose
    lengths the grammar leaves out. minimum, maximum: the bounds that the decoder keeps. minimum_by, maximum_by: indices
    of the literals behind them. automaton: of the texts that the grammar allows, where they cannot end
    everywhere, so that the decoder has to know what is needed to end them."""

    keywords: frozenset[str] = frozenset()
    minimum: int = 0
    maximum: int | None = None
    minimum_by: tuple[int, ...] = ()
    maximum_by: tuple[int, ...] = ()
    automaton: Dfa | None = None


NOTHING_LEFT = LeftLengths()


def plain_lengths(literals: Sequence[Literal]) -> LeftLengths:
    """All bounds of strings without a pattern."""
    bounds = [(i, one) for i, one in enumerate(literals) if one.keyword in _LENGTHS]
    lows = [(_bound(one), i) for i, one in bounds if _is_least(one)]
    highs = [(_bound(one), i) for i, one in bounds if not _is_least(one)]
    return _left([(low, i) for low, i in lows if low > 0], highs, literals)


def long_lengths(literals: Sequence[Literal]) -> LeftLengths:
    """The bounds to which a grammar does not count, and those that patterns and formats imply. A grammar
    counts to the tightest of several ``maxLength``; where it can, the others say nothing."""
    lows: list[tuple[int, int]] = []
    highs: list[tuple[int, int]] = []
    own = [_bound(one) for one in literals if one.keyword in _LENGTHS and not _is_least(one)]
    formats = {i: longest for i, one in enumerate(literals) if (longest := _longest(one))}
    is_counted = not formats and min(own, default=0) <= MAX_COUNTED
    for i, one in enumerate(literals):
        low: int | None = None
        high: int | None = None
        if one.keyword in _LENGTHS:
            if _is_least(one):
                low = _bound(one)
            elif not is_counted:
                high = _bound(one)
        elif one.keyword == "pattern" and not one.negated:
            low, high = implied_lengths(one.value) or (None, None)
        if low is not None and low > MAX_COUNTED:
            lows.append((low, i))
        if high is not None and (high > MAX_COUNTED or formats):
            highs.append((high, i))
    highs += ((longest, i) for i, longest in formats.items())
    return _left(lows, highs, literals)


def can_be_left(left: LeftLengths, automaton: Dfa | None) -> LeftLengths:
    """The same with the automaton where the decoder needs it; nothing where it could not keep the bounds.
    automaton: of the texts that the grammar allows without them; None: it is too large."""
    if automaton is None or automaton.is_empty:
        return NOTHING_LEFT
    shortest, longest = automaton.lengths()
    if left.maximum is not None and max(shortest, left.minimum) > left.maximum:
        return NOTHING_LEFT
    if left.minimum_by and (longest is not None or not automaton.can_grow()):
        return NOTHING_LEFT
    if left.maximum is None or automaton.ends_within(left.maximum):
        return left
    return LeftLengths(
        left.keywords, left.minimum, left.maximum, left.minimum_by, left.maximum_by, automaton
    )


def automaton_of(texts: TextSet | None) -> tuple[Dfa | None, int]:
    """The automaton of texts with a pattern, None where it is too large, and the steps that it takes."""
    if isinstance(texts, AcceptedText):
        return texts.automaton, 0
    return _recognised(texts.expression) if isinstance(texts, MatchedText) else (None, 0)


@lru_cache(maxsize=64)
def _recognised(node: Node) -> tuple[Dfa | None, int]:
    effort = Effort(MAX_STEPS)
    try:
        found = recognised(Expression(node), Alphabet([node]), effort, whole=True)
    except TooLarge:
        return None, MAX_STEPS
    return found, MAX_STEPS - effort.left


_LENGTHS = ("minLength", "maxLength")


def _longest(one: Literal) -> int:
    """The characters of a format that the decoder counts; 0 where it counts none."""
    known = FORMAT_PATTERNS.get(one.value) if one.keyword == "format" else None
    return 0 if known is None or one.negated else known.longest


def _is_least(one: Literal) -> bool:
    return (one.keyword == "minLength") != one.negated


def _bound(one: Literal) -> int:
    change = (1 if _is_least(one) else -1) if one.negated else 0
    return int(one.value) + change


def _left(
    lows: Iterable[tuple[int, int]], highs: Iterable[tuple[int, int]], literals: Sequence[Literal]
) -> LeftLengths:
    lows, highs = list(lows), list(highs)
    keywords = {literals[i].keyword for _, i in (*lows, *highs)}.difference(_LENGTHS)
    keywords |= {"minLength" for _, i in lows if literals[i].keyword in _LENGTHS}
    keywords |= {"maxLength" for _, i in highs if literals[i].keyword in _LENGTHS}
    return LeftLengths(
        frozenset(keywords),
        max((low for low, _ in lows), default=0),
        min((high for high, _ in highs), default=None),
        tuple(i for _, i in lows),
        tuple(i for _, i in highs),
    )
