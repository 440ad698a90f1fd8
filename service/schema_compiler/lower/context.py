"""State that the lowering of one schema shares: alternatives, references, sets of strings and numbers,
and the keywords that are not enforced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Generic, TypeVar

from service.schema_compiler.budget import Budget, BudgetExceeded, bounded
from service.schema_compiler.exact import is_whole
from service.schema_compiler.frontend.drafts import frozen
from service.schema_compiler.ir.values import NumberSet, Reference, TextSet
from service.schema_compiler.lower.compile_time import TOO_SLOW, compile_ms
from service.schema_compiler.lower.left_lengths import (
    MAX_ALL_STEPS,
    NOTHING_LEFT,
    LeftLengths,
    automaton_of,
    can_be_left,
    long_lengths,
    plain_lengths,
)
from service.schema_compiler.lower.lowered import Lowered
from service.schema_compiler.lower.number_constraints import NumberConstraints, Unwritable
from service.schema_compiler.lower.numbers import lower_number
from service.schema_compiler.lower.string_patterns import NOT_COUNTED
from service.schema_compiler.lower.strings import lower_string
from service.schema_compiler.normalize.alternatives import TOO_MANY, Expansion, is_list
from service.schema_compiler.normalize.bounds import BEYOND, Bounds, TooCostly
from service.schema_compiler.normalize.constraints import Alternatives, Conjunction, Literal
from service.schema_compiler.normalize.expand import Expander
from service.schema_compiler.normalize.nodes import (
    ANY,
    BOOLEAN,
    NULL,
    NUMBER,
    TYPES,
    Atom,
    Nodes,
    State,
)
from service.schema_compiler.report import Rewrite

FILTER_SECONDS = 1.0
"""For trying the values of all ``enum`` of a schema on what stands beside them."""
_PATTERNS = ("pattern", "format")
_MEASURED = ("minLength", "maxLength", "pattern", "format")
_EXACT_INTEGER = 10**15
MAX_ORDER_RULES = 4_096
"""Of all objects whose members may come in any order: one for each set of members that are told apart."""
MAX_ORDER_RULES_EACH = 1_024
"""The same of one object."""
FREE_ORDER_RULES = 8
"""Of one object, however many objects there are: about what the declared order takes."""

Key = tuple[tuple[str, str, bool], ...]
"""Literals without their pointers."""
T = TypeVar("T")


class Context:
    """The work on one schema."""

    def __init__(
        self,
        nodes: Nodes,
        bounds: Bounds,
        order_rules: int | None = None,
        counted: frozenset[str] | None = None,
    ) -> None:
        """order_rules: that may be written so that members come in any order; None where it is not
        asked for. counted: pointers of the lengths that the grammar counts, while a decoder counts the
        others; None: the grammar counts all."""
        self.nodes = nodes
        self._counted = counted
        self.order_rules = order_rules
        self.bounds = bounds
        self.effort = 0
        """Steps that automata of strings have taken; the same whether they were cached or not."""
        self.states: list[State] = []
        """The states of the values of the document, by reference."""
        self.constants: dict[Reference, Any] = {}
        """The values of the document that are parts of listed ones; their states are any."""
        self._references: dict[State, Reference] = {}
        self.dropped: dict[str, str] = {}
        self.remarks: dict[str, str] = {}
        """What is to be said of keywords that are enforced, by pointer."""
        self.given_up: dict[int, tuple[Any, str]] = {}
        """Subschemas that are dropped with all below them, by ``id()``, and why."""
        self.expander = Expander(nodes, bounds, self.drop)
        self._expansions: dict[State, Expansion] = {}
        self._left: dict[tuple[Key, bool], LeftLengths] = {}
        self._left_steps = 0
        self._strings: dict[tuple[Key, bool, frozenset[str]], _Cached[TextSet]] = {}
        self._pattern_ms: dict[Key, float] = {}
        self._all_patterns_ms = 0.0
        self.has_overlaps = False
        """Whether strings of a pattern leave out those of another."""
        self._joined: set[State] = set()
        self._members = 0
        self._filter = Budget(seconds=FILTER_SECONDS)

    def drop(self, pointer: str, why: str) -> None:
        """Note that the grammar does not enforce a keyword; the first reason stays."""
        self.dropped.setdefault(pointer, why)

    def remark(self, pointer: str, what: str) -> None:
        """Note what is to be said of a keyword, whether it is enforced or not."""
        self.remarks.setdefault(pointer, what)

    def note(self, pointer: str, what: str) -> None:
        """Note a rewrite."""
        self.expander.rewrites[Rewrite(pointer, what)] = None

    def expand(self, state: State) -> Expansion:
        """The alternatives of a state."""
        found = self._expansions.get(state)
        if found is None:
            found = self._expansions[state] = self.expander.expand(state)
        return found

    def reference(self, state: State) -> Reference:
        """The value of a state in the document; equal for states that differ in references alone."""
        found = self._references.get(state)
        if found is None:
            canonical = self.nodes.canonical(state)
            found = self._references.setdefault(canonical, len(self.states))
            if found == len(self.states):
                self.states.append(canonical)
            self._references[state] = found
        return found

    def constant(self, value: Any) -> Reference:
        """The value of a part of a listed value."""
        reference = len(self.states)
        self.states.append(ANY)
        self.constants[reference] = value
        return reference

    def part(self, atoms: Iterable[Atom]) -> Reference:
        """The value of a part of a value."""
        return self.reference(self._part(list(atoms)))

    def _part(self, several: list[Atom]) -> State:
        state = self.nodes.reduced(several)
        if not self.nodes.canonical(state):
            return state
        if self._members > self.bounds.members:
            self.give_up(state, BEYOND)
            return ANY
        elif len(state) > 1 and state not in self._joined:
            if len(self._joined) >= self.bounds.joined:
                self.give_up(state, TOO_MANY)
                return ANY
            self._joined.add(state)
        return state

    def affords(self, members: int) -> bool:
        """Whether an object may have so many members; from the first that may not on, parts of values
        are any. Raises ``TooCostly`` where other bounds come after these."""
        self._members += members
        if self._members > self.bounds.members and not self.bounds.last:
            raise TooCostly
        return self._members <= self.bounds.members

    def affords_order(self, rules: int, *, free: int = FREE_ORDER_RULES) -> bool:
        """Whether an object may have so many rules for members in any order: those of all objects are
        bounded, but for objects that need no more than the free ones."""
        if rules <= free:
            return True
        if rules > min(MAX_ORDER_RULES_EACH, self.order_rules or 0):
            return False
        self.order_rules = (self.order_rules or 0) - rules
        return True

    def give_up(self, state: Iterable[Atom], why: str) -> None:
        """Note that the grammar enforces nothing of subschemas here."""
        for atom in state:
            node = self.nodes.of(atom)
            self.given_up.setdefault(id(node.schema), (node.schema, why))
            for keyword in node.keywords:
                self.drop(node.at(keyword), why)

    # Scalars

    def string(self, literals: list[Literal], *, name: bool = False) -> Lowered[TextSet]:
        """Strings that satisfy all literals; equal literals at different places give the same object.
        name: names of properties. Raises ``TooCostly``."""
        return self._without(literals, self.left_lengths(literals, name=name).keywords, name=name)

    def _without(
        self, literals: list[Literal], uncounted: frozenset[str], *, name: bool
    ) -> Lowered[TextSet]:
        """The strings without the lengths of some keywords."""
        key = _key(literals), name, uncounted
        found = self._strings.get(key)
        if found is None:
            overlaps = () if name else self._overlaps(literals)
            kept = [one for one in literals if one not in overlaps]
            found = self._strings[key] = _cached(
                literals, _dropping(self._string(kept, uncounted), overlaps, TOO_SLOW)
            )
        return _restored(literals, found)

    def _overlaps(self, literals: list[Literal]) -> Sequence[Literal]:
        """The patterns that the strings of another one violate, where they are not left out. An
        automaton of all of them is many times as large as those of the patterns by themselves."""
        patterns = [one for one in literals if one.keyword in _PATTERNS]
        if all(one.negated == patterns[0].negated for one in patterns):
            return ()
        self.has_overlaps = True
        return () if self.bounds.overlaps else [one for one in patterns if one.negated]

    def left_lengths(self, literals: list[Literal], *, name: bool = False) -> LeftLengths:
        """The bounds of a string that the decoder keeps. Raises ``TooCostly``."""
        if self._counted is None or all(one.keyword not in _MEASURED for one in literals):
            return NOTHING_LEFT
        key = _key(literals), name
        left = self._left.get(key)
        if left is None:
            left = self._left[key] = self._left_lengths(literals, name=name)
        pointers = [literals[i].pointer for i in (*left.minimum_by, *left.maximum_by)]
        if not self._counted.intersection(pointers):
            return left
        if name or any(one.keyword in _PATTERNS for one in literals):
            return NOTHING_LEFT
        return self._not_counted(literals, left)

    def _not_counted(self, literals: list[Literal], left: LeftLengths) -> LeftLengths:
        """The same without the bounds that the grammar counts."""
        counted = self._counted or frozenset()
        keywords = set(left.keywords)
        by = {"minLength": left.minimum_by, "maxLength": left.maximum_by}
        for keyword, indices in by.items():
            if counted.intersection(literals[i].pointer for i in indices):
                keywords.discard(keyword)
                by[keyword] = ()
        return replace(
            left,
            keywords=frozenset(keywords),
            minimum_by=by["minLength"],
            maximum_by=by["maxLength"],
        )

    def _left_lengths(self, literals: list[Literal], *, name: bool) -> LeftLengths:
        has_pattern = any(one.keyword in _PATTERNS for one in literals)
        if not has_pattern and not name:
            return plain_lengths(literals)
        left = long_lengths(literals)
        if not left.keywords or (name and left.minimum_by):
            return NOTHING_LEFT
        if not has_pattern:
            return left
        if "format" not in left.keywords:
            counted = self._without(literals, frozenset(), name=name)
            if not any(why in NOT_COUNTED for _, why in counted.dropped):
                return NOTHING_LEFT
        lowered = self._without(literals, left.keywords, name=name)
        own = {id(literals[i]) for i in (*left.minimum_by, *left.maximum_by)}
        if any(id(one) in own for one, _ in lowered.dropped):
            return NOTHING_LEFT
        if self._left_steps > MAX_ALL_STEPS:
            return NOTHING_LEFT
        automaton, steps = automaton_of(lowered.found)
        self._left_steps += steps
        found = can_be_left(left, automaton)
        return NOTHING_LEFT if name and found.automaton is not None else found

    def _string(self, literals: list[Literal], uncounted: frozenset[str]) -> Lowered[TextSet]:
        """Without patterns where automata have taken too much."""
        patterns: list[Literal] = []
        if self.effort > self.bounds.effort:
            if not self.bounds.last:
                raise TooCostly
            patterns = [one for one in literals if one.keyword in _PATTERNS]
        others = [one for one in literals if one not in patterns]
        lowered, effort = lower_string(others, uncounted)
        self.effort += effort
        why = BEYOND
        if not self._affords_patterns(literals, compile_ms(lowered.found)):
            patterns = [one for one in literals if one.keyword in _PATTERNS]
            others = [one for one in literals if one not in patterns]
            lowered, why = lower_string(others, uncounted)[0], TOO_SLOW
        return _dropping(lowered, patterns, why)

    def _affords_patterns(self, literals: list[Literal], ms: float) -> bool:
        """Whether the grammar compiles soon enough with the patterns of one more string."""
        key = _key(literals)
        total = self._all_patterns_ms - self._pattern_ms.get(key, 0.0) + ms
        if ms and total > self.bounds.patterns_ms:
            return False
        self._pattern_ms[key], self._all_patterns_ms = ms, total
        return True

    def number(self, literals: list[Literal]) -> Lowered[NumberSet]:
        """Numbers that satisfy all literals."""
        key = _key(literals)
        found = _numbers.get(key)
        if found is None:
            if len(_numbers) >= _KEPT_NUMBERS:
                _numbers.clear()
            found = _numbers[key] = _cached(literals, lower_number(literals))
        return _restored(literals, found)

    # Values

    def values(self, state: State, *, integers: int = 0) -> list[Any] | None:
        """All values of a state, if they are listed; None if not. integers: of a range, up to which they
        count as listed."""
        expansion = self.expand(state)
        listed: list[Any] = []
        for t in TYPES:
            some, rest = self.listed(state, t, expansion[t])
            more = _of_ranges(rest, integers) if t == NUMBER else None
            if rest and more is None:
                return None
            listed += some
            listed += [value for value in more or () if value not in some]
        return listed

    def listed(
        self, state: State, t: int, alternatives: Alternatives
    ) -> tuple[list[Any], Alternatives]:
        """The values of one type that are listed, and the alternatives that list none."""
        if not alternatives:
            return [], []
        if t == NULL:
            found: tuple[list[Any], Alternatives, bool] = [None], [], alternatives == [()]
        else:
            found = _candidates(t, alternatives)
        candidates, rest, simple = found
        if simple:
            return candidates, rest
        return [value for value in candidates if self._holds(state, value)], rest

    def _holds(self, state: State, value: Any) -> bool:
        """Whether a value is one of the state, by the validator."""
        try:
            with bounded(self._filter):
                self._filter.check()
                return all(
                    self.nodes.valid(self.nodes.of(atom), value) is not bool(atom & 1)
                    for atom in state
                )
        except (BudgetExceeded, RecursionError):
            self.give_up(state, "trying the listed values takes too long")
            return True


@dataclass(frozen=True, slots=True)
class _Cached(Generic[T]):
    """A result, with the indices of the dropped literals."""

    found: T | None
    dropped: tuple[tuple[int, str], ...]


_numbers: dict[Key, _Cached[NumberSet]] = {}
"""Sets of numbers of all schemas: most schemas have the same few."""
_KEPT_NUMBERS = 1024
_SYNTHETIC = -1
"""Index of a dropped literal that the lowering has added, such as the prefix of a name as a pattern."""


def _key(literals: list[Literal]) -> Key:
    return tuple((one.keyword, repr(one.value), one.negated) for one in literals)


def _cached(literals: list[Literal], lowered: Lowered[T]) -> _Cached[T]:
    indices = {id(one): i for i, one in enumerate(literals)}
    dropped = tuple((indices.get(id(one), _SYNTHETIC), why) for one, why in lowered.dropped)
    return _Cached(lowered.found, dropped)


def _dropping(lowered: Lowered[T], literals: Iterable[Literal], why: str) -> Lowered[T]:
    return replace(lowered, dropped=(*lowered.dropped, *((one, why) for one in literals)))


def _restored(literals: list[Literal], cached: _Cached[T]) -> Lowered[T]:
    dropped = (
        (Literal("pattern", "") if i == _SYNTHETIC else literals[i], why)
        for i, why in cached.dropped
    )
    return Lowered(cached.found, tuple(dropped))


def _candidates(t: int, alternatives: Alternatives) -> tuple[list[Any], Alternatives, bool]:
    """Values that are listed, alternatives without a list, and whether all of the values fit."""
    found: dict[tuple[type, Any], Any] = {}
    rest: Alternatives = []
    simple = True
    for one in alternatives:
        values = _list_of(one)
        if values is not None:
            simple = simple and (len(one) <= 1 or _only_integers(one, values))
        elif t == BOOLEAN:
            # What excludes one of the two lists nothing.
            values = [True, False]
            simple = simple and not one
        else:
            rest.append(one)
            continue
        for value in values:
            found.setdefault((type(value), frozen(value)), value)
            if isinstance(value, Decimal) and is_whole(value) and _is_exact(value):
                found.setdefault((int, value), int(value))
    return list(found.values()), rest, simple


def _is_exact(value: Decimal) -> bool:
    """Whether the integer has few enough digits to be written without a point."""
    return -_EXACT_INTEGER < value < _EXACT_INTEGER


def _list_of(one: Conjunction) -> list[Any] | None:
    lists = [c.value for c in one if isinstance(c, Literal) and is_list(c)]
    return min(lists, key=len) if lists else None


def _of_ranges(alternatives: Alternatives, most: int) -> list[int] | None:
    """The integers of alternatives that are ranges of at most so many integers; None if others are.

    Only where ``type`` says that they are integers: those have one text each, while a multiple of 1 may be
    written as ``1.0``.
    """
    found: dict[int, None] = {}
    for one in alternatives:
        try:
            known = NumberConstraints.of([c for c in one if isinstance(c, Literal)])
        except Unwritable:
            return None
        if not known.typed or known.low is None or known.high is None:
            return None
        first, last = math.ceil(known.low.value), math.floor(known.high.value)
        first += known.low.open and first == known.low.value
        last -= known.high.open and last == known.high.value
        if last - first >= most:
            return None
        found.update(dict.fromkeys(n for n in range(first, last + 1) if known.satisfied(n)))
    return list(found)


def _only_integers(one: Conjunction, values: list[Any]) -> bool:
    """Whether the conjunction is a list of integers, and that they are integers."""
    if len(one) != 2 or not all(isinstance(c, Literal) and not c.negated for c in one):
        return False
    keywords = sorted(c.keyword for c in one if isinstance(c, Literal))
    return keywords == ["enum", "type"] and all(isinstance(value, int) for value in values)
