"""Whether a conjunction holds no value, as far as it can be seen at a glance.

Never says so of a conjunction that holds one. What is not seen here costs alternatives that turn out
empty later, or the negation of a branch that could have been left out.
"""

from __future__ import annotations

from decimal import Decimal
from functools import reduce
from operator import and_
from typing import Any

from service.schema_compiler.budget import current
from service.schema_compiler.exact import is_whole
from service.schema_compiler.frontend.drafts import frozen
from service.schema_compiler.normalize.constraints import (
    Conjunction,
    Forbidden,
    Items,
    Literal,
    Properties,
    Required,
)
from service.schema_compiler.normalize.nodes import (
    ARRAY,
    EVERYTHING,
    NULL,
    OBJECT,
    STRING,
    Atom,
    Nodes,
    negated,
)
from service.schema_compiler.regex.matching import found

_LOWER = frozenset(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"))
_UPPER = frozenset(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"))


class Glance:
    """A conjunction of constraints on values of type ``t``, read once, to be compared with many others.

    empty: whether no value satisfies it, as far as it can be seen.
    """

    __slots__ = ("_literals", "_members", "_nodes", "_type", "conjunction", "empty")

    def __init__(
        self,
        nodes: Nodes,
        t: int,
        conjunction: Conjunction,
        literals: list[Literal],
        members: Members | None,
    ) -> None:
        self.conjunction = conjunction
        self.empty = False
        self._nodes = nodes
        self._type = t
        self._literals = literals
        self._members = members

    @classmethod
    def of(cls, nodes: Nodes, t: int, conjunction: Conjunction) -> Glance:
        """Read a conjunction."""
        literals = [c for c in conjunction if isinstance(c, Literal)]
        members = Members.of(nodes, conjunction) if t == OBJECT else None
        found = cls(nodes, t, conjunction, literals, members)
        found.empty = found._contradicted(literals, conjunction)
        return found

    def joined(self, other: Glance) -> Glance:
        """Both conjunctions, of which neither excludes the other."""
        conjunction = merged(self.conjunction, other.conjunction)
        literals = [*self._literals, *other._literals]
        if self._members is None or other._members is None:
            return Glance(self._nodes, self._type, conjunction, literals, None)
        members = self._members.joined(other._members)
        return Glance(self._nodes, self._type, conjunction, literals, members)

    def excludes(self, other: Glance) -> bool:
        """Whether no value satisfies both conjunctions."""
        if self.empty or other.empty:
            return True
        literals = [*self._literals, *other._literals]
        if self._members is None or other._members is None:
            return self._contradicted(literals, (*self.conjunction, *other.conjunction))
        if self._literals and other._literals and _never(self._type, literals):
            return True
        return self._members.excludes(other._members)

    def _contradicted(self, literals: list[Literal], conjunction: Conjunction) -> bool:
        if self._type == NULL:
            return False
        if literals and _never(self._type, literals):
            return True
        if self._members is not None:
            return self._members.empty()
        return self._type == ARRAY and _array(self._nodes, conjunction, literals)


def merged(left: Conjunction, right: Conjunction) -> Conjunction:
    """Both conjunctions, without repeats."""
    if not left or not right:
        return left or right
    return left + tuple([constraint for constraint in right if constraint not in left])


def _never(t: int, literals: list[Literal]) -> bool:
    return _no_value_left(t, literals) or _crossed(literals)


def _no_value_left(t: int, literals: list[Literal]) -> bool:
    values: dict[Any, Any] | None = None
    for literal in literals:
        if literal.keyword == "enum" and not literal.negated:
            own = {frozen(value): value for value in literal.value}
            values = own if values is None else {k: own[k] for k in own if k in values}
    if values is None:
        return False
    for literal in literals:
        if not values:
            break
        if literal.keyword == "enum" and literal.negated:
            excluded = {frozen(value) for value in literal.value}
            values = {k: v for k, v in values.items() if k not in excluded}
        elif literal.keyword == "type":
            wrong = literal.negated
            values = {k: v for k, v in values.items() if _integral(v) is not wrong}
        elif literal.keyword == "pattern" and t == STRING:
            wanted = not literal.negated
            current().check()
            values = {k: v for k, v in values.items() if found(literal.value, v) is wanted}
    return not values


def _integral(value: Any) -> bool | None:
    """Whether a number is whole; drafts differ on those with a point or an exponent that are."""
    if isinstance(value, Decimal) and is_whole(value):
        return None
    return isinstance(value, int)


def _crossed(literals: list[Literal]) -> bool:
    """Whether a lower bound is above an upper one, or a literal meets its opposite."""
    low: Any = None
    high: Any = None
    for literal in literals:
        if literal.negated:
            continue
        if literal.keyword in _LOWER and (low is None or literal.value >= low):
            low = literal.value
        elif literal.keyword in _UPPER and (high is None or literal.value <= high):
            high = literal.value
    if low is not None and high is not None and low > high:
        return True
    if low is not None and low == high and _bounds_meet(literals, low):
        return True
    kept = {(c.keyword, c.value) for c in literals if not c.negated and _simple(c)}
    return any((c.keyword, c.value) in kept for c in literals if c.negated and _simple(c))


def _bounds_meet(literals: list[Literal], at: Any) -> bool:
    return any(
        literal.keyword in ("exclusiveMinimum", "exclusiveMaximum") and literal.value == at
        for literal in literals
    )


def _simple(literal: Literal) -> bool:
    return literal.keyword in ("type", "pattern", "format", "multipleOf")


class _Member:
    """What a conjunction says of the property of one name.

    said: constraints that speak of it. closed: whether one of them forbids all names that it does not
    know. forbidden: whether that holds for this name.
    """

    __slots__ = ("atoms", "closed", "empty", "forbidden", "opposites", "said", "summary")

    def __init__(
        self, nodes: Nodes, name: str, atoms: list[Atom], several: list[Properties]
    ) -> None:
        self.said = len(several) + len(atoms)
        self.closed = any(m.closed for m in several)
        self.forbidden = any(m.closed and m.forbids(name) for m in several)
        for member in several:
            atoms = atoms + member.atoms(name)
        self.atoms = frozenset(atoms)
        self.opposites = frozenset(map(negated, self.atoms))
        self.summary = reduce(and_, map(nodes.summary, self.atoms), EVERYTHING)
        self.empty = self.summary.empty or not self.atoms.isdisjoint(self.opposites)

    def excludes(self, other: _Member) -> bool:
        """Whether the property cannot be as both say."""
        return (
            self.forbidden
            or other.forbidden
            or self.empty
            or other.empty
            or not self.atoms.isdisjoint(other.opposites)
            or self.summary.excludes(other.summary)
        )


class Members:
    """What a conjunction says of the properties of an object: which have to be there, with what they have
    to satisfy beside, which must not, and what is declared."""

    __slots__ = ("_absent", "_declaring", "_known", "_nodes", "_required")

    def __init__(
        self,
        nodes: Nodes,
        required: dict[str, list[Atom]],
        absent: frozenset[str],
        declaring: list[Properties],
    ) -> None:
        self._nodes = nodes
        self._required = required
        self._absent = absent
        self._declaring = declaring
        self._known: dict[str, _Member] = {}

    @classmethod
    def of(cls, nodes: Nodes, conjunction: Conjunction) -> Members:
        """Read a conjunction."""
        required: dict[str, list[Atom]] = {}
        for constraint in conjunction:
            if isinstance(constraint, Required):
                for name in constraint.names:
                    atoms = required.setdefault(name, [])
                    if constraint.atom is not None:
                        atoms.append(constraint.atom)
        absent = frozenset([c.name for c in conjunction if isinstance(c, Forbidden)])
        declaring = [c for c in conjunction if isinstance(c, Properties)]
        return cls(nodes, required, absent, declaring)

    def joined(self, other: Members) -> Members:
        """What both say."""
        required = self._required
        if other._required:
            required = required | other._required
            for name in self._required.keys() & other._required.keys():
                required[name] = self._required[name] + other._required[name]
        declaring = self._declaring
        if other._declaring:
            declaring = declaring + [m for m in other._declaring if m not in declaring]
        found = Members(self._nodes, required, self._absent | other._absent, declaring)
        if not other._declaring:
            found._known = {n: m for n, m in self._known.items() if n not in other._required}
        return found

    def empty(self) -> bool:
        """Whether a property is asked for that cannot be."""
        return not self._absent.isdisjoint(self._required) or any(
            (member.forbidden or member.empty) and (member.said > 1 or member.closed)
            for member in map(self._member, self._required)
        )

    def excludes(self, other: Members) -> bool:
        """Whether one asks for a property that cannot be as both say; neither is empty."""
        if not self._absent.isdisjoint(other._required):
            return True
        if not other._absent.isdisjoint(self._required):
            return True
        for name in self._required:
            if name in other._required or other._declaring:
                theirs = other._member(name)
                if theirs.said and self._member(name).excludes(theirs):
                    return True
        if self._declaring:
            for name in other._required:
                if name not in self._required:
                    own = self._member(name)
                    if own.said and own.excludes(other._member(name)):
                        return True
        return False

    def _member(self, name: str) -> _Member:
        known = self._known.get(name)
        if known is None:
            # Those that speak of all names, or declare this one.
            several = [
                m
                for m in self._declaring
                if m.patterns or m.additional is not None or name in m.declared
            ]
            atoms = self._required.get(name, [])
            known = self._known[name] = _Member(self._nodes, name, atoms, several)
        return known


def _array(nodes: Nodes, conjunction: Conjunction, literals: list[Literal]) -> bool:
    least = max((c.value for c in literals if c.keyword == "minItems"), default=0)
    items = [c for c in conjunction if isinstance(c, Items)]
    for place in range(min(int(least), 4)):
        atoms = [c.prefix[place] if place < len(c.prefix) else c.rest for c in items]
        if impossible(nodes, [atom for atom in atoms if atom is not None]):
            return True
    return False


def impossible(nodes: Nodes, atoms: list[Atom]) -> bool:
    """Whether no value satisfies all atoms, at a glance. Branches of one ``oneOf`` ask the same for each
    pair of them."""
    several = frozenset(atoms)
    known = nodes.impossible.get(several)
    if known is None:
        known = nodes.impossible[several] = _impossible(nodes, several)
    return known


def _impossible(nodes: Nodes, several: frozenset[Atom]) -> bool:
    if any(negated(atom) in several for atom in several):
        return True
    return bool(several) and reduce(and_, map(nodes.summary, several)).empty
