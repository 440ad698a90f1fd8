"""Arrays: first items by place, then the rest, with bounds on their number.

Where items of a kind are counted, the rules are written once for each place and count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from service.tasks.grammars.context import Context
from service.tasks.grammars.ebnf import Rules, literal
from service.tasks.grammars.literals import Literal
from service.tasks.grammars.nodes import Atom, State, negated
from service.tasks.grammars.shapes import Conjunction, Contains, Items, Unique

MAX_RULES = 400
"""Rules for counting the items of one array; beyond, bounds are checked."""
MAX_DISTINCT = 5
"""Values of items that must differ, of which each set of those that are used has a rule."""

Value = Callable[[State], str | None]
Length = Callable[[State], int | None]


@dataclass
class ArrayShape:
    """One alternative for arrays.

    prefix: states of the first items. rest: of the others. low, high: number of items; high None is
    any. counted: for each ``Contains`` its bounds and start. ways: for each place of the prefix, and
    last for the rest, states with the numbers of those ``Contains`` that they count for.
    distinct: texts of the items if they must differ, None where they need not.
    """

    prefix: list[State]
    rest: State
    low: int = 0
    high: int | None = None
    counted: list[Contains] = field(default_factory=list)
    ways: list[list[tuple[State, tuple[int, ...]]]] = field(default_factory=list)
    distinct: list[str] | None = None

    def children(self) -> Iterable[State]:
        """The states of items."""
        if self.distinct is not None:
            return
        if self.counted:
            for ways in self.ways:
                yield from (state for state, _ in ways)
        else:
            yield from self.prefix
            if self.high is None or self.high > len(self.prefix):
                yield self.rest

    def shortest(self, length: Length) -> int | None:
        """Characters of a shortest text, about and not below; None where there is none."""
        if self.distinct is not None:
            if self.low > len(self.distinct):
                return None
            return 2 + self.low * (2 + max(map(len, self.distinct), default=0))
        if self.counted:
            if self.write(Rules(), lambda s: None if length(s) is None else "x") is None:
                return None
            known = [n for ways in self.ways for n in (length(s) for s, _ in ways) if n is not None]
            least = sum(one.low for one in self.counted) + self.low + len(self.prefix)
            return 2 + least * (2 + max(known, default=0))
        total = 2
        for place in range(min(self.low, len(self.prefix))):
            own = length(self.prefix[place])
            if own is None:
                return None
            total += own + 2
        if self.low > len(self.prefix):
            own = length(self.rest)
            if own is None:
                return None
            total += (own + 2) * (self.low - len(self.prefix))
        return total

    def write(self, rules: Rules, value: Value) -> str | None:
        """The expression, or None where no array fits."""
        if self.distinct is not None:
            return _distinct(self.distinct, self.low, self.high, rules)
        if self.counted:
            return _Counter(self, rules, value).run()
        return self._plain(rules, value)

    def _plain(self, rules: Rules, value: Value) -> str | None:
        items = [value(state) for state in self.prefix]
        if self.high is not None:
            items = items[: self.high]
        if None in items:
            items = items[: items.index(None)]
            rest, high = None, len(items)
        else:
            rest, high = value(self.rest), -1 if self.high is None else self.high
            if rest is None:
                high = len(items) if high < 0 else min(high, len(items))
            elif high == len(items):
                rest = None
        if 0 <= high < self.low:
            return None
        tail = self._tail(rest, len(items), high)
        for place in range(len(items) - 1, -1, -1):
            comma = '", " ' if place else ""
            tail = f"{comma}{items[place]}" + ("" if tail == '""' else f" {tail}")
            if place >= self.low:
                tail = f'("" | {tail})'
        return f'"[" {tail} "]"' if tail != '""' else '"[]"'

    def _tail(self, rest: str | None, before: int, high: int) -> str:
        """The items after the prefix, with the comma before them if there is a prefix."""
        if rest is None:
            return '""'
        least = max(self.low - before, 0)
        most = None if high < 0 else high - before
        if before:
            return _repeated(f'", " {rest}', least, most)
        more = _repeated(f'", " {rest}', max(least - 1, 0), None if most is None else most - 1)
        body = rest if more == '""' else f"{rest} {more}"
        return body if least else f'("" | {body})'


def _repeated(expression: str, least: int, most: int | None) -> str:
    if most == 0:
        return '""'
    if most is None:
        return f"({expression})*" if least == 0 else f"({expression}){{{least},}}"
    return f"({expression}){{{least},{most}}}"


def _distinct(texts: list[str], low: int, high: int | None, rules: Rules) -> str | None:
    """Arrays of different items out of a few, in any order."""
    most = len(texts) if high is None else min(high, len(texts))
    if low > most:
        return None
    after: dict[int, str] = {}
    sets = sorted(range(1 << len(texts)), key=lambda used: -used.bit_count())
    for used in sets:
        size = used.bit_count()
        if size > most:
            continue
        comma = ", " if size else ""
        parts = ['""'] if size >= low else []
        if size < most:
            for i, text in enumerate(texts):
                if not used >> i & 1:
                    follows = after[used | 1 << i]
                    parts.append(literal(comma + text) + ("" if follows == '""' else f" {follows}"))
        after[used] = parts[0] if len(parts) == 1 else rules.define("others", " | ".join(parts))
    return f'"[" {after[0]} "]"'


class _Counter:
    """Writes the rules from the last place to the first."""

    def __init__(self, shape: ArrayShape, rules: Rules, value: Value) -> None:
        self.shape = shape
        self.rules = rules
        self.caps = [_cap(one) for one in shape.counted]
        self.places = shape_places(shape)
        self.ways = [
            [
                (text, hits)
                for text, hits in ((value(s), hits) for s, hits in ways)
                if text is not None
            ]
            for ways in shape.ways
        ]

    def run(self) -> str | None:
        counts = list(product(*(range(cap, -1, -1) for cap in self.caps)))
        after: dict[tuple[int, ...], str | None] = {}
        for place in range(self.places, -1, -1):
            found: dict[tuple[int, ...], str | None] = {}
            for count in counts:
                found[count] = self._after(place, count, found if place == self.places else after)
            after = found
        whole = after[(0,) * len(self.caps)]
        return None if whole is None else f'"[" {whole} "]"'

    def _after(
        self, place: int, count: tuple[int, ...], known: dict[tuple[int, ...], str | None]
    ) -> str | None:
        """What may follow ``place`` items. The last place stands for all beyond."""
        own = ""
        parts = ['""'] if self._ends(place, count) else []
        ends = bool(parts)
        comma = '", " ' if place else ""
        for text, hits in self._ways_at(place):
            then = self._add(count, hits)
            if then is None:
                continue
            if place == self.places and then == count:
                own = own or self.rules.reserve("others")
                parts.append(f"{comma}{text} {own}")
                continue
            follows = known.get(then)
            if follows is not None:
                parts.append(f"{comma}{text}" + ("" if follows == '""' else f" {follows}"))
                ends = True
        if not ends:
            return None
        body = " | ".join(dict.fromkeys(parts))
        if not own:
            return body if body == '""' else self.rules.define("others", body)
        self.rules.fill(own, body)
        return own

    def _ways_at(self, place: int) -> list[tuple[str, tuple[int, ...]]]:
        if self.shape.high is not None and place >= self.shape.high:
            return []
        return self.ways[min(place, len(self.ways) - 1)]

    def _ends(self, place: int, count: tuple[int, ...]) -> bool:
        enough = all(n >= one.low for n, one in zip(count, self.shape.counted, strict=True))
        return enough and place >= self.shape.low

    def _add(self, count: tuple[int, ...], hits: tuple[int, ...]) -> tuple[int, ...] | None:
        after = list(count)
        for i in hits:
            after[i] += 1
            high = self.shape.counted[i].high
            if high is not None and after[i] > high:
                return None
            after[i] = min(after[i], self.caps[i])
        return tuple(after)


def _cap(one: Contains) -> int:
    return one.low if one.high is None else one.high


def shape_places(shape: ArrayShape) -> int:
    """The place from which on all places are alike."""
    if shape.high is not None:
        return shape.high
    return max(len(shape.ways) - 1, shape.low, 1)


class _Reader:
    """Makes the shape of one conjunction."""

    def __init__(self, context: Context, conjunction: Conjunction, place: str) -> None:
        self.context = context
        self.place = place
        self.items = [c for c in conjunction if isinstance(c, Items)]
        self.contains = [c for c in conjunction if isinstance(c, Contains)]
        self.unique = [c for c in conjunction if isinstance(c, Unique)]
        self.low, self.high = 0, None
        for c in conjunction:
            if isinstance(c, Literal):
                self._bound(c)

    low: int
    high: int | None

    def _bound(self, constraint: Literal) -> None:
        value: Any = constraint.value
        if constraint.keyword == "minItems":
            self.low = max(self.low, int(value))
        elif constraint.keyword == "maxItems":
            self.high = int(value) if self.high is None else min(self.high, int(value))
        elif constraint.keyword == "enum":
            self.context.drop(constraint.pointer, "a value of this type is excluded as a whole")

    def shape(self) -> ArrayShape | None:
        if self.high is not None and self.high < self.low:
            return None
        places = max((len(c.prefix) for c in self.items), default=0)
        if self.high is not None:
            places = min(places, self.high)
        base = [self._atoms(place) for place in range(places + 1)]
        origin = f"{self.place}/items/additionalProperties"
        states = [self.context.part(atoms, origin) for atoms in base[:places]]
        beyond = self.high is None or self.high > places
        rest = self.context.part(base[places], origin) if beyond else frozenset[Atom]()
        shape = ArrayShape(states, rest, self.low, self.high)
        self._distinct(shape)
        if shape.distinct is None and self.contains:
            self._counted(shape, base)
        return shape

    def _atoms(self, place: int) -> list[Atom]:
        several = (c.prefix[place] if place < len(c.prefix) else c.rest for c in self.items)
        return [atom for atom in several if atom is not None]

    def _distinct(self, shape: ArrayShape) -> None:
        if not self.unique:
            return
        if any(one.negated for one in self.unique):
            self.context.drop(self.unique[0].pointer, "it is negated")
            self.unique = [one for one in self.unique if not one.negated]
        if not self.unique or (self.high is not None and self.high <= 1):
            return
        values = self.context.values(shape.rest) if not shape.prefix and not self.contains else None
        if values is not None and len(values) <= MAX_DISTINCT:
            texts = [json.dumps(value, ensure_ascii=False) for value in values]
            if all(_plain(value) for value in values):
                shape.distinct = texts
                self.context.note(self.unique[0].pointer, "items out of a few, each at most once")
                return
        for one in self.unique:
            why = "a grammar cannot compare items; let them be out of at most five values"
            self.context.drop(one.pointer, why)

    def _counted(self, shape: ArrayShape, base: list[list[Atom]]) -> None:
        """Decide which items count for which ``contains``."""
        kept: list[Contains] = []
        places = max(shape.high if shape.high is not None else max(len(base), shape.low), 1)
        places = max(places, *(one.start for one in self.contains))
        size = places
        for one in self.contains:
            if one.high is not None and one.high < one.low:
                shape.low, shape.high = 1, 0
                return
            size *= _cap(one) + 1
            if size > MAX_RULES or len(kept) == 2:
                size //= _cap(one) + 1
                for pointer in one.pointers:
                    self.context.drop(pointer, f"counting costs more than {MAX_RULES} rules")
            else:
                kept.append(one)
        if not kept:
            return
        shape.counted = kept
        last = max(len(base) - 1, *(one.start for one in kept))
        for place in range(last + 1):
            atoms = base[min(place, len(base) - 1)]
            shape.ways.append(self._ways(atoms, place, kept))

    def _ways(
        self, atoms: list[Atom], place: int, kept: list[Contains]
    ) -> list[tuple[State, tuple[int, ...]]]:
        ways: list[tuple[list[Atom], tuple[int, ...]]] = [(atoms, ())]
        for i, one in enumerate(kept):
            if place >= one.start:
                hit = [([*own, one.atom], (*hits, i)) for own, hits in ways]
                miss = [
                    ([*own, negated(one.atom)] if one.high is not None else own, hits)
                    for own, hits in ways
                ]
                ways = hit + miss
        origin = f"{self.place}/items/additionalProperties"
        return [(self.context.part(own, origin), hits) for own, hits in ways]


def _plain(value: Any) -> bool:
    """Whether no other text stands for an equal value, among those of a list of values."""
    return not isinstance(value, float)


def read_array(context: Context, conjunction: Conjunction, place: str) -> ArrayShape | None:
    """The shape of a conjunction for arrays, or None where no array fits.

    place: pointer of a subschema that the arrays belong to.
    """
    return _Reader(context, conjunction, place).shape()
