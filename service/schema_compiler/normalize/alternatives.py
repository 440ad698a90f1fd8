"""Lists of alternatives, and their products of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from service.schema_compiler import budget
from service.schema_compiler.frontend.drafts import frozen
from service.schema_compiler.normalize.bounds import Bounds
from service.schema_compiler.normalize.constraints import (
    Alternatives,
    Conjunction,
    Constraint,
    Literal,
)
from service.schema_compiler.normalize.contradictions import Glance, merged
from service.schema_compiler.normalize.nodes import TYPES, Nodes

MAX_ABSORBED = 48
"""Alternatives that are compared with each other for one that holds another."""
TOO_MANY = "too many combinations"

Expansion = tuple[Alternatives, ...]
"""Alternatives by type, in the order of ``TYPES``."""

EVERY: Alternatives = [()]
NEVER: Alternatives = []
TRUE: Expansion = tuple(EVERY for _ in TYPES)
FALSE: Expansion = tuple(NEVER for _ in TYPES)


class Combiner:
    """Joins expansions, within the bounds on one schema.

    drop: called with the pointer of a keyword that is not fully expanded, and the reason.
    keep: alternatives are not absorbed by others, since what they evaluate matters.
    """

    def __init__(
        self, nodes: Nodes, bounds: Bounds, drop: Callable[[str, str], None], keep: bool
    ) -> None:
        self._nodes = nodes
        self._bounds = bounds
        self._drop = drop
        self._keep = keep
        self._steps = 0
        self._known: dict[tuple[int, Conjunction], Glance] = {}

    def any(self, parts: Sequence[Expansion]) -> Expansion:
        """Any of the parts."""
        if len(parts) == 1:
            return parts[0]
        return tuple(united(t, [part[t] for part in parts], self._keep) for t in TYPES)

    def both(self, left: Expansion, right: Expansion, pointer: str) -> Expansion:
        """Both at once. pointer: of the keyword that asks for it."""
        if left is TRUE:
            return right
        if right is TRUE:
            return left
        return tuple(self.product(t, left[t], right[t], pointer) for t in TYPES)

    def product(
        self, t: int, left: Alternatives, right: Alternatives, pointer: str
    ) -> Alternatives:
        """Both at once, for type ``t``."""
        if not left or not right:
            return NEVER
        if left == EVERY:
            return right
        if right == EVERY:
            return left
        if len(left) == len(right) == 1:
            return [merged(left[0], right[0])]
        size = len(left) * len(right)
        if self._spent(size):
            return self._without(left, right, pointer)
        ours, theirs = self._glances(t, left), self._glances(t, right)
        joined = [self._joined(t, a, b) for a in ours for b in theirs if not a.excludes(b)]
        found = united(t, [joined], self._keep)
        most = self._bounds.alternatives
        if len(found) > most and len(found) > max(len(left), len(right)):
            return self._without(left, right, pointer)
        return found

    def _without(self, left: Alternatives, right: Alternatives, pointer: str) -> Alternatives:
        """The product with only what all alternatives of the smaller side have in common."""
        self._drop(pointer, TOO_MANY)
        more, fewer = (left, right) if len(left) >= len(right) else (right, left)
        if len(more) > self._bounds.alternatives:
            more = [_common(more)]
        shared = _common(fewer)
        return [merged(one, shared) for one in more]

    def _spent(self, steps: int) -> bool:
        """Whether the work for this schema is used up."""
        self._steps += steps
        if self._steps % 64 < steps:
            budget.current().check()
        return self._steps > self._bounds.steps

    def overlaps(self, branches: Sequence[Expansion], pointer: str) -> set[tuple[int, int]]:
        """Pairs of branches that are not provably disjoint."""
        overlaps: set[tuple[int, int]] = set()
        for t in TYPES:
            present = [i for i, branch in enumerate(branches) if branch[t]]
            if _distinct_values([branches[i][t] for i in present]):
                continue
            glances = {i: self._glances(t, branches[i][t]) for i in present}
            for i, j in combinations(present, 2):
                if (i, j) in overlaps:
                    continue
                if self._spent(1):
                    self._drop(pointer, TOO_MANY)
                    return overlaps
                if not all(a.excludes(b) for a in glances[i] for b in glances[j]):
                    overlaps.add((i, j))
        return overlaps

    def _glances(self, t: int, alternatives: Alternatives) -> list[Glance]:
        found = []
        for one in alternatives:
            glance = self._known.get((t, one))
            if glance is None:
                glance = self._known[t, one] = Glance.of(self._nodes, t, one)
            found.append(glance)
        return found

    def _joined(self, t: int, a: Glance, b: Glance) -> Conjunction:
        both = a.joined(b)
        self._known[t, both.conjunction] = both
        return both.conjunction


def _common(alternatives: Alternatives) -> Conjunction:
    first, *others = alternatives
    sets = [set(one) for one in others]
    return tuple(constraint for constraint in first if all(constraint in s for s in sets))


def united(t: int, parts: Sequence[Alternatives], keep: bool = False) -> Alternatives:
    """Any of the parts, without repeats, with values in one list. keep: without absorbing."""
    found = dict.fromkeys(one for part in parts for one in part)
    if len(found) <= 1:
        return list(found)
    if () in found and not keep:
        return EVERY
    values = [one[0] for one in found if len(one) == 1 and is_list(one[0])]
    if len(values) > 1:
        everything: dict[Any, Any] = {}
        for literal in values:
            assert isinstance(literal, Literal)
            for value in literal.value:
                everything.setdefault((type(value), frozen(value)), value)
        joined = Literal("enum", list(everything.values()))
        rest = [one for one in found if not (len(one) == 1 and is_list(one[0]))]
        return [(joined,), *rest]
    alternatives = list(found)
    if keep or len(alternatives) > MAX_ABSORBED:
        return alternatives
    sets = [frozenset(one) for one in alternatives]
    return [
        one
        for one, own in zip(alternatives, sets, strict=True)
        if not any(other < own for other in sets)
    ]


def is_list(constraint: Constraint) -> bool:
    """Whether a constraint lists the values."""
    return (
        isinstance(constraint, Literal) and constraint.keyword == "enum" and not constraint.negated
    )


def _distinct_values(parts: Sequence[Alternatives]) -> bool:
    """Whether all are lists of values, and no value is in two of them."""
    seen: set[Any] = set()
    for part in parts:
        for one in part:
            first = next((c for c in one if is_list(c)), None)
            if first is None:
                return False
            assert isinstance(first, Literal)
            values = {frozen(value) for value in first.value}
            if not seen.isdisjoint(values):
                return False
            seen |= values
    return True
