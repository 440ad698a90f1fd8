"""PropertyNames of objects that are not declared, in kinds by the patterns that they match."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile

from service.schema_compiler import budget
from service.schema_compiler.ir.values import NameSet, TextSet, beginnings
from service.schema_compiler.lower.context import Context
from service.schema_compiler.normalize.constraints import (
    PREFIX,
    Literal,
    Properties,
    PropertyNames,
    SomeProperty,
)
from service.schema_compiler.normalize.nodes import STRING, Atom, negated

MAX_CLASSES = 16
"""Kinds of additional names, told apart by the patterns that they match."""
MAX_PATTERNS = 8
"""Patterns whose combinations are told apart."""
MAX_LONGER = 200
"""Declared names up to which additional names may begin with one of them."""
MAX_LONGER_BY_PATTERN = 16
"""The same where a pattern tells names apart: each takes an automaton of its own."""
OVERLAP = "too many patterns of names overlap"
"""Why patterns of names are dropped."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Kind:
    """PropertyNames of one kind. atoms: what values satisfy. special: which of the members that the object
    must have are of this kind."""

    names: NameSet
    atoms: list[Atom]
    special: list[SomeProperty]


class AdditionalNames:
    """The names that one conjunction does not declare.

    pointers: of keywords that speak of declared names beside ``members``. any_order: whether declared
    names may be written everywhere, so that others may begin with them.
    """

    def __init__(
        self,
        context: Context,
        members: list[Properties],
        names: list[PropertyNames],
        some: list[SomeProperty],
        pointers: list[str],
        *,
        any_order: bool,
    ) -> None:
        self.context = context
        self.nodes = context.nodes
        self.members = members
        self.names = names
        self.some = some
        self.pointers = pointers
        self.any_order = any_order
        self._sure = True

    def kinds(self, patterns: list[str], declared: list[str], possible: set[str]) -> list[Kind]:
        """The kinds of which there can be names.

        patterns: that tell names apart. declared: names that are excluded. possible: those of them
        that an object can have.
        """
        if not patterns and any(members.closed for members in self.members):
            return []
        found: list[Kind] = []
        for matched, literals in self._classes(patterns):
            budget.current().check()
            atoms = self._class_atoms(matched)
            if atoms is None:
                continue
            for named, covered in self._named_classes(literals):
                special = [one for one in self.some if self._covers(one, matched, covered)]
                names = self._names(named, declared, possible)
                if names.apart is not None or names.extending:
                    found.append(Kind(names, atoms, special))
        return found

    def _covers(self, one: SomeProperty, matched: frozenset[str], named: frozenset[Atom]) -> bool:
        if one.name is not None and one.name not in named:
            return False
        if one.pattern is not None:
            return not self._sure or one.pattern in matched
        if one.members is None:
            return True
        unsure = not self._sure and bool(one.members.patterns)
        return unsure or matched.isdisjoint(one.members.patterns)

    def _class_atoms(self, matched: frozenset[str]) -> list[Atom] | None:
        """What values of a class of names satisfy; None where the class is forbidden."""
        atoms: list[Atom] = []
        for members in self.members:
            hits = [a for p, a in members.patterns.items() if p in matched]
            if not hits:
                if members.closed:
                    return None
                hits = [members.additional]
            atoms += [atom for atom in hits if atom is not None]
        return atoms

    def _classes(self, patterns: Sequence[str]) -> list[tuple[frozenset[str], list[Literal]]]:
        """Sets of patterns that names can match together, with the literals that say so."""
        at = {p: f"{m.pointer}/patternProperties" for m in self.members for p in m.patterns}
        classes: list[tuple[frozenset[str], list[Literal]]] = [(frozenset(), [])]
        if len(patterns) > 1:
            self.context.note(at.get(patterns[0], ""), "patterns of names made disjoint")
        for i, pattern in enumerate(patterns):
            pointer = at.get(pattern, "")
            if i >= MAX_PATTERNS or len(classes) > MAX_CLASSES:
                self._drop_patterns(OVERLAP)
                self._drop_obligations()
                return [*classes, *self._plain_classes(patterns[i:], at)]
            split: list[tuple[frozenset[str], list[Literal]]] = []
            for matched, literals in classes:
                split.append((matched, [*literals, Literal("pattern", pattern, pointer, True)]))
                both = (matched | {pattern}, [*literals, Literal("pattern", pattern, pointer)])
                if not matched or self.context.string(both[1], name=True).found is not None:
                    split.append(both)
            classes = split
        return classes

    def _drop_obligations(self) -> None:
        """Classes no longer say which patterns a name matches, so each name may be one that is asked for."""
        self._sure = False
        for one in self.some:
            if one.pattern is not None or (one.members is not None and one.members.patterns):
                self.context.drop(one.pointer, OVERLAP)

    @staticmethod
    def _plain_classes(
        patterns: Sequence[str], at: dict[str, str]
    ) -> list[tuple[frozenset[str], list[Literal]]]:
        return [(frozenset((p,)), [Literal("pattern", p, at.get(p, ""))]) for p in patterns]

    def _drop_patterns(self, why: str) -> None:
        for members in self.members:
            if members.patterns:
                self.context.drop(f"{members.pointer}/patternProperties", why)
                if members.additional is not None:
                    self.context.drop(f"{members.pointer}/{members.keyword}", why)

    def _named_classes(
        self, literals: list[Literal]
    ) -> Iterable[tuple[list[Literal], frozenset[Atom]]]:
        """The class by what ``propertyNames`` says of names, and its violation where one is asked."""
        required = [constraint.atom for constraint in self.names]
        asked = [one.name for one in self.some if one.name is not None]
        for k in range(1 << len(asked)):
            chosen = [atom for i, atom in enumerate(asked) if k >> i & 1]
            rest = [negated(atom) for i, atom in enumerate(asked) if not k >> i & 1]
            state = self.nodes.reduced([*required, *chosen, *rest])
            for one in self.context.expand(state)[STRING]:
                own = [c for c in one if isinstance(c, Literal)]
                yield [*literals, *own], frozenset(chosen)

    def _names(self, literals: list[Literal], declared: list[str], possible: set[str]) -> NameSet:
        if self.any_order:
            own = [Literal("enum", declared, negated=True)] if declared else []
            lowered = self.context.string([*literals, *own], name=True)
            if not lowered.dropped:
                return NameSet(lowered.found, {}, *self._left([[*literals, *own]]))
        named = [name for name in declared if name]
        own = [Literal(PREFIX, named, negated=True)] if named else []
        if len(named) < len(declared):  # all names begin with the empty one
            own.append(Literal("enum", [""], negated=True))
        lowered = self.context.string([*literals, *own], name=True)
        for dropped, why in lowered.dropped:
            if dropped.pointer:
                self.context.drop(dropped.pointer, why)
                continue
            for members in self.members:
                if members.declared:
                    self.context.drop(f"{members.pointer}/properties", why)
                if members.additional is not None:
                    self.context.drop(f"{members.pointer}/{members.keyword}", why)
            for pointer in self.pointers:
                self.context.drop(pointer, why)
        if any(dropped.keyword == "pattern" for dropped, _ in lowered.dropped):
            self._drop_patterns("names cannot be told apart")
        known = {id(dropped) for dropped, _ in lowered.dropped}
        extending = self._extending(literals, named, possible, known)
        written = [[*literals, *own]] if lowered.found is not None else []
        if lowered.found is None and not extending and declared:
            # Every name begins with one that cannot be there. Rather such names than none.
            written = [[*literals, Literal("enum", declared, negated=True)]]
            lowered = self.context.string(written[0], name=True)
        in_order = sorted(named)
        written += (self._longer(literals, name, in_order) for name in extending)
        return NameSet(lowered.found, extending, *self._left(written))

    def _left(self, written: Iterable[list[Literal]]) -> tuple[int | None, tuple[str, ...]]:
        """The greatest length of names that the decoder keeps, and the pointers behind it; None with
        pointers where it is not kept of all of them."""
        maxima: set[int | None] = set()
        pointers: dict[str, None] = {}
        for literals in written:
            left = self.context.left_lengths(literals, name=True)
            maxima.add(left.maximum)
            pointers.update(dict.fromkeys(literals[i].pointer for i in left.maximum_by))
        return maxima.pop() if len(maxima) == 1 else None, tuple(pointers)

    @staticmethod
    def _longer(literals: list[Literal], name: str, in_order: list[str]) -> list[Literal]:
        """What holds for names that begin with a declared one and are longer, and with no longer one."""
        own = [Literal(PREFIX, name)]
        behind = islice(in_order, bisect_right(in_order, name), None)
        below = list(takewhile(partial(_begins, name), behind))
        if below:
            own.append(Literal(PREFIX, below, negated=True))
        return [*literals, *own]

    def _extending(
        self, literals: list[Literal], declared: list[str], possible: set[str], dropped: set[int]
    ) -> dict[str, TextSet]:
        """PropertyNames that begin with a declared one. dropped: literals that are not enforced anyway; names
        that would drop more are left out."""
        patterns = any(one.keyword in ("pattern", "format") for one in literals)
        if len(declared) > (MAX_LONGER_BY_PATTERN if patterns else MAX_LONGER):
            return {}
        found: dict[str, TextSet] = {}
        impossible = set(declared) - possible
        in_order = sorted(declared)
        for name in declared:
            if impossible and not impossible.isdisjoint(beginnings(name)):
                continue
            if _LONE_SURROGATE.search(name):
                continue
            lowered = self.context.string(self._longer(literals, name, in_order), name=True)
            is_kept = all(id(literal) in dropped for literal, _ in lowered.dropped)
            if lowered.found is not None and is_kept:
                found[name] = lowered.found
        return found


def _begins(beginning: str, name: str) -> bool:
    return name.startswith(beginning)
