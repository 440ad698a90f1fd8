r"""From regular expressions to deterministic automata.

An assertion (``^``, ``$``, ``\b``, ``\B``) looks at the characters before and after its place. Of
those it matters only what *kind* they are: none at all, a word character, another. So a state of
the deterministic automaton is, for each kind of next character, what may be consumed then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from service.tasks.grammars.automata import MAX_STATES, Dfa, Effort, TooLarge, bits, explore
from service.tasks.grammars.charsets import resolve
from service.tasks.grammars.codepoints import Ranges, partition
from service.tasks.grammars.regex_syntax import (
    WORD,
    Assertion,
    Chars,
    Choice,
    Node,
    Repeat,
    Sequence,
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
        parts = [part for node in nodes for part in _parts(node)]
        sets = {resolve(part): None for part in parts if isinstance(part, Chars)}
        self.has_words = any(isinstance(part, Assertion) and part.kind in "bB" for part in parts)
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
    return (part for node in nodes for part in _parts(node) if isinstance(part, Chars))


def _parts(node: Node) -> Iterator[Chars | Assertion]:
    pending = [node]
    while pending:
        node = pending.pop()
        if isinstance(node, Chars | Assertion):
            yield node
        else:
            pending += (node.item,) if isinstance(node, Repeat) else node.items


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
    places = _Places(alphabet, effort, whole=whole)
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
        return self._repeat(node, after)

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


def _holds(condition: str, before: int, after: int) -> bool:
    if condition == "^":
        return before == _EDGE
    if condition == "$":
        return after == _EDGE
    return ((before == _WORD) != (after == _WORD)) == (condition == "b")
