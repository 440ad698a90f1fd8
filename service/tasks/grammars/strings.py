"""Strings of JSON that satisfy a conjunction of keywords, and texts of regular expressions, as EBNF.

In this order: an expression that each character decides is written as it stands; else its automaton
is, with all other constraints in it, if that is small; else an expression that a reader can be at a
few places of at once. What is left is dropped, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from service.tasks.grammars import emission
from service.tasks.grammars.automata import (
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
from service.tasks.grammars.charsets import resolve
from service.tasks.grammars.codepoints import Ranges, intersection
from service.tasks.grammars.ebnf import Rules, literal
from service.tasks.grammars.exclusion import anything_but
from service.tasks.grammars.free_strings import COUNTED, canonical, in_any_spelling
from service.tasks.grammars.literals import Emitted, Literal
from service.tasks.grammars.nfa import Alphabet, determinised, sets_of
from service.tasks.grammars.regex_syntax import (
    Chars,
    Expression,
    Node,
    PatternError,
    Repeat,
    parse,
)
from service.tasks.grammars.spellings import Json, Raw
from service.tasks.grammars.string_formats import FORMAT_PATTERNS
from service.tasks.grammars.structure import MANY, loosened, unanchored, ways, weight, within
from service.tasks.regexes import compile_pattern

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
_COUNTS = f"counts to more than {COUNTED} characters, which a grammar does not"
_TOO_LARGE = "is too large for a grammar"
_TOO_LARGE_TOGETHER = "is too large for a grammar together with the pattern"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_QUOTE = literal('"')


@dataclass(slots=True)
class _Wanted:
    """A conjunction, by kinds of literals."""

    low: int = 0
    high: int | None = None
    lows: list[Literal] = field(default_factory=list)
    highs: list[Literal] = field(default_factory=list)
    patterns: list[tuple[Literal, str]] = field(default_factory=list)
    excluded: list[Literal] = field(default_factory=list)
    dropped: list[tuple[Literal, str]] = field(default_factory=list)

    def add(self, one: Literal) -> None:
        """Sort a literal in."""
        if one.keyword in ("minLength", "maxLength"):
            self._bound(one, int(one.value), is_low=(one.keyword == "minLength") != one.negated)
        elif one.keyword == "pattern":
            self.patterns.append((one, one.value))
        elif one.keyword == "format":
            self._format(one)
        elif one.keyword == "enum" and one.negated:
            self.excluded.append(one)
        else:
            self.dropped.append((one, "is not part of a grammar"))

    def _format(self, one: Literal) -> None:
        known = FORMAT_PATTERNS.get(one.value)
        if known is None:
            self.dropped.append((one, "is a format that no grammar can express"))
        elif one.negated and not known.exact:
            self.dropped.append((one, "is a format that a grammar cannot exclude"))
        else:
            self.patterns.append((one, known.pattern))

    def _bound(self, one: Literal, bound: int, *, is_low: bool) -> None:
        if is_low:
            self.low = max(self.low, bound + one.negated)
            self.lows.append(one)
        else:
            self.high = min(bound - one.negated, bound if self.high is None else self.high)
            self.highs.append(one)

    def countable(self) -> tuple[int, int | None]:
        """The bounds that a grammar can count to; the others are dropped."""
        low, high = self.low, self.high
        if low > COUNTED:
            low = 0
            self.drop(self.lows, _COUNTS)
        if high is not None and high > COUNTED:
            high = None
            self.drop(self.highs, _COUNTS)
        return low, high

    def drop(self, literals: Iterable[Literal], why: str) -> None:
        """Literals that the grammar does not enforce."""
        self.dropped += [(one, why) for one in literals]


def emit_string(literals: Iterable[Literal], rules: Rules, *, key: bool = False) -> Emitted:
    """The expression for the JSON strings, quotes included, that satisfy all the literals.

    key: the string is a name in an object, so every character has its one canonical spelling.
    """
    wanted = _Wanted()
    for one in literals:
        wanted.add(one)
    low, high = wanted.low, wanted.high
    if high is not None and high < low:
        return Emitted(None)
    names = frozenset(
        text
        for one in wanted.excluded
        for text in one.value
        if isinstance(text, str) and low <= len(text) and (high is None or len(text) <= high)
        if not _LONE_SURROGATE.search(text)  # in no answer anyway
    )
    rest = _rest(wanted, names, rules, canonical if key else in_any_spelling)
    return Emitted(None if rest is None else f"{_QUOTE} {rest}", tuple(wanted.dropped))


def emit_regex(source: str, rules: Rules) -> Emitted:
    """The expression for the texts that a regular expression matches from end to end.

    Raises ``PatternError``. Where a literal ``pattern`` is dropped, any text is accepted.
    """
    wanted = _Wanted(patterns=[(Literal("pattern", source), source)])
    spelling = Raw(rules)
    found = _Patterned(wanted, frozenset(), rules, spelling, whole=True).written()
    expression = spelling.anything() if wanted.dropped else found
    return Emitted(expression, tuple(wanted.dropped))


def _rest(
    wanted: _Wanted,
    names: frozenset[str],
    rules: Rules,
    free: Callable[[int, int | None, Rules], str],
) -> str | None:
    """What comes after the first quote."""
    _drop_unusable(wanted)
    if wanted.patterns:
        writer = _Patterned(wanted, names, rules, Json(rules), whole=False)
        found = writer.written()
        if writer.is_written:
            return found
    low, high = wanted.countable()
    return anything_but(names, low, high, rules) if names else free(low, high, rules)


def _drop_unusable(wanted: _Wanted) -> None:
    """Drop patterns that cannot be used."""
    usable = []
    for one, source in wanted.patterns:
        try:
            for chars in sets_of(*parse(source).nodes):
                resolve(chars)
        except PatternError as error:
            wanted.drop([one], str(error))
            continue
        usable.append((one, source))
    wanted.patterns = usable


class _Patterned:
    """Strings with at least one pattern."""

    def __init__(
        self,
        wanted: _Wanted,
        names: frozenset[str],
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
        self._every = names
        self._names = frozenset(
            name for name in names if all(source.may_match(name) for source in self._sources)
        )

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
                    wanted.drop([one], _COUNTS if one.value > COUNTED else _TOO_LARGE_TOGETHER)
                return expression
        self.is_written = False
        wanted.drop([one for one, _ in wanted.patterns], _TOO_LARGE)
        return None

    def _bounded(self, low: int, high: int | None) -> tuple[bool, str | None]:
        """Whether it can be written with these bounds, and the expression."""
        direct = None
        if len(self._sources) == 1 and not self._names and not self._sources[0].negated:
            direct = _direct(self._sources[0], self._whole, low, high)
        reading = MANY if direct is None else ways(direct)
        if direct is not None and reading == 1:
            return True, self._written_out(direct)
        automaton = _fitted(self._sources, self._names, self._whole, low, high)
        solved = _solved(self._sources, self._names, self._whole)
        self._rules.effort += solved.effort
        if solved.left_out and self._names != self._every:
            self._names = self._every
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
            return True, None
        return True, emission.automaton(automaton, self._rules, self._spelling)

    def _written_out(self, node: Node) -> str:
        """The expression as it stands, but for numbers that are too great."""
        self._drop_counts()
        if isinstance(self._spelling, Json):
            short = loosened(node, COUNTED, _takes_words)
            self._wanted.drop(
                self._wanted.lows + self._wanted.highs if short != node else [], _COUNTS
            )
            node = short
        return emission.expression(node, self._rules, self._spelling)

    def _drop_counts(self) -> None:
        """Note the patterns that count further than is written."""
        for (one, _), source in zip(self._wanted.patterns, self._sources, strict=True):
            if not source.negated and not source.is_as_read(self._whole):
                self._wanted.drop([one], _COUNTS)


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
def _solved(sources: tuple[Source, ...], names: frozenset[str], whole: bool) -> _Solved:
    expressions = [source.read(whole) for source in sources]
    nodes = [node for expression in expressions for node in expression.nodes]
    alphabet = Alphabet(nodes, sorted({character for name in names for character in name}))
    automaton: Dfa | None = None
    effort = Effort()
    left_out = []
    for at, (expression, source) in enumerate(zip(expressions, sources, strict=True)):
        try:
            with effort.half() as part:
                single = _automaton(expression, alphabet, part, whole)
                single = negation(single, part) if source.negated else single
                automaton = single if automaton is None else product(automaton, single, part)
        except TooLarge:
            left_out.append(at)
    if automaton is None or not names:
        return _Solved(automaton, tuple(left_out), False, MAX_EFFORT - effort.left)
    try:
        texts = [alphabet.spelled(name) for name in sorted(names)]
        others = excluding(alphabet.blocks, texts, effort)
        automaton, names_left_out = product(automaton, others, effort), False
    except TooLarge:
        names_left_out = True
    return _Solved(automaton, tuple(left_out), names_left_out, MAX_EFFORT - effort.left)


def _automaton(expression: Expression, alphabet: Alphabet, effort: Effort, whole: bool) -> Dfa:
    found = determinised(expression.node, alphabet, effort, whole=whole)
    for node, negated in expression.aheads:
        ahead = determinised(node, alphabet, effort)
        found = product(found, negation(ahead, effort) if negated else ahead, effort)
    return found


@lru_cache(maxsize=64)
def _fitted(
    sources: tuple[Source, ...],
    names: frozenset[str],
    whole: bool,
    low: int,
    high: int | None,
) -> Dfa | None:
    """The automaton of the patterns with bounds of the length; None where it is too large."""
    automaton = _solved(sources, names, whole).automaton
    if automaton is None or automaton.is_empty:
        return automaton
    shortest, longest = automaton.lengths()
    if shortest >= low and (high is None or (longest is not None and longest <= high)):
        return _light(automaton)
    if max(low, high or 0) > COUNTED:
        return None
    try:
        return _light(bounded(automaton, low, high, Effort()))
    except TooLarge:
        return None


def _light(automaton: Dfa) -> Dfa | None:
    """The automaton unless it takes too long to compile: its classes have many ranges, such as letters
    of all scripts, a hundred times, or many of its states take whole words."""
    sizes = [len(block) for block in automaton.blocks]
    letters = [_letters(block) for block in automaton.blocks]
    ranges = wide = 0
    for row in automaton.edges:
        ranges += sum(size for size, target in zip(sizes, row, strict=True) if target != DEAD)
        wide += (
            sum(n for n, target in zip(letters, row, strict=True) if target != DEAD) > _FEW_LETTERS
        )
    return automaton if ranges <= MAX_RANGES and wide <= MAX_WIDE else None
