"""Simpler forms of a JSON Schema, for servers whose dialect does not take the schema as it was sent.

A simpler form only guides the server. The answer is validated against the schema as sent, so a form
that allows more costs attempts, never the guarantee.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

ANY_OBJECT = '{"type":"object"}'
_SCALARS = ("title", "description", "const", "enum", "required", "minItems", "maxItems")
_DEFINITIONS = ("$defs", "definitions")
_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})


def forms(source: str, keywords: frozenset[str] | None = None) -> Iterator[str]:
    """The schema in forms from the strongest to the weakest: as sent, with the core keywords only,
    and any object, where an object can be valid.

    keywords: those that the server reads without an error; None: all of them.
    """
    if keywords is None:
        yield source  # the usual case; nothing else is made of it
    schema = json.loads(source)
    if keywords is not None and _keywords(schema) <= keywords:
        yield source
    simple = simplified(schema)
    if simple not in ({}, schema):
        yield json.dumps(simple, ensure_ascii=False)
    if _may_be_object(simple):
        yield ANY_OBJECT


def simplified(schema: Any) -> dict[str, Any]:
    """The schema with its core keywords. Everything that is valid against ``schema`` and does not
    depend on other keywords is valid against the result; ``{}`` where nothing is left."""
    local = not _has_ids(schema)
    return _simple(schema, local)


def _simple(schema: Any, local: bool) -> dict[str, Any]:
    if not isinstance(schema, dict):
        return {}
    found: dict[str, Any] = {name: schema[name] for name in _SCALARS if name in schema}
    kept = _types(schema.get("type"))
    if kept is not None:
        found["type"] = kept
    for name in (*_DEFINITIONS, "properties"):
        if isinstance(schema.get(name), dict):
            found[name] = {key: _simple(one, local) for key, one in schema[name].items()}
    if isinstance(schema.get("items"), dict):
        found["items"] = _simple(schema["items"], local)
    if isinstance(schema.get("prefixItems"), list):
        found["prefixItems"] = [_simple(one, local) for one in schema["prefixItems"]]
    branches = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(branches, list):
        found["anyOf"] = [_simple(one, local) for one in branches if one is not False]
    if local and _points_to_definition(schema.get("$ref")):
        found["$ref"] = schema["$ref"]
    additional = schema.get("additionalProperties")
    if additional is not None and _closed_by_properties(schema):
        found["additionalProperties"] = (
            additional if isinstance(additional, bool) else _simple(additional, local)
        )
    return found


def _types(value: Any) -> Any:
    several = value if isinstance(value, list) else [value]
    return value if all(isinstance(one, str) and one in _TYPES for one in several) else None


def _points_to_definition(reference: Any) -> bool:
    """Whether a reference leads to a definition of the root, which simpler forms keep."""
    if not isinstance(reference, str):
        return False
    parts = reference.split("/")
    return len(parts) == 3 and parts[0] == "#" and parts[1] in _DEFINITIONS


def _closed_by_properties(schema: Mapping[str, Any]) -> bool:
    """Whether ``additionalProperties`` depends on ``properties`` alone, and allows what is
    required. Beside patterns of names it would forbid more than the schema does."""
    if schema.get("patternProperties"):
        return False
    required = schema.get("required", ())
    return not isinstance(required, list) or set(required) <= set(schema.get("properties", ()))


def _has_ids(schema: Any, *, root: bool = True) -> bool:
    """Whether a subschema has an identifier, which changes what references mean."""
    if isinstance(schema, list):
        return any(_has_ids(one, root=False) for one in schema)
    if not isinstance(schema, dict):
        return False
    if not root and any(isinstance(schema.get(name), str) for name in ("$id", "id")):
        return True
    return any(_has_ids(one, root=False) for one in schema.values())


def _keywords(schema: Any) -> frozenset[str]:
    """Every name in a schema that may be a keyword. Names of properties count, too: a false alarm
    costs strength, a missed keyword an error."""
    if isinstance(schema, list):
        return frozenset().union(*map(_keywords, schema))
    if not isinstance(schema, dict):
        return frozenset()
    found = frozenset(schema)
    for name, value in schema.items():
        if name in ("properties", *_DEFINITIONS) and isinstance(value, dict):
            found |= frozenset().union(*map(_keywords, value.values()))
        elif name not in ("enum", "const", "default", "examples"):
            found |= _keywords(value)
    return found


def _may_be_object(simple: Mapping[str, Any]) -> bool:
    """Whether an object may be valid at the root."""
    kinds = simple.get("type", "object")
    if "const" in simple or "enum" in simple or "$ref" in simple:
        return False
    return kinds == "object" or (isinstance(kinds, list) and "object" in kinds)
