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


def contradictory(nodes: Nodes, t: int, conjunction: Conjunction) -> bool:
    """Whether no value of type ``t`` satisfies all constraints."""
    if t == NULL:
        return False
    literals = [c for c in conjunction if isinstance(c, Literal)]
    if literals and (_no_value_left(t, literals) or _crossed(literals)):
        return True
    if t == OBJECT:
        return _object(nodes, conjunction)
    return t == ARRAY and _array(nodes, conjunction, literals)


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


def _object(nodes: Nodes, conjunction: Conjunction) -> bool:
    members = [c for c in conjunction if isinstance(c, Properties)]
    required = [c for c in conjunction if isinstance(c, Required)]
    absent = {c.name for c in conjunction if isinstance(c, Forbidden)}
    extra: dict[str, list[Atom]] = {}
    for constraint in required:
        for name in constraint.names:
            atoms = extra.setdefault(name, [])
            if constraint.atom is not None:
                atoms.append(constraint.atom)
    if not absent.isdisjoint(extra):
        return True
    # Those that speak of all names, or of those that they declare alone.
    speaking = [bool(m.patterns) or m.additional is not None for m in members]
    for name, atoms in extra.items():
        several = [
            m for m, all_ in zip(members, speaking, strict=True) if all_ or name in m.declared
        ]
        if len(several) + len(atoms) < 2 and not any(m.closed for m in several):
            continue
        for member in several:
            if member.closed and member.forbids(name):
                return True
        for member in several:
            atoms = atoms + member.atoms(name)
        if impossible(nodes, atoms):
            return True
    return False


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
