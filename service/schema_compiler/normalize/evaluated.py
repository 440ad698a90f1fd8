"""Which members of an object no constraint of a conjunction speaks of."""

from __future__ import annotations

from service.schema_compiler.normalize.constraints import (
    Alternatives,
    Conjunction,
    Properties,
    SomeProperty,
)
from service.schema_compiler.normalize.nodes import Atom


def unclear(alternatives: Alternatives) -> bool:
    """Whether a constraint may evaluate members without saying which."""
    return any(isinstance(constraint, SomeProperty) for one in alternatives for constraint in one)


def rest(one: Conjunction, atom: Atom, closed: bool, pointer: str) -> Conjunction:
    """The constraint on the members that no constraint of the conjunction speaks of."""
    named: dict[str, Atom | None] = {}
    patterns: dict[str, Atom | None] = {}
    for members in one:
        if isinstance(members, Properties) and members.evaluates:
            if members.additional is not None:
                return ()
            named.update(dict.fromkeys(members.declared))
            patterns.update(dict.fromkeys(members.patterns))
    return (Properties(pointer, named, patterns, atom, closed, "unevaluatedProperties"),)
