r"""From regular expressions to deterministic automata.

An assertion (``^``, ``$``, ``\b``, ``\B``) looks at the characters before and after its place. Of
those it matters only what *kind* they are: none at all, a word character, another. So a state of
the deterministic automaton is, for each kind of next character, what may be consumed then.

A look-ahead has an automaton of its own, which reads the text from its place on. A place that was
reached through look-aheads is there only on condition that their automata accept the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from service.schema_compiler.regex.character_sets import resolve
from service.schema_compiler.regex.codepoints import Ranges, partition
from service.schema_compiler.regex.dfa import (
    DEAD,
    MAX_STATES,
    Dfa,
    Effort,
    TooLarge,
    bits,
    explore,
    negation,
    product,
)
from service.schema_compiler.regex.syntax import (
    START,
    WORD,
    Ahead,
    Assertion,
    Chars,
    Choice,
    Expression,
    Node,
    Repeat,
    Sequence,
    parts,
)

MAX_PLACES = 6_000
"""Of an expression with its repeats written out."""

_EDGE, _WORD, _OTHER = 0, 1, 2
"""Kinds of characters: none, since the text begins or ends there; of a word; another."""
_Key = tuple[frozenset[int], ...]
"""By kind of the next character, the places that can be consumed then."""


class Alphabet:
    """Blocks of characters that nothing of a group of expressions tells apart."""

    def __init__(self, nodes: Iterable[Node], characters: Iterable[str] = ()) -> None:
        """characters: to be told apart from all others as well."""
        found = [part for node in nodes for part in parts(node)]
        sets = {resolve(part): None for part in found if isinstance(part, Chars)}
        self.has_words = any(isinstance(part, Assertion) and part.kind in "bB" for part in found)
        if self.has_words:
            sets[resolve(WORD)] = None
        singles = {character: ((ord(character), ord(character)),) for character in characters}
        wanted: list[Ranges] = [*sets, *singles.values()]
        self.blocks, masks = partition(wanted)
        self._masks = dict(zip(wanted, masks, strict=True))
        self._singles = {
            one: self._masks[single].bit_length() - 1 for one, single in singles.items()
        }
        word = self._masks[resolve(WORD)] if self.has_words else 0
        self.kinds = [_WORD if word >> block & 1 else _OTHER for block in range(len(self.blocks))]

    def mask(self, chars: Chars) -> int:
        """The blocks of a set of characters of the expressions, as bits."""
        return self._masks[resolve(chars)]

    def spelled(self, text: str) -> list[int]:
        """A text of told-apart characters as blocks."""
        return [self._singles[character] for character in text]


def sets_of(*nodes: Node) -> Iterator[Chars]:
    """The sets of characters in expressions."""
    return (part for node in nodes for part in parts(node) if isinstance(part, Chars))


def recognised(
    expression: Expression, alphabet: Alphabet, effort: Effort, *, whole: bool = False
) -> Dfa:
    """The minimal automaton of the texts that an expression with all its parts matches. Raises
    `TooLarge`."""
    found = determinised(expression.node, alphabet, effort, whole=whole)
    for node, negated in expression.aheads:
        ahead = determinised(node, alphabet, effort)
        found = product(found, negation(ahead, effort) if negated else ahead, effort)
    return found


def determinised(
    node: Node,
    alphabet: Alphabet,
    effort: Effort,
    *,
    whole: bool = False,
    max_states: int = MAX_STATES,
) -> Dfa:
    """The minimal automaton of the texts in which the expression is found, or with ``whole`` that
    it matches from end to end. Raises `TooLarge`."""
    looks_ahead = any(isinstance(part, Ahead) for part in parts(node))
    places = (_Conditional if looks_ahead else _Places)(alphabet, effort, whole=whole)
    entry = places.add(node, _FINAL)
    if not whole:
        entry = places.anywhere(entry)
    start = places.following((entry,), _EDGE)
    return explore(alphabet.blocks, start, places.step, places.accepts, effort, max_states)


_FINAL = 0
_FOUND = frozenset((_FINAL,))


class _Places:
    """The expression as places, each of which consumes one character or none, and what is next."""

    def __init__(self, alphabet: Alphabet, effort: Effort, *, whole: bool) -> None:
        self._alphabet = alphabet
        everything = (1 << len(alphabet.blocks)) - 1
        # In a search, anything may come after the expression.
        self._consumed: list[int] = [0 if whole else everything]
        self._next: list[tuple[int, ...]] = [(_FINAL,)]
        self._conditions: dict[int, str] = {}
        self._everything = everything
        self._kinds = (_EDGE, _WORD, _OTHER) if alphabet.has_words else (_EDGE, _OTHER)
        self._closures: dict[tuple[int, int], _Key] = {}
        self._steps: dict[tuple[frozenset[int], int], _Key] = {}
        self._consumers: list[frozenset[int]] = []
        self._spend = effort.spend

    def _place(self, consumed: int, following: tuple[int, ...]) -> int:
        if len(self._next) >= MAX_PLACES:
            raise TooLarge
        self._consumed.append(consumed)
        self._next.append(following)
        return len(self._next) - 1

    def add(self, node: Node, after: int) -> int:
        """The place where the node begins, when another place comes after it."""
        if isinstance(node, Chars):
            consumed = self._alphabet.mask(node)
            return self._place(consumed, (after,) if consumed else ())
        if isinstance(node, Assertion):
            place = self._place(0, (after,))
            self._conditions[place] = node.kind
            return place
        if isinstance(node, Sequence):
            for item in reversed(node.items):
                after = self.add(item, after)
            return after
        if isinstance(node, Choice):
            return self._place(0, tuple(self.add(item, after) for item in node.items))
        if isinstance(node, Ahead):
            return self.add_ahead(node, after)
        return self._repeat(node, after)

    def add_ahead(self, node: Ahead, after: int) -> int:
        """The place of a look-ahead."""
        raise TypeError("an expression with look-aheads takes _Conditional")

    def _repeat(self, node: Repeat, after: int) -> int:
        entry = after
        if node.high is None:
            entry = self._place(0, ())
            self._next[entry] = (self.add(node.item, entry), after)
        else:
            for _ in range(node.high - node.low):
                entry = self._place(0, (self.add(node.item, entry), after))
        for _ in range(node.low):
            entry = self.add(node.item, entry)
        return entry

    def anywhere(self, entry: int) -> int:
        """A place from which any characters come before the entry."""
        loop = self._place(0, ())
        self._next[loop] = (self._place(self._everything, (loop,)), entry)
        return loop

    def following(self, places: Iterable[int], before: int) -> _Key:
        """What can be consumed from some places when a character of a kind came before."""
        keys = [self._closure(place, before) for place in places]
        self._spend(sum(len(key[-1]) for key in keys))
        combined = tuple(frozenset().union(*found) for found in zip(*keys, strict=True))
        if self._consumed[_FINAL] and all(_FINAL in found for found in combined):
            return (_FOUND,) * len(combined)  # whatever comes
        return combined

    def _closure(self, place: int, before: int) -> _Key:
        known = self._closures.get((place, before))
        if known is None:
            known = tuple(self._reached(place, before, after) for after in self._kinds)
            self._closures[place, before] = known
        return known

    def _reached(self, place: int, before: int, after: int) -> frozenset[int]:
        found, seen, pending = [], {place}, [place]
        while pending:
            place = pending.pop()
            if self._consumed[place] or place == _FINAL:
                found.append(place)
                continue
            condition = self._conditions.get(place)
            if condition is None or _holds(condition, before, after):
                for target in self._next[place]:
                    if target not in seen:
                        seen.add(target)
                        pending.append(target)
        self._spend(len(seen))
        return frozenset(found)

    def step(self, key: _Key, block: int) -> _Key | None:
        """The state after a character of a block."""
        if not self._consumers:
            consumers: list[list[int]] = [[] for _ in self._alphabet.blocks]
            for place, consumed in enumerate(self._consumed):
                for one in bits(consumed):
                    consumers[one].append(place)
            self._consumers = list(map(frozenset, consumers))
        kind = self._alphabet.kinds[block]
        matched = key[self._kinds.index(kind)] & self._consumers[block]
        if not matched:
            return None
        known = self._steps.get((matched, kind))
        if known is None:
            known = self.following([self._next[place][0] for place in matched], kind)
            self._steps[matched, kind] = known
        return known

    def accepts(self, key: _Key) -> bool:
        """Whether a text may end in a state."""
        return _FINAL in key[0]


_Conditions = frozenset[tuple[int, int]]
"""Look-aheads that were passed, by number, each with the state of its automaton."""
_Conditioned = frozenset[tuple[int, _Conditions]]
_NONE: _Conditions = frozenset()


class _Conditional(_Places):
    """The same with look-aheads. What is in a key is a place with its conditions."""

    def __init__(self, alphabet: Alphabet, effort: Effort, *, whole: bool) -> None:
        super().__init__(alphabet, effort, whole=whole)
        self._effort = effort
        self._ahead_at: dict[int, int] = {}
        self._aheads: list[Dfa] = []
        self._numbers: dict[Ahead, int] = {}
        self._sinks: list[int] = []

    def add_ahead(self, node: Ahead, after: int) -> int:
        """The place of a look-ahead, whose automaton accepts what may come behind."""
        number = self._numbers.get(node)
        if number is None:
            found = determinised(Sequence((START, node.item)), self._alphabet, self._effort)
            found = negation(found, self._effort) if node.negated else found
            number = self._numbers[node] = len(self._aheads)
            self._aheads.append(found)
            sinks = [
                state
                for state, row in enumerate(found.edges)
                if found.accepting[state] and all(target == state for target in row)
            ]
            self._sinks.append(sinks[0] if sinks else DEAD)
        place = self._place(0, (after,))
        self._ahead_at[place] = number
        return place

    def following(self, places: Iterable[int], before: int) -> Any:
        """What can be consumed from places that nothing is a condition of."""
        return self._combined([(place, _NONE) for place in places], before)

    def _combined(self, places: Iterable[tuple[int, _Conditions]], before: int) -> Any:
        found: list[set[tuple[int, _Conditions]]] = [set() for _ in self._kinds]
        for place, conditions in places:
            for kind, reached in zip(found, self._closures_of(place, before), strict=True):
                kind.update((one, conditions | more) for one, more in reached)
        self._spend(sum(map(len, found)))
        if self._consumed[_FINAL] and all((_FINAL, _NONE) in kind for kind in found):
            return (frozenset(((_FINAL, _NONE),)),) * len(found)  # whatever comes
        return tuple(map(_weakest, found))

    def _closures_of(self, place: int, before: int) -> Any:
        known: Any = self._closures.get((place, before))
        if known is None:
            known = tuple(self._reached_by(place, before, after) for after in self._kinds)
            self._closures[place, before] = known
        return known

    def _reached_by(self, place: int, before: int, after: int) -> _Conditioned:
        found = []
        pending = [(place, _NONE)]
        seen = set(pending)
        while pending:
            place, conditions = pending.pop()
            if self._consumed[place] or place == _FINAL:
                found.append((place, conditions))
                continue
            condition = self._conditions.get(place)
            if condition is not None and not _holds(condition, before, after):
                continue
            number = self._ahead_at.get(place)
            if number is not None:
                if self._aheads[number].is_empty:
                    continue
                if self._sinks[number] != 0:
                    conditions = conditions | {(number, 0)}
            for target in self._next[place]:
                if (target, conditions) not in seen:
                    seen.add((target, conditions))
                    pending.append((target, conditions))
        self._spend(len(seen))
        return _weakest(found)

    def step(self, key: Any, block: int) -> Any:
        """The state after a character of a block."""
        kind = self._alphabet.kinds[block]
        going_on = []
        for place, conditions in key[self._kinds.index(kind)]:
            if self._consumed[place] >> block & 1:
                left = self._left(conditions, block)
                if left is not None:
                    going_on.append((self._next[place][0], left))
        return self._combined(going_on, kind) if going_on else None

    def _left(self, conditions: _Conditions, block: int) -> _Conditions | None:
        """The conditions after a character; None where one cannot be met any more."""
        left = set()
        for number, state in conditions:
            target = self._aheads[number].edges[state][block]
            if target == DEAD:
                return None
            if target != self._sinks[number]:
                left.add((number, target))
        return frozenset(left)

    def accepts(self, key: Any) -> bool:
        """Whether a text may end in a state."""
        return any(
            place == _FINAL and all(self._aheads[n].accepting[state] for n, state in conditions)
            for place, conditions in key[0]
        )


def _weakest(found: Iterable[tuple[int, _Conditions]]) -> _Conditioned:
    """Without places that are there on fewer conditions as well."""
    by_place: dict[int, list[_Conditions]] = {}
    for place, conditions in sorted(set(found), key=lambda one: len(one[1])):
        kept = by_place.setdefault(place, [])
        if not any(fewer <= conditions for fewer in kept):
            kept.append(conditions)
    return frozenset((place, one) for place, kept in by_place.items() for one in kept)


def _holds(condition: str, before: int, after: int) -> bool:
    if condition == "^":
        return before == _EDGE
    if condition == "$":
        return after == _EDGE
    return ((before == _WORD) != (after == _WORD)) == (condition == "b")
