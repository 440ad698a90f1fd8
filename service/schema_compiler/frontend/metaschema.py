"""Schemas that are plainly valid by the metaschema of their draft, seen without validating.

A validator takes most of the time of an analysis to find that nothing is wrong, which it is for
almost all schemas. What is unusual is left to it, and so is what is wrong: it knows the words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from service.schema_compiler.frontend.keywords import KEYWORDS, REFERENCES, Form, with_form

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


_CHECKS: dict[Form, Callable[[Any], bool]] = {
    Form.ANY: lambda value: True,
    Form.TEXT: _text,
    Form.FLAG: _flag,
    Form.NUMBER: _number,
    Form.POSITIVE: lambda value: _number(value) and value > 0,
    Form.COUNT: _size,
    Form.LIST: lambda value: isinstance(value, list),
    Form.IDENTIFIER: _identifier,
    Form.ANCHOR: lambda value: isinstance(value, str) and bool(_ANCHOR.fullmatch(value)),
    Form.TYPES: _type,
    Form.NAMES: _names,
    Form.NAMES_BY_NAME: lambda value: isinstance(value, dict) and all(map(_names, value.values())),
}
"""For keywords without subschemas whose values are the same in all drafts."""
_PLAIN = {
    name: _CHECKS[keyword.form] for name, keyword in KEYWORDS.items() if keyword.form in _CHECKS
} | {"$ref": _text}
_ONE = with_form(Form.SCHEMA)
_EXCLUSIVE = with_form(Form.BOUND)
_MANY = with_form(Form.SCHEMAS)
_MAPS = with_form(Form.SCHEMA_BY_NAME)
_UNUSUAL = with_form(Form.REFERENCE) | {"$dynamicAnchor", "$recursiveAnchor", "$vocabulary"}


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
    if keyword in REFERENCES:
        return isinstance(value, str)
    check = _PLAIN.get(keyword)
    return check is not None and check(value)
