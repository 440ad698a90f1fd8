"""Names of objects that are not declared, in kinds by the patterns that they match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.tasks.grammars.context import Context
from service.tasks.grammars.literals import Literal
from service.tasks.grammars.nodes import STRING, Atom, negated
from service.tasks.grammars.shapes import Members, Names, SomeMember

MAX_CLASSES = 16
"""Kinds of further names, told apart by the patterns that they match."""
MAX_PATTERNS = 8
"""Patterns whose combinations are told apart."""

# Further names


@dataclass
class Kind:
    """Names of one kind. expression: of the name, quotes included. atoms: what values satisfy.
    special: which of the members that the object must have are of this kind."""

    expression: str
    atoms: list[Atom]
    special: list[SomeMember]


class FurtherNames:
    """The names that one conjunction does not declare.

    patterns: that tell names apart. declared: names that are excluded. pointers: of keywords that
    speak of declared names beside ``members``.
    """

    def __init__(
        self,
        context: Context,
        members: list[Members],
        names: list[Names],
        some: list[SomeMember],
        pointers: list[str],
    ) -> None:
        self.context = context
        self.nodes = context.nodes
        self.members = members
        self.names = names
        self.some = some
        self.pointers = pointers

    def kinds(self, patterns: list[str], declared: list[str]) -> list[Kind]:
        """The kinds of which there can be names."""
        if not patterns and any(members.closed for members in self.members):
            return []
        found: list[Kind] = []
        for matched, literals in self._classes(patterns):
            atoms = self._class_atoms(matched)
            if atoms is None:
                continue
            for named, covered in self._named_classes(literals):
                special = [one for one in self.some if self._covers(one, matched, covered)]
                expression = self._key(named, declared)
                if expression is not None:
                    found.append(Kind(expression, atoms, special))
        return found

    def _covers(self, one: SomeMember, matched: frozenset[str], named: frozenset[Atom]) -> bool:
        if one.name is not None and one.name not in named:
            return False
        if one.pattern is not None:
            return one.pattern in matched
        return one.members is None or matched.isdisjoint(one.members.patterns)

    def _class_atoms(self, matched: frozenset[str]) -> list[Atom] | None:
        """What values of a class of names satisfy; None where the class is forbidden."""
        atoms: list[Atom] = []
        for members in self.members:
            hits = [a for p, a in members.patterns.items() if p in matched]
            if not hits:
                if members.closed:
                    return None
                hits = [members.further]
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
                self._drop_patterns("too many patterns of names overlap")
                return [*classes, *self._plain_classes(patterns[i:], at)]
            split: list[tuple[frozenset[str], list[Literal]]] = []
            for matched, literals in classes:
                split.append((matched, [*literals, Literal("pattern", pattern, pointer, True)]))
                both = (matched | {pattern}, [*literals, Literal("pattern", pattern, pointer)])
                if not matched or self.context.string(both[1], key=True).expression is not None:
                    split.append(both)
            classes = split
        return classes

    @staticmethod
    def _plain_classes(
        patterns: Sequence[str], at: dict[str, str]
    ) -> list[tuple[frozenset[str], list[Literal]]]:
        return [(frozenset((p,)), [Literal("pattern", p, at.get(p, ""))]) for p in patterns]

    def _drop_patterns(self, why: str) -> None:
        for members in self.members:
            if members.patterns:
                self.context.drop(f"{members.pointer}/patternProperties", why)
                if members.further is not None:
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

    def _key(self, literals: list[Literal], declared: list[str]) -> str | None:
        own = [Literal("enum", declared, negated=True)] if declared else []
        emitted = self.context.string([*literals, *own], key=True)
        for dropped, why in emitted.dropped:
            if dropped.pointer:
                self.context.drop(dropped.pointer, why)
                continue
            for members in self.members:
                if members.named:
                    self.context.drop(f"{members.pointer}/properties", why)
                if members.further is not None:
                    self.context.drop(f"{members.pointer}/{members.keyword}", why)
            for pointer in self.pointers:
                self.context.drop(pointer, why)
        if any(dropped.keyword == "pattern" for dropped, _ in emitted.dropped):
            self._drop_patterns("names cannot be told apart")
        return emitted.expression
