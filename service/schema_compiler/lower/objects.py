"""Conjunctions for objects as shapes: which names there are, and what their values satisfy."""

from __future__ import annotations

import re
from collections.abc import Iterable

from service.schema_compiler.emit.objects import ObjectShape, Way
from service.schema_compiler.emit.unordered_objects import MAX_SHUFFLED
from service.schema_compiler.lower.additional_names import FurtherNames, NameForms
from service.schema_compiler.lower.context import REPEAT, Context
from service.schema_compiler.normalize.bounds import BEYOND
from service.schema_compiler.normalize.constraints import (
    Absent,
    Conjunction,
    Members,
    Names,
    Required,
    SomeMember,
)
from service.schema_compiler.normalize.literals import Literal
from service.schema_compiler.normalize.nodes import ANY, Atom
from service.schema_compiler.regex.matching import found

MAX_MARKS = 2
"""Members of a special kind that one object must have, each for its own reason."""
MAX_RULES = 400
"""Rules for counting the members of one object; beyond, bounds are checked."""
_FINITE = re.compile(r"\^\(?(?:\?:)?([\w -]+(?:\|[\w -]+)*)\)?\$", re.ASCII)
PATTERN_REPEAT = "names that match may repeat; list the names under properties"


class _Reader:
    """Makes the shape of one conjunction."""

    def __init__(self, context: Context, conjunction: Conjunction, place: str) -> None:
        self.context = context
        self.nodes = context.nodes
        self.place = place
        self.members = [c for c in conjunction if isinstance(c, Members)]
        self.required = [c for c in conjunction if isinstance(c, Required)]
        self.absent = [c for c in conjunction if isinstance(c, Absent)]
        self.names = [c for c in conjunction if isinstance(c, Names)]
        self.some = [c for c in conjunction if isinstance(c, SomeMember)]
        self.literals = [c for c in conjunction if isinstance(c, Literal)]
        for dropped in self.some[MAX_MARKS:]:
            context.drop(dropped.pointer, "too many members of a special kind are asked for")
        self.some = self.some[:MAX_MARKS]
        self.low, self.low_at = 0, ""
        self.high: int | None = None
        self.high_at = ""

    def shape(self) -> ObjectShape | None:
        self._bounds()
        names = self._declared()
        if not self.context.affords(len(names)):
            return self._any_object()
        needed = {name for constraint in self.required for name in constraint.names}
        members: list[tuple[str, bool, list[Way]]] = []
        for name in names:
            ways = self._ways(name)
            if ways:
                members.append((name, name in needed, ways))
            elif name in needed:
                return None
        further = self._further(names, {name for name, _, _ in members})
        marks = (1 << len(self.some)) - 1
        shape = self._bounded(
            ObjectShape(members, further, self.low, self.high, marks), len(needed)
        )
        if shape is not None:
            shape.any_order = self._any_order(shape)
        return shape

    def _any_object(self) -> ObjectShape:
        """Any members at all, as the bounds are met."""
        for pointer in self._pointers():
            self.context.drop(pointer, BEYOND)
        self.context.give_up(self._parts(), BEYOND)
        self._open_at()
        name = self.context.string([], key=True).expression
        assert name is not None
        return ObjectShape([], [(NameForms(name, {}), [(ANY, 0)])])

    def _pointers(self) -> Iterable[str]:
        for members in self.members:
            if members.named:
                yield f"{members.pointer}/properties"
            if members.patterns:
                yield f"{members.pointer}/patternProperties"
            if members.further is not None:
                yield f"{members.pointer}/{members.keyword}"
        yield from (one.pointer for one in self.required)
        yield from (one.pointer for one in self.absent)
        yield from (one.pointer for one in self.names)
        yield from (one.pointer for one in self.some)
        yield from (one.pointer for one in self.literals)

    def _parts(self) -> Iterable[Atom]:
        """What names and values have to satisfy."""
        atoms: list[Atom | None] = [one.atom for one in self.required]
        atoms += [one.atom for one in self.names]
        atoms += [atom for one in self.some for atom in (one.atom, one.name)]
        for members in self.members:
            atoms += [*members.named.values(), *members.patterns.values(), members.further]
        return (atom for atom in atoms if atom is not None)

    def _further(
        self, declared: list[str], possible: set[str]
    ) -> list[tuple[NameForms, list[Way]]]:
        if self.only_listed:
            return []
        pointers = [c.pointer for c in self.required] + [c.pointer for c in self.absent]
        names = FurtherNames(self.context, self.members, self.names, self.some, pointers)
        patterns = [p for p in self._patterns() if not finite_names(p)]
        kinds = names.kinds(patterns, declared, possible)
        found = [(kind.forms, self._marked(kind.atoms, kind.special)) for kind in kinds]
        return [(forms, ways) for forms, ways in found if ways]

    def _any_order(self, shape: ObjectShape) -> bool:
        """Whether the members may come in any order; if that is asked for and cannot be, it is
        noted."""
        if self.context.order_rules is None or len(shape.members) < 2:
            return False
        if shape.low or shape.high is not None or shape.marks:
            why = "members are counted"
        elif len(shape.members) > MAX_SHUFFLED:
            why = f"{len(shape.members)} names, any order is for up to {MAX_SHUFFLED}"
        elif not self.context.affords_any_order(len(shape.members)):
            why = "the schema is too large for any order in all of its objects"
        else:
            return True
        pointers = [f"{one.pointer}/properties" for one in self.members if one.named]
        for pointer in pointers or [one.pointer for one in self.required]:
            self.context.remark(pointer, f"in the declared order: {why}")
        return False

    def _bounded(self, shape: ObjectShape, needed: int) -> ObjectShape | None:
        """Without counting where it changes nothing or costs too much."""
        if shape.high is not None and not shape.further and len(shape.members) <= shape.high:
            shape.high = None
        if shape.high is not None and needed > shape.high:
            return None
        if shape.low <= needed:
            shape.low = 0
        if not shape.further and len(shape.members) < shape.low:
            return None
        if shape.further and (shape.high is None or shape.high - needed > 1):
            self._open_at()
        if (len(shape.members) + 1) * (shape.high or shape.low) > MAX_RULES:
            why = f"counting costs more than {MAX_RULES} rules"
            if shape.low:
                self.context.drop(self.low_at, why)
            if shape.high is not None:
                self.context.drop(self.high_at, why)
            shape.low, shape.high = 0, None
            if shape.further:
                self._open_at()
        return shape

    def _bounds(self) -> None:
        for constraint in self.literals:
            value = constraint.value
            if constraint.keyword == "minProperties" and value > self.low:
                self.low, self.low_at = int(value), constraint.pointer
            elif constraint.keyword == "maxProperties" and (self.high is None or value < self.high):
                self.high, self.high_at = int(value), constraint.pointer
            elif constraint.keyword == "enum":
                self.context.drop(constraint.pointer, "a value of this type is excluded as a whole")

    def _declared(self) -> list[str]:
        names: dict[str, None] = {}
        for members in self.members:
            names.update(dict.fromkeys(members.named))
        for one in self.some:
            if one.members is not None:
                names.update(dict.fromkeys(one.members.named))
        for pattern in self._patterns():
            names.update(dict.fromkeys(finite_names(pattern)))
        for constraint in self.required:
            names.update(dict.fromkeys(constraint.names))
        names.update(dict.fromkeys(constraint.name for constraint in self.absent))
        for values in self._listed_names():
            names.update(dict.fromkeys(values))
        return list(names)

    def _listed_names(self) -> Iterable[list[str]]:
        """Names where only some are allowed."""
        if self.names:
            state = self.nodes.reduced([c.atom for c in self.names])
            values = self.context.values(state)
            if values is not None:
                self.only_listed = True
                yield [value for value in values if isinstance(value, str)]

    only_listed = False

    def _patterns(self) -> list[str]:
        patterns = dict.fromkeys(p for members in self.members for p in members.patterns)
        for one in self.some:
            if one.pattern is not None:
                patterns[one.pattern] = None
            if one.members is not None:
                patterns.update(dict.fromkeys(one.members.patterns))
        return list(patterns)

    def _ways(self, name: str) -> list[Way]:
        """How a declared name may be there."""
        if any(constraint.name == name for constraint in self.absent):
            return []
        if not all(self._fits(name, constraint.atom) for constraint in self.names):
            return []
        if any(members.forbids(name) for members in self.members):
            return []
        atoms = [atom for members in self.members for atom in members.atoms(name)]
        for constraint in self.required:
            if constraint.atom is not None and name in constraint.names:
                atoms.append(constraint.atom)
        special = [
            one
            for one in self.some
            if one.covers(name) and (one.name is None or self._fits(name, one.name))
        ]
        return self._marked(atoms, special)

    def _fits(self, name: str, atom: Atom) -> bool:
        return self.nodes.valid(self.nodes.of(atom), name) is not bool(atom & 1)

    def _marked(self, atoms: list[Atom], special: list[SomeMember]) -> list[Way]:
        ways: list[tuple[list[Atom], int]] = [(atoms, 0)]
        for i, one in enumerate(self.some):
            if one in special:
                extra = [] if one.atom is None else [one.atom]
                with_mark = [([*own, *extra], marks | 1 << i) for own, marks in ways]
                ways = with_mark + (ways if extra else [])
        found: dict[Way, None] = {}
        for own, marks in ways:
            if not any(not a & 1 and self.nodes.of(a).schema is False for a in own):
                found[self.context.part(own, self._open_pointer()[0]), marks] = None
        return list(found)

    def _open_at(self) -> None:
        """Note that names may repeat, at the keyword that lets them."""
        self.context.drop(*self._open_pointer())

    def _open_pointer(self) -> tuple[str, str]:
        for members in self.members:
            if members.further is not None and not members.closed:
                return f"{members.pointer}/{members.keyword}", REPEAT
        for members in self.members:
            if members.closed and members.patterns:
                return f"{members.pointer}/patternProperties", PATTERN_REPEAT
        place = self.members[0].pointer if self.members else self.place
        return f"{place}/additionalProperties", REPEAT


def finite_names(pattern: str) -> list[str]:
    """The names that a pattern lists, if it does nothing else."""
    match = _FINITE.fullmatch(pattern)
    if match is None or ("|" in match[1] and "(" not in pattern):
        return []
    names = match[1].split("|")
    return names if all(found(pattern, name) for name in names) else []


def read_object(context: Context, conjunction: Conjunction, place: str) -> ObjectShape | None:
    """The shape of a conjunction for objects, or None where no object fits.

    place: pointer of a subschema that the objects belong to.
    """
    return _Reader(context, conjunction, place).shape()
