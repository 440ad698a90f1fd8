"""Strings with patterns, and texts of regular expressions, as EBNF.

In this order: an expression that each character decides is written as it stands; else its automaton
is, with all other constraints in it, if that is small; else an expression that a reader can be at a
few places of at once. What is left is dropped, with the reason.

Words are counted up to ``COUNTED`` characters: each number that is left is a state that takes whole
words, for which a compiler follows most tokens of a vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from service.schema_compiler.emit import patterns as emission
from service.schema_compiler.emit.free_strings import COUNTED
from service.schema_compiler.emit.json_escapes import Json
from service.schema_compiler.emit.rules import Rules
from service.schema_compiler.lower.string_constraints import COUNTS, Wanted
from service.schema_compiler.normalize.literals import Literal
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
    loosened,
    unanchored,
    ways,
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
MAX_WIDE = 500
"""States of an automaton that take whole words: 5 to 50 ms each where there are 150,000 tokens."""
_LETTERS: Ranges = ((ord("a"), ord("z")),)
_FEW_LETTERS = 13
_TOO_LARGE = "is too large for a grammar"
_TOO_LARGE_TOGETHER = "is too large for a grammar together with the pattern"


@dataclass(frozen=True, slots=True)
class Excluded:
    """Texts that a string is not, and others with which it does not begin."""

    texts: frozenset[str] = frozenset()
    beginnings: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.texts or self.beginnings)

    def behind(self, beginning: str) -> Excluded:
        """What is excluded of the rest of strings that begin with a text."""
        size = len(beginning)
        return Excluded(
            frozenset(one[size:] for one in self.texts if one.startswith(beginning)),
            frozenset(one[size:] for one in self.beginnings if one.startswith(beginning)),
        )


class Patterned:
    """Strings with at least one pattern."""

    def __init__(
        self,
        wanted: Wanted,
        excluded: Excluded,
        rules: Rules,
        spelling: emission.Spelling,
        *,
        whole: bool,
    ) -> None:
        self._wanted, self._rules, self._spelling = wanted, rules, spelling
        self._whole = whole
        self.is_written = True
        shortens = isinstance(spelling, Json)
        self._sources = tuple(
            Source(source, one.negated, shortens) for one, source in wanted.patterns
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
        beginnings = excluded.beginnings
        if beginnings:
            solved = _solved(self._sources, Excluded(), self._whole)
            self._rules.effort += solved.effort
            if solved.automaton is not None:
                beginnings = frozenset(filter(solved.automaton.reaches, beginnings))
        return Excluded(frozenset(texts), beginnings)

    def written(self) -> str | None:
        """The expression; None where there is none, either because there is no such string, or
        because it is too large (``is_written`` is false)."""
        wanted = self._wanted
        sizes: list[tuple[int, int | None, list[Literal]]] = [(wanted.low, wanted.high, [])]
        if wanted.highs:
            sizes.append((wanted.low, None, wanted.highs))
        if wanted.lows:
            sizes.append((0, None, wanted.highs + wanted.lows))
        for low, high, given_up in sizes:
            writable, expression = self._bounded(low, high)
            if writable:
                for one in given_up:
                    wanted.drop([one], COUNTS if one.value > COUNTED else _TOO_LARGE_TOGETHER)
                return expression
        self.is_written = False
        wanted.drop([one for one, _ in wanted.patterns], _TOO_LARGE)
        return None

    def _bounded(self, low: int, high: int | None) -> tuple[bool, str | None]:
        """Whether it can be written with these bounds, and the expression."""
        direct = None
        if len(self._sources) == 1 and not self._excluded and not self._sources[0].negated:
            direct = _direct(self._sources[0], self._whole, low, high)
        reading = MANY if direct is None else ways(direct)
        if direct is not None and reading == 1:
            return True, self._written_out(direct)
        automaton = _fitted(self._sources, self._excluded, self._whole, low, high)
        solved = _solved(self._sources, self._excluded, self._whole)
        self._rules.effort += solved.effort
        if solved.left_out and self._excluded != self._every:
            self._excluded = self._every
            return self._bounded(low, high)
        few = direct is not None and reading <= FEW
        if automaton is None or (few and len(automaton.edges) > SMALL):
            if direct is None or not few:
                return False, None
            return True, self._written_out(direct)
        wanted = self._wanted
        wanted.drop([wanted.patterns[at][0] for at in solved.left_out], _TOO_LARGE_TOGETHER)
        self._drop_counts()
        if solved.names_left_out:
            wanted.drop(wanted.excluded, _TOO_LARGE_TOGETHER)
        if automaton.is_empty:
            # What is excluded together with longer words may leave nothing where the pattern does not.
            sure = all(one.is_as_read(self._whole) for one in self._sources if one.negated)
            return sure, None
        return True, emission.automaton(automaton, self._rules, self._spelling)

    def _written_out(self, node: Node) -> str:
        """The expression as it stands, but for numbers that are too great."""
        self._drop_counts()
        if isinstance(self._spelling, Json):
            short = loosened(node, COUNTED, _takes_words)
            if short != node:
                self._wanted.drop(self._wanted.lows + self._wanted.highs, COUNTS)
            node = short
        return emission.expression(node, self._rules, self._spelling)

    def _drop_counts(self) -> None:
        """Note the patterns that count further than is written."""
        for (one, _), source in zip(self._wanted.patterns, self._sources, strict=True):
            if not source.negated and not source.is_as_read(self._whole):
                self._wanted.drop([one], COUNTS)


def _takes_words(node: Repeat) -> bool:
    return isinstance(node.item, Chars) and _letters(resolve(node.item)) > _FEW_LETTERS


def _letters(characters: Ranges) -> int:
    return sum(last - first + 1 for first, last in intersection(characters, _LETTERS))


class Source(NamedTuple):
    """A pattern. shortened: what takes whole words is counted up to ``COUNTED`` only. It matches more
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
        return _takes_words(node) and not (source.negated and node.low > COUNTED)

    return replace(found, node=loosened(found.node, COUNTED, counts))


@lru_cache(maxsize=512)
def _direct(source: Source, whole: bool, low: int, high: int | None) -> Node | None:
    expression = source.read(whole)
    node = None if expression.aheads else unanchored(expression.node, whole=whole)
    node = None if node is None else within(node, low, high)
    return None if node is None or weight(node) > MAX_RANGES else node


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
    texts, beginnings = sorted(excluded.texts), sorted(excluded.beginnings)
    alphabet = Alphabet(nodes, sorted(set("".join((*texts, *beginnings)))))
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
                alphabet.blocks, [*map(spelled, texts)], effort, [*map(spelled, beginnings)]
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
    if max(low, high or 0) > COUNTED and _wide_states(automaton):
        return None
    try:
        return _light(bounded(automaton, low, high, Effort()))
    except TooLarge:
        return None


def _light(automaton: Dfa) -> Dfa | None:
    """The automaton unless it takes too long to compile: its classes have many ranges, such as letters
    of all scripts, a hundred times, or many of its states take whole words."""
    sizes = [len(block) for block in automaton.blocks]
    ranges = 0
    for row in automaton.edges:
        ranges += sum(size for size, target in zip(sizes, row, strict=True) if target != DEAD)
    return automaton if ranges <= MAX_RANGES and _wide_states(automaton) <= MAX_WIDE else None


def _wide_states(automaton: Dfa) -> int:
    letters = [_letters(block) for block in automaton.blocks]
    going_on = (
        sum(n for n, target in zip(letters, row, strict=True) if target != DEAD)
        for row in automaton.edges
    )
    return sum(count > _FEW_LETTERS for count in going_on)
