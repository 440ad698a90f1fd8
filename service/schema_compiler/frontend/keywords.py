"""The table of the keywords of JSON Schema: which values each can have, and where its subschemas apply.

It covers all drafts. What a keyword means for a value is decided elsewhere: validation in ``drafts``, the
grammar in ``normalize``. ``drafts`` has the differences between drafts.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class Form(enum.Enum):
    """The values that a keyword can have."""

    ANY = enum.auto()
    TEXT = enum.auto()
    FLAG = enum.auto()
    NUMBER = enum.auto()
    POSITIVE = enum.auto()
    COUNT = enum.auto()
    LIST = enum.auto()
    IDENTIFIER = enum.auto()
    ANCHOR = enum.auto()
    TYPES = enum.auto()
    """A name of a type, or a list of them."""
    VALUES = enum.auto()
    """A list of values, one of which a value must be."""
    NAMES = enum.auto()
    """A list of names of properties."""
    NAMES_BY_NAME = enum.auto()
    BOUND = enum.auto()
    """A number, or in draft-04 a flag."""
    REFERENCE = enum.auto()
    SCHEMA = enum.auto()
    SCHEMAS = enum.auto()
    """A list of schemas."""
    SCHEMA_OR_SCHEMAS = enum.auto()
    SCHEMA_BY_NAME = enum.auto()
    SCHEMA_OR_NAMES_BY_NAME = enum.auto()


class Applies(enum.Enum):
    """To what the subschemas of a keyword apply."""

    SAME_VALUE = enum.auto()
    PARTS = enum.auto()
    """To properties, names of properties, or items."""
    BY_REFERENCE = enum.auto()
    """To nothing, unless something refers to them."""


@dataclass(frozen=True, slots=True)
class Keyword:
    """A row of the table. applies: None where the keyword has no subschemas. rank: position in it."""

    name: str
    form: Form
    applies: Applies | None = None
    rank: int = 0


def _rows() -> Iterator[tuple[str, Form, Applies | None]]:
    same, parts, stored = Applies.SAME_VALUE, Applies.PARTS, Applies.BY_REFERENCE
    # Keywords with subschemas come first, in the order in which the subschemas are visited.
    for name in ("not", "if", "then", "else"):
        yield name, Form.SCHEMA, same
    for name in ("additionalProperties", "additionalItems"):
        yield name, Form.SCHEMA, parts
    yield "items", Form.SCHEMA_OR_SCHEMAS, parts
    for name in ("contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties"):
        yield name, Form.SCHEMA, parts
    yield "contentSchema", Form.SCHEMA, stored
    for name in ("allOf", "anyOf", "oneOf"):
        yield name, Form.SCHEMAS, same
    yield "prefixItems", Form.SCHEMAS, parts
    for name in ("properties", "patternProperties"):
        yield name, Form.SCHEMA_BY_NAME, parts
    for name in ("$defs", "definitions"):
        yield name, Form.SCHEMA_BY_NAME, stored
    yield "dependentSchemas", Form.SCHEMA_BY_NAME, same
    yield "dependencies", Form.SCHEMA_OR_NAMES_BY_NAME, same
    for name in ("$ref", "$dynamicRef", "$recursiveRef"):
        yield name, Form.REFERENCE, None
    yield "type", Form.TYPES, None
    yield "enum", Form.VALUES, None
    yield "const", Form.ANY, None
    yield "required", Form.NAMES, None
    yield "dependentRequired", Form.NAMES_BY_NAME, None
    for name in ("minimum", "maximum"):
        yield name, Form.NUMBER, None
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        yield name, Form.BOUND, None
    yield "multipleOf", Form.POSITIVE, None
    for name in ("minLength", "maxLength", "minItems", "maxItems"):
        yield name, Form.COUNT, None
    for name in ("minProperties", "maxProperties", "minContains", "maxContains"):
        yield name, Form.COUNT, None
    yield "uniqueItems", Form.FLAG, None
    for name in ("pattern", "format"):
        yield name, Form.TEXT, None
    for name in ("readOnly", "writeOnly", "deprecated"):
        yield name, Form.FLAG, None
    for name in ("title", "description", "$comment", "$schema", "id"):
        yield name, Form.TEXT, None
    for name in ("contentEncoding", "contentMediaType"):
        yield name, Form.TEXT, None
    yield "examples", Form.LIST, None
    yield "default", Form.ANY, None
    yield "$id", Form.IDENTIFIER, None
    yield "$anchor", Form.ANCHOR, None


KEYWORDS: dict[str, Keyword] = {
    name: Keyword(name, form, applies, rank) for rank, (name, form, applies) in enumerate(_rows())
}
"""By name."""


def with_form(*forms: Form) -> frozenset[str]:
    """The names of the keywords that can have such values."""
    return frozenset(name for name, keyword in KEYWORDS.items() if keyword.form in forms)


REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
COUNTS = with_form(Form.COUNT)
BY_NAME = with_form(Form.SCHEMA_BY_NAME, Form.SCHEMA_OR_NAMES_BY_NAME)
"""Keywords with a subschema for each of several names."""

Child = tuple[str, tuple[str | int, ...], Any]
"""Keyword, path and value of a subschema."""


def children(schema: dict[str, Any]) -> list[Child]:
    """The subschemas of a schema that are objects, in the order of the table. A superset over the
    drafts: which keywords count is up to the draft."""
    found: list[tuple[int, Child]] = []
    for name, value in schema.items():
        keyword = KEYWORDS.get(name)
        if keyword is None or keyword.applies is None:
            continue
        rank = keyword.rank
        if isinstance(value, dict):
            if keyword.form in _SINGLE:
                found.append((rank, (name, (name,), value)))
            elif keyword.form is not Form.SCHEMAS:
                found += [
                    (rank, (name, (name, key), one))
                    for key, one in value.items()
                    if isinstance(one, dict)
                ]
        elif isinstance(value, list) and keyword.form in _LISTS:
            found += [
                (rank, (name, (name, i), one))
                for i, one in enumerate(value)
                if isinstance(one, dict)
            ]
    if len(found) > 1:
        found.sort(key=lambda one: one[0])
    return [child for _, child in found]


_SINGLE = (Form.SCHEMA, Form.SCHEMA_OR_SCHEMAS)
_LISTS = (Form.SCHEMAS, Form.SCHEMA_OR_SCHEMAS)
