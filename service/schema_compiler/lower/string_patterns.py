"""Strings with patterns, and texts of regular expressions.

In this order: a deterministic expression is kept as it stands; else it becomes an automaton, together
with all other constraints, if that is small; else an expression is kept in which a reader can be at few
places at once. What is left is dropped, with the reason.

Repeats of whole words are counted up to ``MAX_COUNTED`` characters: each count is a state that takes
whole words, for which a compiler follows most tokens of a vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from service.schema_compiler.ir.values import AcceptedText, MatchedText
from service.schema_compiler.lower.compile_time import MAX_MS, automaton_ms, expression_ms
from service.schema_compiler.lower.string_constraints import (
    MAX_COUNTED,
    TOO_LONG,
    StringConstraints,
)
from service.schema_compiler.normalize.constraints import Literal
from service.schema_compiler.regex.character_sets import resolve
from service.schema_compiler.regex.codepoints import Ranges, intersection
from service.schema_compiler.regex.dfa import (
    DEAD,
    MAX_EFFORT,
    Dfa,
    Effort,
    TooLarge,
    bounded,
    excluding,
    negation,
    product,
)
from service.schema_compiler.regex.expressions import (
    MANY,
    Span,
    ambiguity,
    flat,
    loosened,
    span,
    unanchored,
    weight,
    within,
)
from service.schema_compiler.regex.matching import compile_pattern
from service.schema_compiler.regex.nfa import Alphabet, recognised
from service.schema_compiler.regex.syntax import Chars, Expression, Node, Repeat, parse

SMALL = 300
"""States up to which an automaton is better than an expression in which a reader is at several
places."""
FEW = 40
"""Places at once with which a matcher is still fast."""
MAX_RANGES = 20_000
"""Of all classes of characters of a string: about a second of a compiler."""
_LETTERS: Ranges = ((ord("a"), ord("z")),)
_FEW_LETTERS = 13
_TOO_LARGE = "is too large for a grammar"
_TOO_LARGE_TOGETHER = "is too large for a grammar together with the pattern"
NOT_COUNTED = (TOO_LONG, _TOO_LARGE_TOGETHER)
"""Why a length beside a pattern is dropped."""


@dataclass(frozen=True, slots=True)
class Excluded:
    """Texts that a string is not, and others with which it does not begin."""

    texts: frozenset[str] = frozenset()
    prefixes: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.texts or self.prefixes)

    def behind(self, prefix: str) -> Excluded:
        """What is excluded of the rest of strings that begin with a text."""
        size = len(prefix)
        return Excluded(
            frozenset(one[size:] for one in self.texts if one.startswith(prefix)),
            frozenset(one[size:] for one in self.prefixes if one.startswith(prefix)),
        )


class PatternStrings:
    """Strings with at least one pattern.

    whole: the texts of a regular expression that matches from end to end, without quotes; else JSON
    strings in which the patterns are found. effort: steps that automata have taken.
    """

    def __init__(self, constraints: StringConstraints, excluded: Excluded, *, whole: bool) -> None:
        self._constraints = constraints
        self._whole = whole
        self.is_lowered = True
        self.effort = 0
        shortens = not whole
        self._sources = tuple(
            Source(source, one.negated, shortens) for one, source in constraints.patterns
        )
        # Most names are none that the patterns let through. That is not known of patterns that are not
        # written as they are.
        self._every = excluded
        self._excluded = self._met(excluded)

    def _met(self, excluded: Excluded) -> Excluded:
        """What is excluded of the texts that the patterns let through."""
        if not excluded:
            return excluded
        texts = (one for one in excluded.texts if all(s.may_match(one) for s in self._sources))
        prefixes = excluded.prefixes
        if prefixes:
            solved = _solved(self._sources, Excluded(), self._whole)
            self.effort += solved.effort
            if solved.automaton is not None:
                prefixes = frozenset(filter(solved.automaton.reaches, prefixes))
        return Excluded(frozenset(texts), prefixes)

    def texts(self) -> AcceptedText | MatchedText | None:
        """The strings; None either because there is none, or because they are too complex
        (``is_lowered`` is false)."""
        constraints = self._constraints
        low = 0 if "minLength" in constraints.uncounted else constraints.low
        high = None if "maxLength" in constraints.uncounted else constraints.high
        sizes: list[tuple[int, int | None, list[Literal]]] = [(low, high, [])]
        if high is not None:
            sizes.append((low, None, constraints.highs))
        if low:
            sizes.append((0, None, constraints.highs + constraints.lows))
        for low, high, given_up in sizes:
            is_lowered, found = self._bounded(low, high)
            if is_lowered:
                for one in given_up:
                    constraints.drop(
                        [one], TOO_LONG if one.value > MAX_COUNTED else _TOO_LARGE_TOGETHER
                    )
                return found
        self.is_lowered = False
        constraints.drop([one for one, _ in constraints.patterns], _TOO_LARGE)
        return None

    def _bounded(
        self, low: int, high: int | None
    ) -> tuple[bool, AcceptedText | MatchedText | None]:
        """Whether the strings can be lowered with these bounds, and the strings."""
        direct = None
        if len(self._sources) == 1 and not self._excluded and not self._sources[0].negated:
            direct = _direct(self._sources[0], self._whole, low, high)
        reading = MANY if direct is None else ambiguity(direct)
        if direct is not None and reading == 1:
            return True, self._as_expression(direct)
        automaton = _fitted(self._sources, self._excluded, self._whole, low, high)
        solved = _solved(self._sources, self._excluded, self._whole)
        self.effort += solved.effort
        if solved.left_out and self._excluded != self._every:
            self._excluded = self._every
            return self._bounded(low, high)
        few = direct is not None and reading <= FEW
        if automaton is None or (few and len(automaton.edges) > SMALL):
            if direct is None or not few:
                return False, None
            return True, self._as_expression(direct)
        constraints = self._constraints
        constraints.drop(
            [constraints.patterns[at][0] for at in solved.left_out], _TOO_LARGE_TOGETHER
        )
        self._drop_counts()
        if solved.names_left_out:
            constraints.drop(constraints.excluded, _TOO_LARGE_TOGETHER)
        if automaton.is_empty:
            # What is excluded together with longer words may leave nothing where the pattern does not.
            sure = all(one.is_as_read(self._whole) for one in self._sources if one.negated)
            return sure, None
        return True, AcceptedText(automaton)

    def _as_expression(self, node: Node) -> MatchedText:
        """The expression as it stands, without counts that are too large."""
        self._drop_counts()
        if not self._whole:
            short = loosened(node, MAX_COUNTED, _takes_words)
            if short != node:
                self._constraints.drop(self._constraints.lows + self._constraints.highs, TOO_LONG)
            node = short
        return MatchedText(node)

    def _drop_counts(self) -> None:
        """Note the patterns that count further than is written."""
        is_left = "pattern" in self._constraints.uncounted
        for (one, _), source in zip(self._constraints.patterns, self._sources, strict=True):
            if source.negated or source.is_as_read(self._whole):
                continue
            if not (is_left and one.keyword == "pattern" and implied_lengths(source.pattern)):
                self._constraints.drop([one], TOO_LONG)


@lru_cache(maxsize=512)
def implied_lengths(pattern: str) -> Span | None:
    """The lengths of the texts of a pattern that matches just the texts of these lengths that its reading
    with ``MAX_COUNTED`` as the greatest count matches; None where more or less than lengths differs, or
    nothing."""
    expression = parse(pattern)
    node = None if expression.aheads else unanchored(expression.node, whole=False)
    if node is None:
        return None
    items = flat(node)
    free = [
        at for at, item in enumerate(items) if loosened(item, MAX_COUNTED, _takes_words) != item
    ]
    if len(free) != 1:
        return None
    at = free[0]
    item = items[at]
    is_counted = isinstance(item, Repeat) and span(item.item) == (1, 1)
    others = [span(one) for one in (*items[:at], *items[at + 1 :])]
    if not is_counted or any(low != high for low, high in others):
        return None
    return span(node)


def _takes_words(node: Repeat) -> bool:
    return isinstance(node.item, Chars) and _letters(resolve(node.item)) > _FEW_LETTERS


def _letters(characters: Ranges) -> int:
    return sum(last - first + 1 for first, last in intersection(characters, _LETTERS))


class Source(NamedTuple):
    """A pattern. shortened: what takes whole words is counted up to ``MAX_COUNTED`` only. It matches more
    then, and what violates it is less, by texts that are longer than anybody wants."""

    pattern: str
    negated: bool
    shortened: bool

    def read(self, whole: bool) -> Expression:
        """Parsed; it matches at least what the pattern does. Raises ``PatternError``."""
        return _read(self, whole)

    def is_as_read(self, whole: bool) -> bool:
        """Whether it matches just what the pattern does."""
        return self.read(whole) == parse(self.pattern, whole=whole)

    def may_match(self, name: str) -> bool:
        """Whether a name satisfies the pattern, or the shorter one."""
        if not self.negated and not self.is_as_read(whole=False):
            return True
        found = compile_pattern(self.pattern, max_length=len(self.pattern)).found
        return found(name) != self.negated


@lru_cache(maxsize=512)
def _read(source: Source, whole: bool) -> Expression:
    found = parse(source.pattern, whole=whole)
    if not source.shortened:
        return found

    def counts(node: Repeat) -> bool:
        return _takes_words(node) and not (source.negated and node.low > MAX_COUNTED)

    return replace(found, node=loosened(found.node, MAX_COUNTED, counts))


@lru_cache(maxsize=512)
def _direct(source: Source, whole: bool, low: int, high: int | None) -> Node | None:
    expression = source.read(whole)
    node = None if expression.aheads else unanchored(expression.node, whole=whole)
    node = None if node is None else within(node, low, high)
    if node is None or weight(node) > MAX_RANGES or expression_ms(node) > MAX_MS:
        return None
    return node


@dataclass(frozen=True, slots=True)
class _Solved:
    """The automaton of patterns, without some of them that are too large together."""

    automaton: Dfa | None
    left_out: tuple[int, ...]
    names_left_out: bool
    effort: int


@lru_cache(maxsize=64)
def _solved(sources: tuple[Source, ...], excluded: Excluded, whole: bool) -> _Solved:
    expressions = [source.read(whole) for source in sources]
    nodes = [node for expression in expressions for node in expression.nodes]
    texts, prefixes = sorted(excluded.texts), sorted(excluded.prefixes)
    alphabet = Alphabet(nodes, sorted(set("".join((*texts, *prefixes)))))
    automaton: Dfa | None = None
    effort = Effort()
    left_out = []
    for at, (expression, source) in enumerate(zip(expressions, sources, strict=True)):
        try:
            with effort.half() as part:
                single = recognised(expression, alphabet, part, whole=whole)
                single = negation(single, part) if source.negated else single
                automaton = single if automaton is None else product(automaton, single, part)
        except TooLarge:
            left_out.append(at)
    names_left_out = False
    if automaton is not None and excluded:
        spelled = alphabet.spelled
        try:
            others = excluding(
                alphabet.blocks, [*map(spelled, texts)], effort, [*map(spelled, prefixes)]
            )
            automaton = product(automaton, others, effort)
        except TooLarge:
            names_left_out = True
    return _Solved(automaton, tuple(left_out), names_left_out, MAX_EFFORT - effort.left)


@lru_cache(maxsize=64)
def _fitted(
    sources: tuple[Source, ...],
    excluded: Excluded,
    whole: bool,
    low: int,
    high: int | None,
) -> Dfa | None:
    """The automaton of the patterns with bounds of the length; None where it is too large."""
    automaton = _solved(sources, excluded, whole).automaton
    if automaton is None or automaton.is_empty:
        return automaton
    shortest, longest = automaton.lengths()
    if shortest >= low and (high is None or (longest is not None and longest <= high)):
        return _light(automaton)
    if max(low, high or 0) > MAX_COUNTED and _wide_states(automaton):
        return None
    try:
        return _light(bounded(automaton, low, high, Effort()))
    except TooLarge:
        return None


def _light(automaton: Dfa) -> Dfa | None:
    """The automaton unless it takes too long to compile: its classes have many ranges, such as letters
    of all scripts, a hundred times, or its states take many tokens of a model."""
    sizes = [len(block) for block in automaton.blocks]
    ranges = 0
    for row in automaton.edges:
        ranges += sum(size for size, target in zip(sizes, row, strict=True) if target != DEAD)
    return automaton if ranges <= MAX_RANGES and automaton_ms(automaton) <= MAX_MS else None


def _wide_states(automaton: Dfa) -> int:
    letters = [_letters(block) for block in automaton.blocks]
    going_on = (
        sum(n for n, target in zip(letters, row, strict=True) if target != DEAD)
        for row in automaton.edges
    )
    return sum(count > _FEW_LETTERS for count in going_on)
