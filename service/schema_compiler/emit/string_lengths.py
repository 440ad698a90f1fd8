"""The lengths of strings, by their position in the answer.

A grammar counts short strings only: each count is a state. This emitter writes the bounds as data, so
that a decoder can count beside the grammar. It reads the same document as the grammar.

Bounds are never tighter than the schema: where several alternatives can apply at a position, the bounds
are those of the loosest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.schema_compiler.ir.values import (
    Alternative,
    Array,
    Constant,
    CountedArray,
    DistinctArray,
    Document,
    Object,
    Reference,
    String,
)

Path = Sequence[str | int]
"""Names of properties and indices of items, from the root of an answer."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Least and greatest number of characters of a string; maximum None: any number."""

    minimum: int
    maximum: int | None

    @property
    def bounds_nothing(self) -> bool:
        """Whether every string is within the bounds."""
        return self.minimum == 0 and self.maximum is None

    def loosest(self, other: Bounds) -> Bounds:
        """The bounds within which both are."""
        unbounded = self.maximum is None or other.maximum is None
        maximum = None if unbounded else max(self.maximum or 0, other.maximum or 0)
        return Bounds(min(self.minimum, other.minimum), maximum)


@dataclass(frozen=True, slots=True)
class Position:
    """A value of an answer, and where its parts lead: to the positions with these numbers.

    strings: bounds of a string here; None: no string can be here. properties: by declared name.
    additional: of other names. items: by index. rest: of further items. constants: whole values that
    can be here, as JSON. item_constants: whole items that an array here can have, as JSON.
    """

    strings: Bounds | None = None
    properties: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    additional: tuple[int, ...] = ()
    items: tuple[tuple[int, ...], ...] = ()
    rest: tuple[int, ...] = ()
    constants: tuple[str, ...] = ()
    item_constants: tuple[str, ...] = ()

    def after(self, step: str | int) -> tuple[int, ...]:
        """The positions of a part."""
        if isinstance(step, str):
            return self.properties.get(step, self.additional)
        return self.items[step] if step < len(self.items) else self.rest


@dataclass(frozen=True, slots=True)
class StringLengths:
    """Bounds on the strings of an answer. positions: by number; several can describe one value."""

    root: int
    positions: Mapping[int, Position]

    def at(self, path: Path) -> Bounds | None:
        """The bounds of a string at a path; None where no string can be."""
        here = {self.root}
        constants: list[Any] = []
        for step in path:
            positions = [self.positions[number] for number in here]
            constants += (json.loads(text) for one in positions for text in one.constants)
            constants = [part for value in constants for part in _part(value, step)]
            if isinstance(step, int):
                constants += (json.loads(t) for one in positions for t in one.item_constants)
            here = {number for one in positions for number in one.after(step)}
        found = [self.positions[number].strings for number in here]
        found += (_of_constant(value) for value in constants)
        bounds = [one for one in found if one is not None]
        if not bounds:
            return None
        loosest = bounds[0]
        for one in bounds[1:]:
            loosest = loosest.loosest(one)
        return loosest

    @property
    def bounds_nothing(self) -> bool:
        """Whether no string has bounds."""
        strings = (one.strings for one in self.positions.values())
        return all(one is None or one.bounds_nothing for one in strings)


def string_lengths(document: Document) -> StringLengths:
    """The bounds of all strings of a document."""
    positions = {number: _position(found) for number, found in document.values.items()}
    return StringLengths(document.root, positions)


def _position(alternatives: Iterable[Alternative]) -> Position:
    strings: list[Bounds] = []
    properties: dict[str, dict[Reference, None]] = {}
    additional: dict[Reference, None] = {}
    items: list[dict[Reference, None]] = []
    rest: dict[Reference, None] = {}
    constants: list[str] = []
    several = list(alternatives)
    distinct = [text for one in several if isinstance(one, DistinctArray) for text in one.texts]
    objects = [one for one in several if isinstance(one, Object)]
    for one in objects:
        for kind in one.additional:
            additional.update(dict.fromkeys(value.value for value in kind.values))
    for name in {prop.name: None for one in objects for prop in one.properties}:
        found = properties[name] = {}
        for one in objects:
            declared = [prop for prop in one.properties if prop.name == name]
            for part in declared or one.additional:
                found.update(dict.fromkeys(value.value for value in part.values))
    for other in several:
        if isinstance(other, String):
            strings.append(Bounds(other.minimum, other.maximum))
        elif isinstance(other, Constant):
            bounds = _of_constant(json.loads(other.text))
            if bounds is not None:
                strings.append(bounds)
            constants.append(other.text)
    arrays = [_items(one) for one in several]
    for index in range(max((len(first) for first, _ in arrays), default=0)):
        items.append({})
        for first, others in arrays:
            items[-1].update(dict.fromkeys(first[index] if index < len(first) else others))
    for _, others in arrays:
        rest.update(dict.fromkeys(others))
    loosest = strings[0] if strings else None
    for bounds in strings[1:]:
        loosest = bounds if loosest is None else loosest.loosest(bounds)
    return Position(
        loosest,
        {name: tuple(found) for name, found in properties.items()},
        tuple(additional),
        tuple(map(tuple, items)),
        tuple(rest),
        tuple(constants),
        tuple(distinct),
    )


def _items(one: Alternative) -> tuple[list[list[Reference]], list[Reference]]:
    """The values of the first items, and of the others."""
    if isinstance(one, Array):
        return [[reference] for reference in one.prefix], [] if one.rest is None else [one.rest]
    if isinstance(one, CountedArray):
        *first, others = ([value.value for value in values] for values in one.items)
        return first, others
    return [], []


def _part(value: Any, step: str | int) -> list[Any]:
    if isinstance(step, str):
        return [value[step]] if isinstance(value, dict) and step in value else []
    return [value[step]] if isinstance(value, list) and step < len(value) else []


def _of_constant(value: Any) -> Bounds | None:
    return Bounds(len(value), len(value)) if isinstance(value, str) else None
