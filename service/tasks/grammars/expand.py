"""Schemas as alternatives of conjunctions, one list for each type of JSON value.

Negation is pushed inwards, so that what remains are constraints on parts of a value; keywords that do
not concern a type are gone before anything is multiplied. What a value's parts have to satisfy stays
as it is, so that recursion ends. Where a product becomes too large, a part of it is dropped: the
alternatives then hold more values than the schema, and the keyword is noted as checked.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import combinations
from typing import Any

from service.tasks import budget
from service.tasks.formats import FORMATS
from service.tasks.grammars.disjoint import contradictory
from service.tasks.grammars.literals import Literal
from service.tasks.grammars.nodes import (
    ALL_TYPES,
    ARRAY,
    NULL,
    NUMBER,
    OBJECT,
    STRING,
    TYPE_NAMES,
    TYPES,
    Atom,
    Node,
    Nodes,
    State,
    negated,
    type_of,
)
from service.tasks.grammars.report import Rewrite
from service.tasks.grammars.shapes import (
    Absent,
    Alternatives,
    Conjunction,
    Constraint,
    Contains,
    Items,
    Members,
    Names,
    Required,
    SomeMember,
    Unique,
)
from service.tasks.keywords import frozen

MAX_ALTERNATIVES = 128
"""Of one type, by multiplying; more grow the grammar and the time of each step past their use."""
MAX_STEPS = 60_000
"""Conjunctions that are built for one schema; about 2 µs each."""
MAX_TRACKED = 4
"""Branches of ``anyOf`` of which each subset is an alternative, for ``unevaluatedProperties``."""
TOO_MANY = "too many combinations"

Expansion = tuple[Alternatives, ...]
"""Alternatives by type, in the order of ``TYPES``."""
Steps = Generator[Atom, None, Expansion]

_EVERY: Alternatives = [()]
_NEVER: Alternatives = []
TRUE: Expansion = tuple(_EVERY for _ in TYPES)
FALSE: Expansion = tuple(_NEVER for _ in TYPES)

_STRINGS = ("pattern", "minLength", "maxLength")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_OPPOSITE = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}
_LEAST = {
    "minLength": ("maxLength", STRING),
    "minItems": ("maxItems", ARRAY),
    "minProperties": ("maxProperties", OBJECT),
}
_MOST = {
    "maxLength": ("minLength", STRING),
    "maxItems": ("minItems", ARRAY),
    "maxProperties": ("minProperties", OBJECT),
}
_MEMBERS = ("properties", "patternProperties", "additionalProperties")
_ITEMS = ("prefixItems", "items", "additionalItems")
_UNEVALUATED = ("unevaluatedProperties", "unevaluatedItems")


class Expander:
    """Expands the states of one schema.

    drop: called with the pointer of a keyword that is not fully expanded, and the reason.
    rewrites: what was rewritten on the way.
    """

    def __init__(self, nodes: Nodes, drop: Callable[[str, str], None]) -> None:
        self.nodes = nodes
        self.drop = drop
        self.rewrites: dict[Rewrite, None] = {}
        self._known: dict[Atom, Expansion] = {}
        self._steps = 0
        self._lost: set[str] = set()
        self._tracked = nodes.uses(_UNEVALUATED)

    def expand(self, state: State) -> Expansion:
        """The alternatives of a state. Raises ``BudgetExceeded``."""
        whole: Expansion = TRUE
        for atom in sorted(state):
            pointer = self.nodes.of(atom).pointer
            part = self._expansion(atom)
            whole = part if whole is TRUE else self._both(whole, part, pointer)
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
        own, types = self._own(node)
        here: Expansion = tuple([tuple(own[t])] if types >> t & 1 else _NEVER for t in TYPES)
        # Names keep the order of the schema, also where parts of it come before its own.
        first = next((k for k in node.keywords if k in _MEMBERS or k not in _IN_PLACE), None)
        if any(k in node.keywords for k in _MEMBERS):
            first = next(k for k in node.keywords if k in _MEMBERS)
        whole = here if first is None else TRUE
        for keyword in node.keywords:
            if keyword == first:
                whole = self._both(whole, here, node.at(keyword))
            combine = _IN_PLACE.get(keyword)
            if combine is not None:
                part = yield from combine(self, node, keyword, False)
                whole = self._both(whole, part, node.at(keyword))
        if self._tracked:
            whole = self._unevaluated(node, whole)
        return whole

    def _violated(self, node: Node) -> Steps:
        if isinstance(node.schema, bool):
            return FALSE if node.schema else TRUE
        parts = list(self._own_negated(node))
        for keyword in node.keywords:
            combine = _IN_PLACE.get(keyword)
            if combine is not None:
                part = yield from combine(self, node, keyword, True)
                parts.append(part)
            elif keyword in _UNEVALUATED:
                self.drop(node.at(keyword), "it is negated")
                t = OBJECT if keyword == "unevaluatedProperties" else ARRAY
                parts.append(_only({t: _EVERY}))
        return self._any(parts)

    def _own(self, node: Node) -> tuple[list[list[Constraint]], int]:
        """The constraints by type that stand beside each other, and the types as bits."""
        own: list[list[Constraint]] = [[] for _ in TYPES]
        types = ALL_TYPES
        for t, constraint in self._constraints(node):
            own[t].append(constraint)
        keywords = node.keywords
        if "type" in keywords:
            allowed = _listed(keywords["type"])
            types &= sum(1 << t for t in TYPES if TYPE_NAMES[t] in allowed)
            if "integer" in allowed and "number" not in allowed:
                types |= 1 << NUMBER
                own[NUMBER].insert(0, Literal("type", "integer", node.at("type")))
        for keyword, values in _enums(node):
            literals = _by_type(keyword, values, node.at(keyword), negative=False)
            types &= sum(1 << t for t in literals)
            for t, literal in literals.items():
                if t != NULL:
                    own[t].append(literal)
        return own, types

    def _constraints(self, node: Node) -> Iterable[tuple[int, Constraint]]:
        keywords = node.keywords
        for keyword, value, name in _scalars(node):
            t = NUMBER if name in _NUMBERS else STRING
            yield t, Literal(name, value, node.at(keyword))
        for keyword, (_, t) in (*_LEAST.items(), *_MOST.items()):
            if keyword in keywords and keyword not in _STRINGS:
                yield t, Literal(keyword, keywords[keyword], node.at(keyword))
        if any(keyword in keywords for keyword in _MEMBERS):
            yield OBJECT, self._members(node)
        if keywords.get("required"):
            yield OBJECT, Required(node.at("required"), tuple(dict.fromkeys(keywords["required"])))
            self._note_required(node)
        if "propertyNames" in keywords:
            yield OBJECT, Names(node.at("propertyNames"), self.nodes.child(node, "propertyNames"))
        items = self._items(node)
        if items is not None:
            yield ARRAY, items
        contains = self._contains(node)
        if contains is not None:
            yield ARRAY, contains
        if keywords.get("uniqueItems") is True:
            yield ARRAY, Unique(node.at("uniqueItems"))

    def _own_negated(self, node: Node) -> Iterable[Expansion]:
        """One expansion for each keyword that may be violated."""
        keywords = node.keywords
        if "type" in keywords:
            yield _negated_type(_listed(keywords["type"]), node.at("type"))
        for keyword, values in _enums(node):
            literals = _by_type(keyword, values, node.at(keyword), negative=True)
            parts: dict[int, Alternatives] = dict.fromkeys(TYPES, _EVERY)
            for t, literal in literals.items():
                parts[t] = _NEVER if t == NULL else [(literal,)]
            yield _only(parts)
        for keyword, value, name in _scalars(node):
            t = NUMBER if name in _NUMBERS else STRING
            pointer = node.at(keyword)
            if name in _OPPOSITE:
                yield _only({t: [(Literal(_OPPOSITE[name], value, pointer),)]})
            elif name not in ("minLength", "maxLength"):
                yield _only({t: [(Literal(name, value, pointer, negated=True),)]})
        for keyword, (opposite, t) in _LEAST.items():
            if keyword in keywords and keywords[keyword] >= 1:
                literal = Literal(opposite, keywords[keyword] - 1, node.at(keyword))
                yield _only({t: [(literal,)]})
        for keyword, (opposite, t) in _MOST.items():
            if keyword in keywords:
                literal = Literal(opposite, keywords[keyword] + 1, node.at(keyword))
                yield _only({t: [(literal,)]})
        yield _only({OBJECT: list(self._objects_negated(node))})
        yield _only({ARRAY: list(self._arrays_negated(node))})

    def _objects_negated(self, node: Node) -> Iterable[Conjunction]:
        keywords = node.keywords
        for name in dict.fromkeys(keywords.get("required", ())):
            yield (Absent(node.at("required"), name),)
        if any(keyword in keywords for keyword in _MEMBERS):
            members = self._members(node)
            for name, atom in members.named.items():
                if atom is not None and not self._trivial(atom):
                    yield (Required(node.at("properties"), (name,), negated(atom)),)
            for pattern, atom in members.patterns.items():
                if atom is not None and not self._trivial(atom):
                    at = node.at("patternProperties")
                    yield (SomeMember(at, None, pattern, negated(atom)),)
            further = members.further
            if further is not None and not self._trivial(further):
                at = node.at("additionalProperties")
                yield (SomeMember(at, members, None, negated(further)),)
        if "propertyNames" in keywords:
            atom = self.nodes.child(node, "propertyNames")
            yield (SomeMember(node.at("propertyNames"), None, None, None, negated(atom)),)

    def _arrays_negated(self, node: Node) -> Iterable[Conjunction]:
        keywords = node.keywords
        items = self._items(node)
        if items is not None:
            for i, atom in enumerate(items.prefix):
                if atom is not None and not self._trivial(atom):
                    first = (*(None,) * i, negated(atom))
                    least = Literal("minItems", i + 1, items.pointer)
                    yield (Items(items.pointer, first, None), least)
            if items.rest is not None and not self._trivial(items.rest):
                at = items.rest_pointer or items.pointer
                yield (Contains((at,), negated(items.rest), 1, None, len(items.prefix)),)
        contains = self._contains(node)
        if contains is not None:
            if contains.low > 0:
                yield (Contains(contains.pointers, contains.atom, 0, contains.low - 1),)
            if contains.high is not None:
                yield (Contains(contains.pointers, contains.atom, contains.high + 1, None),)
        if keywords.get("uniqueItems") is True:
            yield (Unique(node.at("uniqueItems"), negated=True),)

    def _trivial(self, atom: Atom) -> bool:
        return not atom & 1 and self.nodes.of(atom).trivial

    def _members(self, node: Node) -> Members:
        keywords, child = node.keywords, self.nodes.child
        named = {name: child(node, "properties", name) for name in keywords.get("properties", ())}
        patterns = {
            pattern: child(node, "patternProperties", pattern)
            for pattern in keywords.get("patternProperties", ())
        }
        further = None
        if "additionalProperties" in keywords:
            further = child(node, "additionalProperties")
        closed = keywords.get("additionalProperties") is False
        return Members(node.pointer, named, patterns, further, closed)

    def _items(self, node: Node) -> Items | None:
        keywords, child = node.keywords, self.nodes.child
        if not any(keyword in keywords for keyword in _ITEMS):
            return None
        first = "prefixItems" if "prefixItems" in self.nodes.known else "items"
        rest = "items" if first == "prefixItems" else "additionalItems"
        prefix: tuple[Atom | None, ...] = ()
        if isinstance(keywords.get(first), list):
            prefix = tuple(child(node, first, i) for i in range(len(keywords[first])))
        elif first in keywords:
            return Items(node.at(first), (), child(node, first))
        elif rest == "additionalItems":  # says nothing without items
            return None
        after = child(node, rest) if rest in keywords else None
        pointer = node.at(first if first in keywords else rest)
        return Items(pointer, prefix, after, node.at(rest) if rest in keywords else "")

    def _contains(self, node: Node) -> Contains | None:
        keywords = node.keywords
        if "contains" not in keywords:
            return None
        low, high = keywords.get("minContains", 1), keywords.get("maxContains")
        if low <= 0 and high is None:
            return None
        used = [k for k in ("contains", "minContains", "maxContains") if k in keywords]
        pointers = tuple(node.at(keyword) for keyword in used)
        return Contains(pointers, self.nodes.child(node, "contains"), low, high)

    def _note_required(self, node: Node) -> None:
        named = node.keywords.get("properties", {})
        if any(name not in named for name in node.keywords["required"]):
            self.note(node.at("required"), "required names added as properties")

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
        return self._any(parts)

    def _one_of(self, node: Node, keyword: str, negative: bool) -> Steps:
        atoms = self._branches(node, keyword)
        branches = []
        for atom in atoms:
            branches.append((yield from self._of(atom)))
        overlaps = self._overlaps(branches, node.at(keyword))
        if negative:
            none = yield from self._every([negated(atom) for atom in atoms], node.at(keyword))
            parts = [none]
            parts += [
                self._both(branches[i], branches[j], node.at(keyword)) for i, j in sorted(overlaps)
            ]
            return self._any(parts)
        parts = []
        for i in range(len(atoms)):
            part = branches[i]
            for j in range(len(atoms)):
                if (min(i, j), max(i, j)) in overlaps and i != j:
                    excluded = yield from self._of(negated(atoms[j]))
                    part = self._both(part, excluded, node.at(keyword))
            parts.append(part)
        if len(atoms) > 1:
            what = "overlaps of its branches excluded" if overlaps else "branches are disjoint"
            self.note(node.at(keyword), f"oneOf: {what}")
        return self._any(parts)

    def _overlaps(self, branches: Sequence[Expansion], pointer: str) -> set[tuple[int, int]]:
        """Pairs of branches that are not provably disjoint."""
        overlaps: set[tuple[int, int]] = set()
        for t in TYPES:
            present = [i for i, branch in enumerate(branches) if branch[t]]
            if _distinct_values([branches[i][t] for i in present]):
                continue
            for i, j in combinations(present, 2):
                if (i, j) in overlaps:
                    continue
                if self._spent(1):
                    self.drop(pointer, TOO_MANY)
                    return overlaps
                if not self._disjoint(t, branches[i][t], branches[j][t]):
                    overlaps.add((i, j))
        return overlaps

    def _disjoint(self, t: int, left: Alternatives, right: Alternatives) -> bool:
        return all(contradictory(self.nodes, t, (*a, *b)) for a in left for b in right)

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
            parts.append(self._both(tested, then, node.at(keyword)))
        if "then" in node.keywords or "else" in node.keywords:
            self.note(node.at(keyword), "if, then and else as alternatives")
        elif not self._tracked:
            return FALSE if negative else TRUE
        return self._any(parts)

    def _reference(self, node: Node, keyword: str, negative: bool) -> Steps:
        if keyword != "$ref" and self.nodes.places.embedded:
            self.drop(node.at(keyword), "its target depends on how the place is reached")
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
                (Required(pointer, (name,)), Absent(pointer, other))
                for name, others in wanted.items()
                for other in others
            ]
            return _only({OBJECT: broken})
        kept = _EVERY
        for name, others in wanted.items():
            choice: Alternatives = [
                (Absent(pointer, name),),
                (Required(pointer, (name, *(o for o in dict.fromkeys(others) if o != name))),),
            ]
            kept = self._product(OBJECT, kept, choice, pointer)
        return _only({**dict.fromkeys(TYPES, _EVERY), OBJECT: kept})
        yield  # a generator like the others

    def _dependent_schemas(self, node: Node, keyword: str, negative: bool) -> Steps:
        pointer = node.at(keyword)
        schemas = {k: v for k, v in node.keywords[keyword].items() if not isinstance(v, list)}
        self.note(pointer, "dependencies as alternatives")
        kept: Alternatives = _NEVER if negative else _EVERY
        for name in schemas:
            atom = self.nodes.child(node, keyword, name)
            part = (yield from self._of(negated(atom) if negative else atom))[OBJECT]
            there: Alternatives = [(Required(pointer, (name,)),)]
            applied = self._product(OBJECT, there, part, pointer)
            if negative:
                kept = _united(OBJECT, [kept, applied])
            else:
                choice = [(Absent(pointer, name),), *applied]
                kept = self._product(OBJECT, kept, choice, pointer)
        others = _NEVER if negative else _EVERY
        return _only({**dict.fromkeys(TYPES, others), OBJECT: kept})

    def _dependencies(self, node: Node, keyword: str, negative: bool) -> Steps:
        names = yield from self._dependent_required(node, keyword, negative)
        schemas = yield from self._dependent_schemas(node, keyword, negative)
        if negative:
            return self._any([names, schemas])
        return self._both(names, schemas, node.at(keyword))

    def _branches(self, node: Node, keyword: str) -> list[Atom]:
        return [self.nodes.child(node, keyword, i) for i in range(len(node.keywords[keyword]))]

    # Combining

    def _every(self, atoms: Iterable[Atom], pointer: str) -> Steps:
        whole: Expansion = TRUE
        for atom in atoms:
            part = yield from self._of(atom)
            whole = self._both(whole, part, pointer)
        return whole

    def _some(self, atoms: Iterable[Atom], flip: bool = False) -> Steps:
        parts = []
        for atom in atoms:
            parts.append((yield from self._of(negated(atom) if flip else atom)))
        return self._any(parts)

    def _any(self, parts: Sequence[Expansion]) -> Expansion:
        if len(parts) == 1:
            return parts[0]
        keep = self._tracked
        return tuple(_united(t, [part[t] for part in parts], keep) for t in TYPES)

    def _both(self, left: Expansion, right: Expansion, pointer: str) -> Expansion:
        if left is TRUE:
            return right
        if right is TRUE:
            return left
        return tuple(self._product(t, left[t], right[t], pointer) for t in TYPES)

    def _product(
        self, t: int, left: Alternatives, right: Alternatives, pointer: str
    ) -> Alternatives:
        if not left or not right:
            return _NEVER
        if left == _EVERY:
            return right
        if right == _EVERY:
            return left
        if len(left) == len(right) == 1:
            return [_merged(left[0], right[0])]
        size = len(left) * len(right)
        if self._spent(size):
            return self._without(left, right, pointer)
        merged = [_merged(a, b) for a in left for b in right]
        if size > 1:
            merged = [one for one in merged if not contradictory(self.nodes, t, one)]
        found = _united(t, [merged], self._tracked)
        if len(found) > MAX_ALTERNATIVES and len(found) > max(len(left), len(right)):
            return self._without(left, right, pointer)
        return found

    def _without(self, left: Alternatives, right: Alternatives, pointer: str) -> Alternatives:
        """The product with only what all alternatives of the smaller side have in common."""
        self.drop(pointer, TOO_MANY)
        more, fewer = (left, right) if len(left) >= len(right) else (right, left)
        if len(more) > MAX_ALTERNATIVES:
            more = [_common(more)]
        shared = _common(fewer)
        return [_merged(one, shared) for one in more]

    def _spent(self, steps: int) -> bool:
        """Whether the work for this schema is used up."""
        self._steps += steps
        if self._steps % 64 < steps:
            budget.current().check()
        return self._steps > MAX_STEPS

    # unevaluatedProperties and unevaluatedItems

    def _unevaluated(self, node: Node, whole: Expansion) -> Expansion:
        parts = list(whole)
        for keyword, t in zip(_UNEVALUATED, (OBJECT, ARRAY), strict=True):
            if keyword not in node.keywords:
                continue
            pointer = node.at(keyword)
            if keyword == "unevaluatedItems" or self._lost or _unclear(parts[t]):
                self.drop(pointer, "what is evaluated depends on the value")
                continue
            atom = self.nodes.child(node, keyword)
            closed = node.keywords[keyword] is False
            parts[t] = [(*one, *_rest(one, atom, closed, node.pointer)) for one in parts[t]]
        return tuple(parts)


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


def _unclear(alternatives: Alternatives) -> bool:
    """Whether a constraint may evaluate members without saying which."""
    return any(isinstance(constraint, SomeMember) for one in alternatives for constraint in one)


def _rest(one: Conjunction, atom: Atom, closed: bool, pointer: str) -> Conjunction:
    """The constraint on the members that no constraint of the conjunction speaks of."""
    named: dict[str, Atom | None] = {}
    patterns: dict[str, Atom | None] = {}
    for members in one:
        if isinstance(members, Members):
            if members.further is not None:
                return ()
            named.update(dict.fromkeys(members.named))
            patterns.update(dict.fromkeys(members.patterns))
    return (Members(pointer, named, patterns, atom, closed, "unevaluatedProperties"),)


def _only(parts: dict[int, Alternatives]) -> Expansion:
    """These types have values, others have none."""
    return tuple(parts.get(t, _NEVER) for t in TYPES)


def _listed(types: str | list[str]) -> list[str]:
    return [types] if isinstance(types, str) else types


def _negated_type(allowed: list[str], pointer: str) -> Expansion:
    parts: dict[int, Alternatives] = {t: _EVERY for t in TYPES if TYPE_NAMES[t] not in allowed}
    if "integer" in allowed and "number" not in allowed:
        parts[NUMBER] = [(Literal("type", "integer", pointer, negated=True),)]
    return _only(parts)


def _enums(node: Node) -> Iterable[tuple[str, list[Any]]]:
    if "enum" in node.keywords:
        yield "enum", node.keywords["enum"]
    if "const" in node.keywords:
        yield "const", [node.keywords["const"]]


def _by_type(
    keyword: str, values: list[Any], pointer: str, *, negative: bool
) -> dict[int, Literal]:
    found: dict[int, list[Any]] = {}
    for value in values:
        found.setdefault(type_of(value), []).append(value)
    return {t: Literal("enum", some, pointer, negative) for t, some in found.items()}


def _scalars(node: Node) -> Iterable[tuple[str, Any, str]]:
    """Keyword, value and meaning of the constraints on strings and numbers."""
    keywords = node.keywords
    for keyword in _STRINGS:
        if keyword in keywords:
            yield keyword, keywords[keyword], keyword
    if "format" in keywords and keywords["format"] in FORMATS:
        yield "format", keywords["format"], "format"
    for keyword in _NUMBERS:
        value = keywords.get(keyword)
        if value is None or isinstance(value, bool):
            continue
        strict = "exclusive" + keyword[0].upper() + keyword[1:]
        yield keyword, value, strict if keywords.get(strict) is True else keyword


def _merged(left: Conjunction, right: Conjunction) -> Conjunction:
    if not left or not right:
        return left or right
    return left + tuple(constraint for constraint in right if constraint not in left)


def _common(alternatives: Alternatives) -> Conjunction:
    first, *others = alternatives
    sets = [set(one) for one in others]
    return tuple(constraint for constraint in first if all(constraint in s for s in sets))


def _united(t: int, parts: Sequence[Alternatives], keep: bool = False) -> Alternatives:
    """Any of the parts, without repeats, with values in one list. keep: without absorbing."""
    found = dict.fromkeys(one for part in parts for one in part)
    if len(found) <= 1:
        return list(found)
    if () in found and not keep:
        return _EVERY
    values = [one[0] for one in found if len(one) == 1 and _is_enum(one[0])]
    if len(values) > 1:
        everything: dict[Any, Any] = {}
        for literal in values:
            assert isinstance(literal, Literal)
            for value in literal.value:
                everything.setdefault((type(value), frozen(value)), value)
        joined = Literal("enum", list(everything.values()))
        rest = [one for one in found if not (len(one) == 1 and _is_enum(one[0]))]
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


MAX_ABSORBED = 48
"""Alternatives that are compared with each other for one that holds another."""


def _is_enum(constraint: Constraint) -> bool:
    return (
        isinstance(constraint, Literal) and constraint.keyword == "enum" and not constraint.negated
    )


def _distinct_values(parts: Sequence[Alternatives]) -> bool:
    """Whether all are lists of values, and no value is in two of them."""
    seen: set[Any] = set()
    for part in parts:
        for one in part:
            first = next((c for c in one if _is_enum(c)), None)
            if first is None:
                return False
            assert isinstance(first, Literal)
            values = {frozen(value) for value in first.value}
            if not seen.isdisjoint(values):
                return False
            seen |= values
    return True
