"""Subschemas as nodes: what a draft makes of each keyword, with the differences of drafts removed.

An *atom* is a node that a value has to satisfy, or has to violate: the number of the node times two,
plus one where it is violated. A *state* is a set of atoms that all hold for one value.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final

from service.schema_compiler.frontend.checked_schema import CheckedSchema
from service.schema_compiler.frontend.drafts import Draft, frozen
from service.schema_compiler.frontend.keywords import COUNTS
from service.schema_compiler.jsontext import pointer as pointer_of

Atom = int
State = frozenset[Atom]
ANY: Final[State] = frozenset()
"""Every JSON value."""

NULL, BOOLEAN, NUMBER, STRING, ARRAY, OBJECT = TYPES = range(6)
TYPE_NAMES = ("null", "boolean", "number", "string", "array", "object")
ALL_TYPES = (1 << len(TYPES)) - 1
_MAX_HOPS = 8
"""References and parts of ``allOf`` that a summary looks through."""


def type_of(value: Any) -> int:
    """The type of a JSON value, one of ``TYPES``."""
    if value is None:
        return NULL
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, (int, Decimal)):
        return NUMBER
    if isinstance(value, str):
        return STRING
    return ARRAY if isinstance(value, list) else OBJECT


def negated(atom: Atom) -> Atom:
    """The opposite."""
    return atom ^ 1


class Node:
    """A subschema at its place. keywords: those that assert something in the draft."""

    __slots__ = ("index", "keywords", "pointer", "schema", "trivial")

    def __init__(self, index: int, schema: Any, pointer: str, keywords: dict[str, Any]) -> None:
        self.index = index
        self.schema = schema
        self.pointer = pointer
        self.keywords = keywords
        self.trivial = schema is not False and not keywords

    @property
    def atom(self) -> Atom:
        """That a value satisfies it."""
        return self.index * 2

    def at(self, keyword: str) -> str:
        """The pointer of one of its keywords."""
        return f"{self.pointer}/{keyword}"


class Summary:
    """What can be said of the values of an atom at a glance, safely: types, and values if few."""

    __slots__ = ("excluded", "types", "values")

    def __init__(
        self,
        types: int = ALL_TYPES,
        values: frozenset[Any] | None = None,
        excluded: frozenset[Any] = frozenset(),
    ) -> None:
        self.types = types
        self.values = values
        self.excluded = excluded

    def __and__(self, other: Summary) -> Summary:
        values = self.values if other.values is None else other.values
        if self.values is not None and other.values is not None:
            values = self.values & other.values
        return Summary(self.types & other.types, values, self.excluded | other.excluded)

    def excludes(self, other: Summary) -> bool:
        """Whether there is surely no value of both; neither is empty."""
        if self.values is None and other.values is None:
            return not self.types & other.types
        return (self & other).empty

    @property
    def empty(self) -> bool:
        """Whether there is surely no value."""
        if not self.types:
            return True
        if self.values is None:
            return False
        return not any(self.types >> _frozen_type(v) & 1 for v in self.values - self.excluded)


EVERYTHING = Summary()


def _frozen_type(value: Any) -> int:
    if isinstance(value, tuple):
        return {"boolean": BOOLEAN, "object": OBJECT, "array": ARRAY}[value[0]]
    return type_of(value)


class Nodes:
    """The nodes of one schema, made as they are asked for."""

    def __init__(self, compiled: CheckedSchema, text: str) -> None:
        """text: the schema as sent."""
        self.text = text
        self.subschemas = compiled.subschemas
        self.draft: Draft = compiled.draft
        self.validator = compiled.validator
        self._nodes: list[Node] = []
        self._by_id: dict[int, Node] = {}
        self._booleans: dict[str, Node] = {}
        self._meanings: dict[int, dict[str, Any]] = {}
        self._summaries: dict[Atom, Summary] = {}
        self.impossible: dict[State, bool] = {}
        """Whether atoms exclude each other, as far as that was asked."""

    def __getitem__(self, index: int) -> Node:
        return self._nodes[index]

    def uses(self, keywords: tuple[str, ...]) -> bool:
        """Whether one of the keywords stands anywhere in the schema, at least as a name."""
        return any(f'"{keyword}"' in self.text for keyword in keywords)

    def of(self, atom: Atom) -> Node:
        """The node of an atom."""
        return self._nodes[atom >> 1]

    def name(self, atom: Atom) -> str:
        """The pointer of the subschema of an atom, as a JSON reference; with ``not`` before it where a
        value violates it."""
        return ("not " if atom & 1 else "") + f"#{self.of(atom).pointer}"

    def node(self, schema: Any, pointer: str) -> Node:
        """The node of a subschema. pointer: of this mention of it."""
        if isinstance(schema, bool):
            found = self._booleans.get(pointer)
            if found is None:
                found = self._booleans[pointer] = self._add(schema, pointer, {})
            return found
        found = self._by_id.get(id(schema))
        if found is None:
            pointer = self.subschemas.pointers.get(id(schema), pointer)
            found = self._by_id[id(schema)] = self._add(schema, pointer, self.meaning(schema))
        return found

    def child(self, node: Node, *path: str | int) -> Atom:
        """The atom of the subschema below a node."""
        schema = node.schema
        for step in path:
            schema = schema[step]
        return self.node(schema, node.pointer + pointer_of(path)).atom

    def target(self, node: Node, keyword: str) -> Atom:
        """The atom of what a reference stands for."""
        return self.node(self.subschemas.targets[id(node.schema), keyword], node.at(keyword)).atom

    def meaning(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a subschema that assert something where they stand."""
        known = self._meanings.get(id(schema))
        if known is not None:
            return known
        found = self._meanings[id(schema)] = self.draft.meaning(schema)
        for keyword in COUNTS & found.keys():
            if isinstance(found[keyword], Decimal):  # 2.0 is an integer, too
                found[keyword] = int(found[keyword])
        return found

    def reduced(self, atoms: Iterator[Atom] | tuple[Atom, ...] | list[Atom]) -> State:
        """The state of atoms, without those that say nothing."""
        return frozenset([a for a in atoms if a & 1 or not self._nodes[a >> 1].trivial])

    def canonical(self, state: State) -> State:
        """The state with each reference that stands alone replaced by its target: states that describe
        the same values through different references are then equal."""
        return self.reduced([self._target_of_reference(atom) for atom in state])

    def _target_of_reference(self, atom: Atom) -> Atom:
        node = self.of(atom)
        while "$ref" in node.keywords and len(node.keywords) == 1:
            atom = self.target(node, "$ref") | atom & 1
            node = self.of(atom)
        return atom

    def valid(self, node: Node, value: Any) -> bool:
        """Whether a value satisfies a node, by the validator that has the last word."""
        if isinstance(node.schema, bool):
            return node.schema
        resolver = self.subschemas.resolvers[id(node.schema)]
        validator = self.validator.evolve(schema=node.schema, _resolver=resolver)
        return bool(validator.is_valid(value))

    def summary(self, atom: Atom, hops: int = _MAX_HOPS) -> Summary:
        """A safe over-estimate of the values of an atom."""
        found = self._summaries.get(atom)
        if found is None:
            found = self._negative(atom) if atom & 1 else self._positive(atom, hops)
            if hops == _MAX_HOPS:
                self._summaries[atom] = found
        return found

    def _positive(self, atom: Atom, hops: int) -> Summary:
        node = self.of(atom)
        if node.schema is False:
            return Summary(types=0)
        summary = Summary()
        keywords = node.keywords
        if "type" in keywords:
            summary &= Summary(types=_mask(keywords["type"]))
        if "enum" in keywords:
            summary &= Summary(values=frozenset(map(frozen, keywords["enum"])))
        if "const" in keywords:
            summary &= Summary(values=frozenset((frozen(keywords["const"]),)))
        if hops:
            if "$ref" in keywords:
                summary &= self.summary(self.target(node, "$ref"), hops - 1)
            parts = keywords.get("allOf", ())
            for i in range(min(len(parts), _MAX_HOPS)):
                summary &= self.summary(self.child(node, "allOf", i), hops // 2)
        return summary

    def _negative(self, atom: Atom) -> Summary:
        node = self.of(atom)
        if node.trivial:
            return Summary(types=0)
        keywords = dict(node.keywords)
        values = keywords.pop("enum", None)
        if values is None and "const" in keywords:
            values = [keywords.pop("const")]
        types = keywords.pop("type", None)
        if keywords or (values is None and types is None):
            return Summary()
        if values is None:
            names = (types,) if isinstance(types, str) else types
            return Summary(types=ALL_TYPES & ~_mask([n for n in names if n != "integer"]))
        if types is not None:
            mask = _mask(types, whole=False)
            values = [value for value in values if mask >> type_of(value) & 1]
        return Summary(excluded=frozenset(map(frozen, values)))

    def _add(self, schema: Any, pointer: str, keywords: dict[str, Any]) -> Node:
        node = Node(len(self._nodes), schema, pointer, keywords)
        self._nodes.append(node)
        return node


def _mask(types: str | list[str], whole: bool = True) -> int:
    """The types as bits. whole: integers stand for numbers."""
    mask = 0
    for name in (types,) if isinstance(types, str) else types:
        if name != "integer":
            mask |= 1 << TYPE_NAMES.index(name)
        elif whole:
            mask |= 1 << NUMBER
    return mask
