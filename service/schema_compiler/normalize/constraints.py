"""Constraints on objects and arrays, beside ``Literal`` for strings and numbers.

Each stands for keywords at one place, negation already pushed inwards; parts of the value are named
by atoms of ``nodes``. Equal constraints are one object: they are compared by identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.schema_compiler.normalize.nodes import Atom
from service.schema_compiler.regex.matching import found

PREFIX = "prefix"
"""No keyword of JSON Schema, for names of members alone. Its value is a text with which a name begins
that is longer; with ``negated``, a list of texts with none of which a name begins."""


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """One keyword that a value has to satisfy, or with ``negated`` to violate.

    Draft differences are gone: ``exclusiveMinimum`` and ``exclusiveMaximum`` are numbers, ``const``
    is an ``enum`` of one value.
    value: as in the schema. pointer: of the keyword, in the schema as sent; empty where no keyword
    of the caller stands behind it, such as names of properties that are declared beside.
    """

    keyword: str
    value: Any
    pointer: str = ""
    negated: bool = False


@dataclass(frozen=True, eq=False)
class Properties:
    """``properties``, ``patternProperties`` and ``additionalProperties`` of one place.

    declared, patterns: atoms of values, None where nothing is said. additional: of names that are neither;
    None where nothing is said. pointer: of the place.
    """

    pointer: str
    declared: Mapping[str, Atom | None]
    patterns: Mapping[str, Atom | None]
    additional: Atom | None
    closed: bool
    """Whether additional names are forbidden outright."""
    keyword: str = "additionalProperties"
    """What rules additional names."""
    evaluates: bool = True
    """Whether ``unevaluatedProperties`` leaves these names alone; not where a keyword is violated."""

    def atoms(self, name: str) -> list[Atom]:
        """What the value of a name has to satisfy."""
        atoms = [self.declared[name]] if name in self.declared else []
        if self.patterns:
            atoms += [atom for pattern, atom in self.patterns.items() if found(pattern, name)]
        return [atom for atom in atoms or [self.additional] if atom is not None]

    def forbids(self, name: str) -> bool:
        """Whether a name is one of the additional ones, and those are forbidden outright."""
        if not self.closed or name in self.declared:
            return False
        return not any(found(pattern, name) for pattern in self.patterns)


@dataclass(frozen=True, eq=False)
class Required:
    """PropertyNames that must be there. atom: what the value has to satisfy beside; None is nothing."""

    pointer: str
    names: tuple[str, ...]
    atom: Atom | None = None


@dataclass(frozen=True, eq=False)
class Forbidden:
    """A name that must not be there."""

    pointer: str
    name: str


@dataclass(frozen=True, eq=False)
class PropertyNames:
    """``propertyNames``: what each name has to satisfy."""

    pointer: str
    atom: Atom


@dataclass(frozen=True, eq=False)
class SomeProperty:
    """A name must be there that matches ``pattern``, or is none of ``members``, with such a value.

    pattern: None where the names are the additional ones of ``members``. name: what the name itself has
    to satisfy; None is nothing.
    """

    pointer: str
    members: Properties | None
    pattern: str | None
    atom: Atom | None
    name: Atom | None = None

    def covers(self, name: str) -> bool:
        """Whether a name is one of those that may do; ``name`` is not looked at."""
        if self.pattern is not None:
            return found(self.pattern, name)
        if self.members is None:
            return True
        declared = name in self.members.declared
        return not declared and not any(found(pattern, name) for pattern in self.members.patterns)


@dataclass(frozen=True, eq=False)
class Items:
    """Items by place: the first ones, then the rest; None where nothing is said.

    pointer: of the keyword. rest_pointer: of the keyword that rules the rest, if another.
    """

    pointer: str
    prefix: tuple[Atom | None, ...]
    rest: Atom | None
    rest_pointer: str = ""


@dataclass(frozen=True, eq=False)
class Contains:
    """So many items from place ``start`` on satisfy an atom. high: None is any number."""

    pointers: tuple[str, ...]
    atom: Atom
    low: int
    high: int | None
    start: int = 0


@dataclass(frozen=True, eq=False)
class Unique:
    """All items differ, or with ``negated`` two are equal."""

    pointer: str
    negated: bool = False


Constraint = (
    Literal
    | Properties
    | Required
    | Forbidden
    | PropertyNames
    | SomeProperty
    | Items
    | Contains
    | Unique
)
Conjunction = tuple[Constraint, ...]
Alternatives = list[Conjunction]
"""Any of the conjunctions; none of them is no value, an empty conjunction is every value."""
