"""The keywords of one subschema that speak of parts of a value, as constraints by type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from service.schema_compiler.frontend.formats import FORMATS
from service.schema_compiler.normalize.alternatives import EVERY, NEVER, Expansion
from service.schema_compiler.normalize.constraints import (
    Alternatives,
    Conjunction,
    Constraint,
    Contains,
    Forbidden,
    Items,
    Literal,
    Properties,
    PropertyNames,
    Required,
    SomeProperty,
    Unique,
)
from service.schema_compiler.normalize.nodes import (
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
    negated,
    type_of,
)

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
MEMBERS = ("properties", "patternProperties", "additionalProperties")
_ITEMS = ("prefixItems", "items", "additionalItems")
READ = frozenset((
    *MEMBERS, *_ITEMS, *_STRINGS, *_NUMBERS, *_LEAST, *_MOST, "type", "enum", "const", "format", "required",
    "propertyNames", "contains", "minContains", "maxContains", "uniqueItems",
))  # fmt: skip
"""Keywords that become constraints here."""


class Reader:
    """Reads the keywords of nodes. note: called with a pointer and what was rewritten there."""

    def __init__(self, nodes: Nodes, note: Callable[[str, str], None]) -> None:
        self.nodes = nodes
        self._note = note

    def satisfied(self, node: Node) -> tuple[list[list[Constraint]], int]:
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
        if any(keyword in keywords for keyword in MEMBERS):
            yield OBJECT, self._members(node)
        if keywords.get("required"):
            yield OBJECT, Required(node.at("required"), tuple(dict.fromkeys(keywords["required"])))
            self._note_required(node)
        if "propertyNames" in keywords:
            yield (
                OBJECT,
                PropertyNames(node.at("propertyNames"), self.nodes.child(node, "propertyNames")),
            )
        items = self._items(node)
        if items is not None:
            yield ARRAY, items
        contains = self._contains(node)
        if contains is not None:
            yield ARRAY, contains
        if keywords.get("uniqueItems") is True:
            yield ARRAY, Unique(node.at("uniqueItems"))

    def violated(self, node: Node) -> Iterable[Expansion]:
        """One expansion for each keyword that may be violated."""
        keywords = node.keywords
        if "type" in keywords:
            yield _negated_type(_listed(keywords["type"]), node.at("type"))
        for keyword, values in _enums(node):
            literals = _by_type(keyword, values, node.at(keyword), negative=True)
            parts: dict[int, Alternatives] = dict.fromkeys(TYPES, EVERY)
            for t, literal in literals.items():
                parts[t] = NEVER if t == NULL else [(literal,)]
            yield only(parts)
        for keyword, value, name in _scalars(node):
            t = NUMBER if name in _NUMBERS else STRING
            pointer = node.at(keyword)
            if name in _OPPOSITE:
                yield only({t: [(Literal(_OPPOSITE[name], value, pointer),)]})
            elif name not in ("minLength", "maxLength"):
                yield only({t: [(Literal(name, value, pointer, negated=True),)]})
        for keyword, (opposite, t) in _LEAST.items():
            if keyword in keywords and keywords[keyword] >= 1:
                literal = Literal(opposite, keywords[keyword] - 1, node.at(keyword))
                yield only({t: [(literal,)]})
        for keyword, (opposite, t) in _MOST.items():
            if keyword in keywords:
                literal = Literal(opposite, keywords[keyword] + 1, node.at(keyword))
                yield only({t: [(literal,)]})
        yield only({OBJECT: list(self._objects_negated(node))})
        yield only({ARRAY: list(self._arrays_negated(node))})

    def _objects_negated(self, node: Node) -> Iterable[Conjunction]:
        keywords = node.keywords
        members = self._members(node) if any(one in keywords for one in MEMBERS) else None
        declared = {} if members is None else members.declared
        required = dict.fromkeys(keywords.get("required", ()))
        wrong = {
            name: negated(atom)
            for name, atom in declared.items()
            if atom is not None and not self._trivial(atom)
        }
        for name in required:
            if name in wrong:  # absent or wrong: one constraint in place of two alternatives
                one = {name: wrong[name]}
                yield (Properties(node.pointer, one, {}, None, closed=False, evaluates=False),)
            else:
                yield (Forbidden(node.at("required"), name),)
        if members is not None:
            for name, refused in wrong.items():
                if name not in required:
                    yield (Required(node.at("properties"), (name,), refused),)
            for pattern, atom in members.patterns.items():
                if atom is not None and not self._trivial(atom):
                    at = node.at("patternProperties")
                    yield (SomeProperty(at, None, pattern, self._refused(atom)),)
            additional = members.additional
            if additional is not None and not self._trivial(additional):
                at = node.at("additionalProperties")
                yield (SomeProperty(at, members, None, self._refused(additional)),)
        if "propertyNames" in keywords:
            atom = self.nodes.child(node, "propertyNames")
            yield (SomeProperty(node.at("propertyNames"), None, None, None, negated(atom)),)

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

    def _refused(self, atom: Atom) -> Atom | None:
        """What a value satisfies that does not satisfy an atom; None where every value does."""
        is_never = not atom & 1 and self.nodes.of(atom).schema is False
        return None if is_never else negated(atom)

    def _trivial(self, atom: Atom) -> bool:
        return not atom & 1 and self.nodes.of(atom).trivial

    def _members(self, node: Node) -> Properties:
        keywords, child = node.keywords, self.nodes.child
        named = {name: child(node, "properties", name) for name in keywords.get("properties", ())}
        patterns = {
            pattern: child(node, "patternProperties", pattern)
            for pattern in keywords.get("patternProperties", ())
        }
        additional = None
        if "additionalProperties" in keywords:
            additional = child(node, "additionalProperties")
        closed = keywords.get("additionalProperties") is False
        return Properties(node.pointer, named, patterns, additional, closed)

    def _items(self, node: Node) -> Items | None:
        keywords, child = node.keywords, self.nodes.child
        if not any(keyword in keywords for keyword in _ITEMS):
            return None
        listed = isinstance(keywords.get("items"), list)
        first, rest = ("items", "additionalItems") if listed else ("prefixItems", "items")
        prefix: tuple[Atom | None, ...] = ()
        if first in keywords:
            prefix = tuple(child(node, first, i) for i in range(len(keywords[first])))
        elif rest in keywords:
            return Items(node.at(rest), (), child(node, rest))
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
            self._note(node.at("required"), "required names added as properties")


def only(parts: dict[int, Alternatives]) -> Expansion:
    """These types have values, others have none."""
    return tuple(parts.get(t, NEVER) for t in TYPES)


def _listed(types: str | list[str]) -> list[str]:
    return [types] if isinstance(types, str) else types


def _negated_type(allowed: list[str], pointer: str) -> Expansion:
    parts: dict[int, Alternatives] = {t: EVERY for t in TYPES if TYPE_NAMES[t] not in allowed}
    if "integer" in allowed and "number" not in allowed:
        parts[NUMBER] = [(Literal("type", "integer", pointer, negated=True),)]
    return only(parts)


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
