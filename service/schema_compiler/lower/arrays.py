"""Conjunctions for arrays as shapes: what items satisfy at each place, and how many there are."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from service.schema_compiler.emit.arrays import ArrayShape, cap
from service.schema_compiler.exact import text_of
from service.schema_compiler.lower.context import Context
from service.schema_compiler.normalize.bounds import BEYOND
from service.schema_compiler.normalize.constraints import Conjunction, Contains, Items, Unique
from service.schema_compiler.normalize.literals import Literal
from service.schema_compiler.normalize.nodes import Atom, State, negated

LONGEST = 10**12
"""Items that no text has; compilers refuse greater numbers."""
MAX_RULES = 400
"""Rules for counting the items of one array; beyond, bounds are checked."""
MAX_DISTINCT = 5
"""Values of items that must differ, of which each set of those that are used has a rule."""


class _Reader:
    """Makes the shape of one conjunction."""

    def __init__(self, context: Context, conjunction: Conjunction, place: str) -> None:
        self.context = context
        self.place = place
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

    def shape(self) -> ArrayShape | None:
        if self.high is not None and self.high < self.low:
            return None
        places = max((len(c.prefix) for c in self.items), default=0)
        if self.high is not None:
            places = min(places, self.high)
        if not self.context.affords(places):
            return self._any_array()
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

    def _any_array(self) -> ArrayShape:
        """Any items at all, as the bounds are met."""
        atoms = [atom for one in self.items for atom in (*one.prefix, one.rest) if atom is not None]
        self.context.give_up([*atoms, *(one.atom for one in self.contains)], BEYOND)
        pointers = [one.pointer for one in self.items] + [one.pointer for one in self.unique]
        pointers += [one.rest_pointer for one in self.items if one.rest_pointer]
        pointers += [pointer for one in self.contains for pointer in one.pointers]
        for pointer in pointers + self.bounds:
            self.context.drop(pointer, BEYOND)
        return ArrayShape([], self.context.part([], f"{self.place}/items/additionalProperties"))

    def _atoms(self, place: int) -> list[Atom]:
        several = (c.prefix[place] if place < len(c.prefix) else c.rest for c in self.items)
        return [atom for atom in several if atom is not None]

    def _distinct(self, shape: ArrayShape) -> None:
        if not self.unique:
            return
        for one in self.unique:
            if one.negated:
                self.context.drop(one.pointer, "it is negated")
        self.unique = [one for one in self.unique if not one.negated]
        if not self.unique or (self.high is not None and self.high <= 1):
            return
        values = self.context.values(shape.rest) if not shape.prefix and not self.contains else None
        if values is not None and len(values) <= MAX_DISTINCT and all(map(_plain, values)):
            shape.distinct = [text_of(value) for value in values]
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
            size *= cap(one) + 1
            if size > MAX_RULES or len(kept) == 2:
                size //= cap(one) + 1
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
    return not isinstance(value, Decimal)


def read_array(context: Context, conjunction: Conjunction, place: str) -> ArrayShape | None:
    """The shape of a conjunction for arrays, or None where no array fits.

    place: pointer of a subschema that the arrays belong to.
    """
    return _Reader(context, conjunction, place).shape()
