"""Conjunctions of constraints on objects: which properties there are, and which values they can have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from operator import or_

from service.schema_compiler.ir.values import (
    AdditionalProperties,
    AnyOrder,
    NameSet,
    Object,
    Property,
    PropertyValue,
)
from service.schema_compiler.lower.additional_names import AdditionalNames
from service.schema_compiler.lower.context import Context
from service.schema_compiler.normalize.bounds import BEYOND
from service.schema_compiler.normalize.constraints import (
    Conjunction,
    Forbidden,
    Literal,
    Properties,
    PropertyNames,
    Required,
    SomeProperty,
)
from service.schema_compiler.normalize.nodes import ANY, Atom
from service.schema_compiler.regex.matching import found

MAX_TOLD = 8
"""Declared properties of a closed object, up to which none comes twice in any order: each set of those
that are there has a rule."""
MAX_OBLIGATIONS = 4
"""Properties of a special kind that one object must have, each for its own reason."""
MAX_RULES = 400
"""Rules for counting the members of one object; beyond, bounds are checked."""
_FINITE = re.compile(r"\^\(?(?:\?:)?([\w -]+(?:\|[\w -]+)*)\)?\$", re.ASCII)
COUNTED_ONCE = (
    "additional names may repeat, and a repeated name counts once; close the object: "
    'additionalProperties: false, close_objects, extra="forbid" in pydantic, z.strictObject in zod'
)
LAST_COUNTS = (
    "additional names may repeat, and the last member of a name counts; list the names under "
    "properties"
)
LASTS = (
    "the order matters: once a member meets it, further members of its kind have to, as they may "
    "repeat its name"
)
COUNTED = "in the declared order: members are counted"
OBLIGED = "in the declared order: under `not`, some member has to be of a kind"
NEAR = (
    "optional properties in any order, the {} required ones near the order of `properties` or of "
    "`required`"
)


class _Lowering:
    """Lowers one conjunction."""

    def __init__(self, context: Context, conjunction: Conjunction) -> None:
        self.context = context
        self.nodes = context.nodes
        self.members = [c for c in conjunction if isinstance(c, Properties)]
        self.required = [c for c in conjunction if isinstance(c, Required)]
        self.absent = [c for c in conjunction if isinstance(c, Forbidden)]
        self.names = [c for c in conjunction if isinstance(c, PropertyNames)]
        self.some = [c for c in conjunction if isinstance(c, SomeProperty)]
        self.literals = [c for c in conjunction if isinstance(c, Literal)]
        for dropped in self.some[MAX_OBLIGATIONS:]:
            context.drop(dropped.pointer, "too many members of a special kind are asked for")
        self.some = self.some[:MAX_OBLIGATIONS]
        self.low, self.low_at = 0, ""
        self.high: int | None = None
        self.high_at = ""

    def object(self) -> Object | None:
        self._bounds()
        names = self._declared()
        if not self.context.affords(len(names) + len(self._patterns())):
            return self._any_object()
        needed = {name for constraint in self.required for name in constraint.names}
        properties: list[Property] = []
        for name in names:
            values = self._values(name)
            if values:
                properties.append(Property(name, name in needed, values))
            elif name in needed:
                return None
        # What some member must have is met in the declared order.
        any_order = self.context.order_rules is not None and not self.some
        additional = self._additional(names, {one.name for one in properties}, any_order=any_order)
        one = Object(tuple(properties), additional, self.low, self.high, len(self.some))
        found = self._bounded(self._lasting(one), len(needed))
        return None if found is None else replace(found, any_order=self._any_order(found))

    def _any_object(self) -> Object:
        """Any properties at all, as the bounds are met."""
        for pointer in self._pointers():
            self.context.drop(pointer, BEYOND)
        self.context.give_up(self._parts(), BEYOND)
        names = self.context.string([], name=True).found
        anything = PropertyValue(self.context.reference(ANY))
        return Object((), (AdditionalProperties(NameSet(names), (anything,)),))

    def _pointers(self) -> Iterable[str]:
        for members in self.members:
            if members.declared:
                yield f"{members.pointer}/properties"
            if members.patterns:
                yield f"{members.pointer}/patternProperties"
            if members.additional is not None:
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
            atoms += [*members.declared.values(), *members.patterns.values(), members.additional]
        return (atom for atom in atoms if atom is not None)

    def _additional(
        self, declared: list[str], possible: set[str], *, any_order: bool
    ) -> tuple[AdditionalProperties, ...]:
        if self.only_listed:
            return ()
        pointers = [c.pointer for c in self.required] + [c.pointer for c in self.absent]
        names = AdditionalNames(
            self.context, self.members, self.names, self.some, pointers, any_order=any_order
        )
        patterns = [p for p in self._patterns() if not listed_names(p)]
        kinds = names.kinds(patterns, declared, possible)
        found = ((kind.names, self._with_obligations(kind.atoms, kind.special)) for kind in kinds)
        return tuple(AdditionalProperties(one, values) for one, values in found if values)

    def _any_order(self, one: Object) -> AnyOrder | None:
        """How the properties may come in any order; None where they keep the declared one. What is not
        any order is noted."""
        names = tuple(prop.name for prop in one.properties)
        required = tuple(prop.name for prop in one.properties if prop.required)
        if self.context.order_rules is None or not names or (not one.additional and len(names) < 2):
            return None
        if one.obligations:
            self._note_order(OBLIGED)
            return None
        all_told = not one.additional and len(names) <= MAX_TOLD
        if all_told and self.context.affords_order(1 << len(names)):
            return AnyOrder(True, len(names), (names,))
        if not one.additional and one.minimum > len(required) + 1:
            self._note_order(COUNTED)
            return None
        limit = one.minimum if one.maximum is None else one.maximum
        counts = 1 + max(limit - len(required), 0)
        most = len(required) - 1
        if most < 1 or self.context.affords_order(counts << len(required)):
            return AnyOrder(False, max(most, 0), (required,))
        listed = dict.fromkeys(name for constraint in self.required for name in constraint.names)
        orders = tuple(
            dict.fromkeys((required, tuple(name for name in listed if name in required)))
        )
        self._note_order(NEAR.format(len(required)))
        for ahead in range(most - 1, 0, -1):
            rules = counts * len(orders) * rules_of_near(len(required), ahead)
            if self.context.affords_order(rules):
                return AnyOrder(False, ahead, orders)
        return AnyOrder(False, 0, orders)

    def _note_order(self, what: str) -> None:
        pointers = [f"{one.pointer}/properties" for one in self.members if one.declared]
        pointers = pointers or [one.pointer for one in self.required]
        if not pointers:  # the names are those that a pattern or propertyNames lists
            pointers = [f"{m.pointer}/patternProperties" for m in self.members if m.patterns]
            pointers += [one.pointer for one in self.names]
        for pointer in pointers:
            self.context.remark(pointer, what)

    def _lasting(self, one: Object) -> Object:
        """With the obligations that an additional property can meet by its value: another property of the
        same name can come after it, and only the last one counts. Everything else that is said of names
        and values holds for an object without repeated names if it holds with them."""
        met = reduce(or_, (kind.can_meet for kind in one.additional), 0)
        lasting = [i for i, some in enumerate(self.some) if met >> i & 1 and some.atom is not None]
        pointers = tuple(dict.fromkeys(self.some[i].pointer for i in lasting))
        return replace(one, lasting=sum(1 << i for i in lasting), lasting_by=pointers)

    def _bounded(self, one: Object, needed: int) -> Object | None:
        """Without counting where it changes nothing or costs too much."""
        size, low, high = len(one.properties), one.minimum, one.maximum
        if high is not None and not one.additional and size <= high:
            high = None
        if high is not None and needed > high:
            return None
        if low <= needed:
            low = 0
        if not one.additional and size < low:
            return None
        # Required names and one more are different names, whatever repeats.
        if one.additional:
            for constraint in self.literals:
                if constraint.keyword == "minProperties" and constraint.value > needed + 1:
                    self.context.drop(constraint.pointer, COUNTED_ONCE)
        if (size + 1) * (high or low) > MAX_RULES:
            why = f"counting costs more than {MAX_RULES} rules"
            if low:
                self.context.drop(self.low_at, why)
            if high is not None:
                self.context.drop(self.high_at, why)
            low, high = 0, None
        return replace(one, minimum=low, maximum=high)

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
            names.update(dict.fromkeys(members.declared))
        for one in self.some:
            if one.members is not None:
                names.update(dict.fromkeys(one.members.declared))
        for pattern in self._patterns():
            names.update(dict.fromkeys(listed_names(pattern)))
        for constraint in self.required:
            names.update(dict.fromkeys(constraint.names))
        names.update(dict.fromkeys(constraint.name for constraint in self.absent))
        for values in self._listed_names():
            names.update(dict.fromkeys(values))
        return list(names)

    def _listed_names(self) -> Iterable[list[str]]:
        """PropertyNames where only some are allowed."""
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

    def _values(self, name: str) -> tuple[PropertyValue, ...]:
        """The values that a declared property can have; none where it must not be there."""
        if any(constraint.name == name for constraint in self.absent):
            return ()
        if not all(self._fits(name, constraint.atom) for constraint in self.names):
            return ()
        if any(members.forbids(name) for members in self.members):
            return ()
        atoms = [atom for members in self.members for atom in members.atoms(name)]
        for constraint in self.required:
            if constraint.atom is not None and name in constraint.names:
                atoms.append(constraint.atom)
        special = [
            one
            for one in self.some
            if one.covers(name) and (one.name is None or self._fits(name, one.name))
        ]
        return self._with_obligations(atoms, special)

    def _fits(self, name: str, atom: Atom) -> bool:
        return self.nodes.valid(self.nodes.of(atom), name) is not bool(atom & 1)

    def _with_obligations(
        self, atoms: list[Atom], special: list[SomeProperty]
    ) -> tuple[PropertyValue, ...]:
        """Values that satisfy all atoms, with the obligations that they meet. special: obligations that
        a property of this name can meet."""
        choices: list[tuple[list[Atom], int]] = [(atoms, 0)]
        for i, one in enumerate(self.some):
            if one in special:
                extra = [] if one.atom is None else [one.atom]
                meeting = [([*own, *extra], meets | 1 << i) for own, meets in choices]
                choices = meeting + (choices if extra else [])
        found: dict[PropertyValue, None] = {}
        for own, meets in choices:
            if not any(not a & 1 and self.nodes.of(a).schema is False for a in own):
                value = self.context.part(own)
                found[PropertyValue(value, meets)] = None
        return tuple(found)


def rules_of_near(count: int, ahead: int) -> int:
    """The sets of so many properties that may be there at once, if none comes more than ``ahead`` places
    before the first that is not there."""
    return 1 + sum(1 << min(ahead, count - 1 - first) for first in range(count))


def listed_names(pattern: str) -> list[str]:
    """The names that a pattern lists, if it does nothing else."""
    match = _FINITE.fullmatch(pattern)
    if match is None or ("|" in match[1] and "(" not in pattern):
        return []
    names = match[1].split("|")
    return names if all(found(pattern, name) for name in names) else []


def lower_object(context: Context, conjunction: Conjunction) -> Object | None:
    """The objects of a conjunction; None where there are none."""
    return _Lowering(context, conjunction).object()
