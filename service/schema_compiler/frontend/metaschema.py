"""Schemas that are plainly valid by the metaschema of their draft, seen without validating.

A validator takes most of the time of an analysis to find that nothing is wrong, which it is for
almost all schemas. What is unusual is left to it, and so is what is wrong: it knows the words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

_TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))
_ANCHOR = re.compile(r"[A-Za-z_][-A-Za-z0-9._]*")
_OLD = ("draft-04", "draft-06")
"""Whose ``enum`` is never empty."""


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _names(value: Any) -> bool:
    """Different texts, at least one."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(map(_text, value))
        and len(set(value)) == len(value)
    )


def _type(value: Any) -> bool:
    return value in _TYPES if isinstance(value, str) else _names(value) and _TYPES.issuperset(value)


def _identifier(value: Any) -> bool:
    return isinstance(value, str) and "#" not in value


_PLAIN: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("title", "description", "$comment", "format", "pattern"), _text),
    **dict.fromkeys(("$ref", "$schema", "id", "contentEncoding", "contentMediaType"), _text),
    **dict.fromkeys(("uniqueItems", "readOnly", "writeOnly", "deprecated"), _flag),
    **dict.fromkeys(("minimum", "maximum"), _number),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _size),
    **dict.fromkeys(("minProperties", "maxProperties", "minContains", "maxContains"), _size),
    "multipleOf": lambda value: _number(value) and value > 0,
    "required": _names,
    "type": _type,
    "examples": lambda value: isinstance(value, list),
    "$id": _identifier,
    "$anchor": lambda value: isinstance(value, str) and bool(_ANCHOR.fullmatch(value)),
    "const": lambda value: True,
    "default": lambda value: True,
    "dependentRequired": lambda value: isinstance(value, dict) and all(map(_names, value.values())),
}
_ONE = frozenset((
    "not", "if", "then", "else", "additionalProperties", "additionalItems", "contains",
    "propertyNames", "unevaluatedItems", "unevaluatedProperties", "contentSchema",
))  # fmt: skip
_EXCLUSIVE = ("exclusiveMinimum", "exclusiveMaximum")
_MANY = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_REFERENCES = frozenset(("$ref", "$dynamicRef", "$recursiveRef"))
_UNUSUAL = frozenset((
    "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary",
))  # fmt: skip


def plainly_valid(document: Any, draft: str, *, older_forms: bool = False) -> bool:
    """Whether a document is surely valid. draft: its name. older_forms: lists as ``items`` and booleans
    as exclusive bounds are allowed, too."""
    pending: list[Any] = [document]
    while pending:
        schema = pending.pop()
        if isinstance(schema, bool) and draft != "draft-04":
            continue
        if not isinstance(schema, dict):
            return False
        for keyword, value in schema.items():
            if older_forms and keyword == "items" and isinstance(value, list) and value:
                pending += value
            elif older_forms and keyword in _EXCLUSIVE and isinstance(value, bool):
                continue
            elif not _plain(keyword, value, schema, draft, pending):
                return False
    return True


def _plain(
    keyword: str, value: Any, schema: dict[str, Any], draft: str, pending: list[Any]
) -> bool:
    """Whether one keyword is; what has still to be looked at is added to ``pending``."""
    check = _PLAIN.get(keyword)
    if check is not None:
        return check(value)
    if keyword in _MAPS:
        if isinstance(value, dict):
            pending += value.values()
        return isinstance(value, dict)
    if keyword in _ONE or (keyword == "items" and not isinstance(value, list)):
        if not (draft == "draft-04" and isinstance(value, bool) and keyword.startswith("add")):
            pending.append(value)
        return True
    if keyword in _MANY or keyword == "items":
        pending += value if isinstance(value, list) else ()
        return (
            isinstance(value, list) and bool(value) and (keyword != "items" or draft != "2020-12")
        )
    if keyword == "enum":
        return isinstance(value, list) and (bool(value) or draft not in _OLD)
    if keyword in _EXCLUSIVE:
        if draft != "draft-04":
            return _number(value)
        return isinstance(value, bool) and keyword.replace("exclusiveM", "m") in schema
    if keyword == "dependencies":
        parts = value.values() if isinstance(value, dict) else [None]
        pending += [part for part in parts if not isinstance(part, list)]
        return all(_names(part) for part in parts if isinstance(part, list))
    return keyword not in _UNUSUAL


def plausible(keyword: str, value: Any) -> bool:
    """Whether a value is one that a keyword can have in some draft, seen without its subschemas."""
    if keyword in _EXCLUSIVE:
        return _number(value) or isinstance(value, bool)
    if keyword in ("enum", "required"):
        return isinstance(value, list) and (keyword == "enum" or all(map(_text, value)))
    if keyword in _MAPS or keyword == "dependencies":
        parts = value.values() if isinstance(value, dict) else [None]
        return all(isinstance(part, dict | bool | list) for part in parts)
    if keyword in _MANY or (keyword == "items" and isinstance(value, list)):
        return isinstance(value, list) and all(isinstance(part, dict | bool) for part in value)
    if keyword in _ONE or keyword == "items":
        return isinstance(value, dict | bool)
    if keyword in _REFERENCES:
        return isinstance(value, str)
    check = _PLAIN.get(keyword)
    return check is not None and check(value)
