"""Schemas as alternatives of conjunctions, one list for each type of JSON value.

Negation is pushed inwards, so that what remains are constraints on parts of a value; keywords that do
not concern a type are gone before anything is multiplied. What a value's parts have to satisfy stays
as it is, so that recursion ends. Where a product becomes too large, a part of it is dropped: the
alternatives then hold more values than the schema, and the keyword is noted as checked.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from itertools import combinations

from service.schema_compiler import budget
from service.schema_compiler.normalize.alternatives import (
    EVERY,
    FALSE,
    NEVER,
    TRUE,
    Combiner,
    Expansion,
    united,
)
from service.schema_compiler.normalize.bounds import Bounds
from service.schema_compiler.normalize.constraints import (
    Alternatives,
    Forbidden,
    Required,
)
from service.schema_compiler.normalize.evaluated import rest, unclear
from service.schema_compiler.normalize.keywords import MEMBERS, READ, Reader, only
from service.schema_compiler.normalize.nodes import (
    ARRAY,
    OBJECT,
    TYPES,
    Atom,
    Node,
    Nodes,
    State,
    negated,
)
from service.schema_compiler.report import Rewrite

MAX_TRACKED = 4
"""Branches of ``anyOf`` of which each subset is an alternative, for ``unevaluatedProperties``."""
Steps = Generator[Atom, None, Expansion]

_UNEVALUATED = ("unevaluatedProperties", "unevaluatedItems")
_POSITIVE = frozenset(("not", "if", "oneOf"))
"""Keywords that are violated by what satisfies a subschema. Nothing is evaluated by that."""


class Expander:
    """Expands the states of one schema.

    drop: called with the pointer of a keyword that is not fully expanded, and the reason.
    rewrites: what was rewritten on the way.
    """

    def __init__(self, nodes: Nodes, bounds: Bounds, drop: Callable[[str, str], None]) -> None:
        self.nodes = nodes
        self.drop = drop
        self.rewrites: dict[Rewrite, None] = {}
        self._known: dict[Atom, Expansion] = {}
        self._lost: set[str] = set()
        self._tracked = nodes.uses(_UNEVALUATED)
        self._reader = Reader(nodes, self.note)
        self._combiner = Combiner(nodes, bounds, drop, self._tracked)

    def expand(self, state: State) -> Expansion:
        """The alternatives of a state. Raises ``BudgetExceeded``."""
        whole: Expansion = TRUE
        for atom in sorted(state):
            pointer = self.nodes.of(atom).pointer
            part = self._expansion(atom)
            whole = part if whole is TRUE else self._combiner.both(whole, part, pointer)
        return whole

    def _expansion(self, atom: Atom) -> Expansion:
        """Depth-first over what applies to the same value, without recursion."""
        if atom in self._known:
            return self._known[atom]
        stack = [(atom, self._start(atom))]
        while stack:
            budget.current().check()
            current, steps = stack[-1]
            try:
                needed = next(steps)
            except StopIteration as stop:
                self._known[current] = stop.value
                stack.pop()
                continue
            stack.append((needed, self._start(needed)))
        return self._known[atom]

    def _start(self, atom: Atom) -> Steps:
        node = self.nodes.of(atom)
        return self._violated(node) if atom & 1 else self._satisfied(node)

    def _of(self, atom: Atom) -> Steps:
        if atom not in self._known:
            yield atom
        return self._known[atom]

    # Nodes

    def _satisfied(self, node: Node) -> Steps:
        if isinstance(node.schema, bool):
            return TRUE if node.schema else FALSE
        own, types = self._reader.satisfied(node)
        here: Expansion = tuple([tuple(own[t])] if types >> t & 1 else NEVER for t in TYPES)
        # PropertyNames keep the order of the schema, also where parts of it come before its own.
        first = next((k for k in node.keywords if k in MEMBERS or k not in _IN_PLACE), None)
        if any(k in node.keywords for k in MEMBERS):
            first = next(k for k in node.keywords if k in MEMBERS)
        whole = here if first is None else TRUE
        self._drop_unknown(node)
        for keyword in node.keywords:
            if keyword == first:
                whole = self._combiner.both(whole, here, node.at(keyword))
            combine = _IN_PLACE.get(keyword)
            if combine is not None:
                part = yield from combine(self, node, keyword, False)
                whole = self._combiner.both(whole, part, node.at(keyword))
        if self._tracked:
            whole = self._unevaluated(node, whole)
        return whole

    def _violated(self, node: Node) -> Steps:
        if isinstance(node.schema, bool):
            return FALSE if node.schema else TRUE
        parts = list(self._reader.violated(node))
        if self._drop_unknown(node):
            parts.append(TRUE)
        if not _POSITIVE.isdisjoint(node.keywords):
            self._lost.add(node.pointer)
        for keyword in node.keywords:
            combine = _IN_PLACE.get(keyword)
            if combine is not None:
                part = yield from combine(self, node, keyword, True)
                parts.append(part)
            elif keyword in _UNEVALUATED:
                self.drop(node.at(keyword), "it is negated")
                t = OBJECT if keyword == "unevaluatedProperties" else ARRAY
                parts.append(only({t: EVERY}))
        return self._combiner.any(parts)

    def _drop_unknown(self, node: Node) -> bool:
        """Note the keywords that become no constraint. Returns whether there are any."""
        unknown = [keyword for keyword in node.keywords if keyword not in UNDERSTOOD]
        for keyword in unknown:
            self.drop(node.at(keyword), "a grammar cannot express this keyword")
        return bool(unknown)

    def note(self, pointer: str, what: str) -> None:
        """Remember that something was rewritten."""
        self.rewrites[Rewrite(pointer, what)] = None

    # Keywords that apply to the same value

    def _all_of(self, node: Node, keyword: str, negative: bool) -> Steps:
        atoms = self._branches(node, keyword)
        if negative:
            return (yield from self._some(atoms, flip=True))
        if len(atoms) > 1 or len(node.keywords) > 1:
            self.note(node.at(keyword), "parts of allOf merged")
        return (yield from self._every(atoms, node.at(keyword)))

    def _any_of(self, node: Node, keyword: str, negative: bool) -> Steps:
        atoms = self._branches(node, keyword)
        if negative:
            return (yield from self._every([negated(atom) for atom in atoms], node.at(keyword)))
        if not self._tracked:
            return (yield from self._some(atoms))
        if len(atoms) > MAX_TRACKED:
            self._lost.add(node.at(keyword))
            return (yield from self._some(atoms))
        parts = []
        for size in range(1, len(atoms) + 1):
            for chosen in combinations(atoms, size):
                parts.append((yield from self._every(chosen, node.at(keyword))))
        return self._combiner.any(parts)

    def _one_of(self, node: Node, keyword: str, negative: bool) -> Steps:
        atoms = self._branches(node, keyword)
        branches = []
        for atom in atoms:
            branches.append((yield from self._of(atom)))
        overlaps = self._combiner.overlaps(branches, node.at(keyword))
        if negative:
            none = yield from self._every([negated(atom) for atom in atoms], node.at(keyword))
            parts = [none]
            parts += [
                self._combiner.both(branches[i], branches[j], node.at(keyword))
                for i, j in sorted(overlaps)
            ]
            return self._combiner.any(parts)
        others: dict[int, list[int]] = {}
        for i, j in sorted(overlaps):
            others.setdefault(i, []).append(j)
            others.setdefault(j, []).append(i)
        parts = []
        for i, part in enumerate(branches):
            for j in sorted(others.get(i, ())):
                excluded = yield from self._of(negated(atoms[j]))
                part = self._combiner.both(part, excluded, node.at(keyword))
            parts.append(part)
        if len(atoms) > 1:
            what = "overlaps of its branches excluded" if overlaps else "branches are disjoint"
            self.note(node.at(keyword), f"oneOf: {what}")
        return self._combiner.any(parts)

    def _not(self, node: Node, keyword: str, negative: bool) -> Steps:
        atom = self.nodes.child(node, "not")
        return (yield from self._of(atom if negative else negated(atom)))

    def _if(self, node: Node, keyword: str, negative: bool) -> Steps:
        child = self.nodes.child
        condition = child(node, "if")
        parts = []
        for atom, branch in ((condition, "then"), (negated(condition), "else")):
            tested = yield from self._of(atom)
            if branch in node.keywords:
                follows = child(node, branch)
                then = yield from self._of(negated(follows) if negative else follows)
            else:
                then = FALSE if negative else TRUE
            parts.append(self._combiner.both(tested, then, node.at(keyword)))
        if "then" in node.keywords or "else" in node.keywords:
            self.note(node.at(keyword), "if, then and else as alternatives")
        elif not self._tracked:
            return FALSE if negative else TRUE
        return self._combiner.any(parts)

    def _reference(self, node: Node, keyword: str, negative: bool) -> Steps:
        if keyword != "$ref" and self.nodes.subschemas.embedded:
            self.drop(node.at(keyword), "its target depends on how the place is reached")
            self._lost.add(node.at(keyword))
            return TRUE
        if len(node.keywords) > 1:
            self.note(node.at(keyword), "reference merged with its siblings")
        atom = self.nodes.target(node, keyword)
        return (yield from self._of(negated(atom) if negative else atom))

    def _dependent_required(self, node: Node, keyword: str, negative: bool) -> Steps:
        pointer = node.at(keyword)
        wanted = {k: v for k, v in node.keywords[keyword].items() if isinstance(v, list) and v}
        self.note(pointer, "dependencies as alternatives")
        if negative:
            broken: Alternatives = [
                (Required(pointer, (name,)), Forbidden(pointer, other))
                for name, others in wanted.items()
                for other in others
            ]
            return only({OBJECT: broken})
        kept = EVERY
        by_others: dict[tuple[str, ...], list[str]] = {}
        for name, others in wanted.items():
            by_others.setdefault(tuple(dict.fromkeys(others)), []).append(name)
        for wanted_names, names in by_others.items():
            kept = self._combiner.product(
                OBJECT, kept, _wanted(pointer, names, wanted_names), pointer
            )
        return only({**dict.fromkeys(TYPES, EVERY), OBJECT: kept})
        yield  # a generator like the others

    def _dependent_schemas(self, node: Node, keyword: str, negative: bool) -> Steps:
        pointer = node.at(keyword)
        schemas = {k: v for k, v in node.keywords[keyword].items() if not isinstance(v, list)}
        self.note(pointer, "dependencies as alternatives")
        kept: Alternatives = NEVER if negative else EVERY
        for name in schemas:
            atom = self.nodes.child(node, keyword, name)
            part = (yield from self._of(negated(atom) if negative else atom))[OBJECT]
            there: Alternatives = [(Required(pointer, (name,)),)]
            applied = self._combiner.product(OBJECT, there, part, pointer)
            if negative:
                kept = united(OBJECT, [kept, applied])
            else:
                choice = [(Forbidden(pointer, name),), *applied]
                kept = self._combiner.product(OBJECT, kept, choice, pointer)
        others = NEVER if negative else EVERY
        return only({**dict.fromkeys(TYPES, others), OBJECT: kept})

    def _dependencies(self, node: Node, keyword: str, negative: bool) -> Steps:
        names = yield from self._dependent_required(node, keyword, negative)
        schemas = yield from self._dependent_schemas(node, keyword, negative)
        if negative:
            return self._combiner.any([names, schemas])
        return self._combiner.both(names, schemas, node.at(keyword))

    def _branches(self, node: Node, keyword: str) -> list[Atom]:
        return [self.nodes.child(node, keyword, i) for i in range(len(node.keywords[keyword]))]

    # Combining

    def _every(self, atoms: Iterable[Atom], pointer: str) -> Steps:
        whole: Expansion = TRUE
        for atom in atoms:
            part = yield from self._of(atom)
            whole = self._combiner.both(whole, part, pointer)
        return whole

    def _some(self, atoms: Iterable[Atom], flip: bool = False) -> Steps:
        parts = []
        for atom in atoms:
            parts.append((yield from self._of(negated(atom) if flip else atom)))
        return self._combiner.any(parts)

    # unevaluatedProperties and unevaluatedItems

    def _unevaluated(self, node: Node, whole: Expansion) -> Expansion:
        parts = list(whole)
        for keyword, t in zip(_UNEVALUATED, (OBJECT, ARRAY), strict=True):
            if keyword not in node.keywords:
                continue
            pointer = node.at(keyword)
            if keyword == "unevaluatedItems" or self._lost or unclear(parts[t]):
                self.drop(pointer, "what is evaluated depends on the value")
                continue
            atom = self.nodes.child(node, keyword)
            closed = node.keywords[keyword] is False
            parts[t] = [(*one, *rest(one, atom, closed, node.pointer)) for one in parts[t]]
        return tuple(parts)


def _wanted(pointer: str, names: list[str], others: tuple[str, ...]) -> Alternatives:
    """Objects that have the others, if they have one of the names."""
    if len(names) == 1:
        (name,) = names
        there = Required(pointer, (name, *(other for other in others if other != name)))
        return [(Forbidden(pointer, name),), (there,)]
    absent = tuple(Forbidden(pointer, name) for name in names)
    if len(others) == 1 and others[0] not in names:  # no object is in both
        absent += (Forbidden(pointer, others[0]),)
    return [absent, (Required(pointer, others),)]


_IN_PLACE: dict[str, Callable[[Expander, Node, str, bool], Steps]] = {
    "$ref": Expander._reference,
    "$dynamicRef": Expander._reference,
    "$recursiveRef": Expander._reference,
    "allOf": Expander._all_of,
    "anyOf": Expander._any_of,
    "oneOf": Expander._one_of,
    "not": Expander._not,
    "if": Expander._if,
    "dependentRequired": Expander._dependent_required,
    "dependentSchemas": Expander._dependent_schemas,
    "dependencies": Expander._dependencies,
}
UNDERSTOOD = READ | _IN_PLACE.keys() | {"then", "else", *_UNEVALUATED}
"""Keywords that become constraints or alternatives. All others are only checked in finished answers."""
