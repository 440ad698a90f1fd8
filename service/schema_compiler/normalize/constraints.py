"""Constraints on objects and arrays, beside ``Literal`` for strings and numbers.

Each stands for keywords at one place, negation already pushed inwards; parts of the value are named
by atoms of ``nodes``. Equal constraints are one object: they are compared by identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.schema_compiler.normalize.literals import Literal
from service.schema_compiler.normalize.nodes import Atom
from service.schema_compiler.regex.matching import found


@dataclass(frozen=True, eq=False)
class Members:
    """``properties``, ``patternProperties`` and ``additionalProperties`` of one place.

    named, patterns: atoms of values, None where nothing is said. further: of names that are neither;
    None where nothing is said. pointer: of the place.
    """

    pointer: str
    named: Mapping[str, Atom | None]
    patterns: Mapping[str, Atom | None]
    further: Atom | None
    closed: bool
    """Whether further names are forbidden outright."""
    keyword: str = "additionalProperties"
    """What rules further names."""

    def atoms(self, name: str) -> list[Atom]:
        """What the value of a name has to satisfy."""
        atoms = [] if name not in self.named else [self.named[name]]
        atoms += [atom for pattern, atom in self.patterns.items() if found(pattern, name)]
        if not atoms:
            atoms = [self.further]
        return [atom for atom in atoms if atom is not None]

    def forbids(self, name: str) -> bool:
        """Whether a name is one of the further ones, and those are forbidden outright."""
        if not self.closed or name in self.named:
            return False
        return not any(found(pattern, name) for pattern in self.patterns)


@dataclass(frozen=True, eq=False)
class Required:
    """Names that must be there. atom: what the value has to satisfy beside; None is nothing."""

    pointer: str
    names: tuple[str, ...]
    atom: Atom | None = None


@dataclass(frozen=True, eq=False)
class Absent:
    """A name that must not be there."""

    pointer: str
    name: str


@dataclass(frozen=True, eq=False)
class Names:
    """``propertyNames``: what each name has to satisfy."""

    pointer: str
    atom: Atom


@dataclass(frozen=True, eq=False)
class SomeMember:
    """A name must be there that matches ``pattern``, or is none of ``members``, with such a value.

    pattern: None where the names are the further ones of ``members``. name: what the name itself has
    to satisfy; None is nothing.
    """

    pointer: str
    members: Members | None
    pattern: str | None
    atom: Atom | None
    name: Atom | None = None

    def covers(self, name: str) -> bool:
        """Whether a name is one of those that may do; ``name`` is not looked at."""
        if self.pattern is not None:
            return found(self.pattern, name)
        if self.members is None:
            return True
        named = name in self.members.named
        return not named and not any(found(pattern, name) for pattern in self.members.patterns)


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


Constraint = Literal | Members | Required | Absent | Names | SomeMember | Items | Contains | Unique
Conjunction = tuple[Constraint, ...]
Alternatives = list[Conjunction]
"""Any of the conjunctions; none of them is no value, an empty conjunction is every value."""
