"""Conjunctions of constraints on arrays: which values items can have, and how many there are."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

from service.schema_compiler.exact import text_of
from service.schema_compiler.ir.values import (
    Array,
    CountedArray,
    DistinctArray,
    ItemCount,
    ItemValue,
)
from service.schema_compiler.lower.constants import ITEMS_AS_LISTED, states_of
from service.schema_compiler.lower.context import Context
from service.schema_compiler.normalize.bounds import BEYOND
from service.schema_compiler.normalize.constraints import (
    Conjunction,
    Contains,
    Items,
    Literal,
    Unique,
)
from service.schema_compiler.normalize.nodes import ANY, Atom, negated

LONGEST = 10**12
"""Items that no text has; compilers refuse greater numbers."""
MAX_RULES = 1_000
"""Rules for counting the items of one array; beyond, bounds are checked."""
MAX_CONTAINS = 4
"""``contains`` of one array that are counted."""
MAX_DISTINCT = 5
"""Values of items that must differ, of which each set of those that are used has a rule."""
INCOMPARABLE = (
    f"a grammar cannot compare items, unless all of them are from an enum of at most {MAX_DISTINCT}"
    f" values or a range of at most {MAX_DISTINCT} integers"
)
"""Why ``uniqueItems`` is dropped."""


class _Lowering:
    """Lowers one conjunction."""

    def __init__(self, context: Context, conjunction: Conjunction) -> None:
        self.context = context
        self.items = [c for c in conjunction if isinstance(c, Items)]
        self.contains = [c for c in conjunction if isinstance(c, Contains)]
        self.unique = [c for c in conjunction if isinstance(c, Unique)]
        self.low, self.high, self.bounds = 0, None, []
        for c in conjunction:
            if isinstance(c, Literal):
                self._bound(c)

    low: int
    high: int | None
    bounds: list[str]

    def _bound(self, constraint: Literal) -> None:
        value: Any = constraint.value
        self.bounds.append(constraint.pointer)
        if constraint.keyword == "minItems":
            self.low = max(self.low, min(int(value), LONGEST))
        elif constraint.keyword == "maxItems":
            high = min(int(value), LONGEST)
            self.high = high if self.high is None else min(self.high, high)
        elif constraint.keyword == "enum":
            self.context.drop(constraint.pointer, "a value of this type is excluded as a whole")

    def array(self) -> Array | CountedArray | DistinctArray | None:
        if self.high is not None and self.high < self.low:
            return None
        places = max((len(c.prefix) for c in self.items), default=0)
        if self.high is not None:
            places = min(places, self.high)
        if not self.context.affords(places):
            return self._any_array()
        base = [self._atoms(place) for place in range(places + 1)]
        prefix = tuple(self.context.part(atoms) for atoms in base[:places])
        beyond = self.high is None or self.high > places
        rest = self.context.part(base[places]) if beyond else None
        found = Array(prefix, rest, self.low, self.high)
        distinct = self._distinct(found)
        if distinct is None and self.contains:
            return self._counted(found, base)
        return distinct or found

    def _any_array(self) -> Array:
        """Any items at all, as the bounds are met."""
        atoms = [atom for one in self.items for atom in (*one.prefix, one.rest) if atom is not None]
        self.context.give_up([*atoms, *(one.atom for one in self.contains)], BEYOND)
        pointers = [one.pointer for one in self.items] + [one.pointer for one in self.unique]
        pointers += [one.rest_pointer for one in self.items if one.rest_pointer]
        pointers += [pointer for one in self.contains for pointer in one.pointers]
        for pointer in pointers + self.bounds:
            self.context.drop(pointer, BEYOND)
        return Array((), self.context.part([]))

    def _atoms(self, place: int) -> list[Atom]:
        several = (c.prefix[place] if place < len(c.prefix) else c.rest for c in self.items)
        return [atom for atom in several if atom is not None]

    def _distinct(self, one: Array) -> DistinctArray | None:
        """Arrays of different items, where they are out of a few values."""
        for unique in self.unique:
            if unique.negated:
                self.context.drop(unique.pointer, "it is negated")
        self.unique = [unique for unique in self.unique if not unique.negated]
        if not self.unique or (self.high is not None and self.high <= 1):
            return None
        values = None
        if not one.prefix and not self.contains:
            state = ANY if one.rest is None else self.context.states[one.rest]
            values = self.context.values(state, integers=MAX_DISTINCT)
        if values is not None and len(values) <= MAX_DISTINCT and all(map(_plain, values)):
            self.context.note(self.unique[0].pointer, "items out of a few, each at most once")
            if self.context.order_rules is not None and any(map(states_of, values)):
                self.context.remark(self.unique[0].pointer, ITEMS_AS_LISTED)
            return DistinctArray(tuple(map(text_of, values)), self.low, self.high)
        for unique in self.unique:
            self.context.drop(unique.pointer, INCOMPARABLE)
        return None

    def _counted(self, one: Array, base: list[list[Atom]]) -> Array | CountedArray:
        """Arrays whose items are counted for each ``contains``."""
        kept: list[Contains] = []
        places = max(one.maximum if one.maximum is not None else max(len(base), one.minimum), 1)
        places = max(places, *(contains.start for contains in self.contains))
        size = places
        for contains in self.contains:
            if contains.high is not None and contains.high < contains.low:
                return replace(one, rest=None, minimum=1, maximum=0)  # no array
            cap = ItemCount(contains.low, contains.high).cap
            if size * (cap + 1) > MAX_RULES or len(kept) == MAX_CONTAINS:
                for pointer in contains.pointers:
                    self.context.drop(pointer, f"counting costs more than {MAX_RULES} rules")
            else:
                size *= cap + 1
                kept.append(contains)
        if not kept:
            return one
        last = max(len(base) - 1, *(contains.start for contains in kept))
        items = (
            self._values(base[min(place, len(base) - 1)], place, kept) for place in range(last + 1)
        )
        counts = tuple(ItemCount(contains.low, contains.high) for contains in kept)
        return CountedArray(tuple(items), counts, one.minimum, one.maximum)

    def _values(self, atoms: list[Atom], place: int, kept: list[Contains]) -> tuple[ItemValue, ...]:
        choices: list[tuple[list[Atom], tuple[int, ...]]] = [(atoms, ())]
        for i, one in enumerate(kept):
            if place >= one.start:
                hit = [([*own, one.atom], (*counts, i)) for own, counts in choices]
                miss = [
                    ([*own, negated(one.atom)] if one.high is not None else own, counts)
                    for own, counts in choices
                ]
                choices = hit + miss
        return tuple(ItemValue(self.context.part(own), counts) for own, counts in choices)


def _plain(value: Any) -> bool:
    """Whether no other text stands for an equal value, among those of a list of values."""
    return not isinstance(value, Decimal)


def lower_array(
    context: Context, conjunction: Conjunction
) -> Array | CountedArray | DistinctArray | None:
    """The arrays of a conjunction; None where there are none."""
    return _Lowering(context, conjunction).array()
