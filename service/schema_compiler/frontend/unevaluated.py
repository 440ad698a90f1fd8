"""Which properties and items are evaluated: ``unevaluatedProperties`` and ``unevaluatedItems``.

They agree with the functions of ``jsonschema`` for 2020-12, where patterns backtrack, work is not
bounded, and references inside a subschema with an ``$id`` lead nowhere. Its functions for 2019-09
take the keywords of a schema under ``additionalProperties`` for names, and fail at ``items: true``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jsonschema import ValidationError
from referencing import jsonschema as specifications

from service.schema_compiler import budget
from service.schema_compiler.regex.matching import found


def unevaluated_properties(
    validator: Any, value: Any, instance: Any, schema: Any
) -> Iterator[ValidationError]:
    """The keyword, with the place of a property that is not allowed."""
    if validator.is_type(instance, "object"):
        evaluated = _names(validator, instance, schema)
        rest = ((key, member) for key, member in instance.items() if key not in evaluated)
        yield from _each(validator, value, rest, "has a property that is not allowed")


def _names(validator: Any, instance: dict[str, Any], schema: Any) -> set[str]:
    """The names that a schema evaluates in an object that fits it."""
    budget.current().check()
    if isinstance(schema, bool):
        return set()
    names = {key for key in schema.get("properties", {}) if key in instance}
    for pattern in schema.get("patternProperties", {}):
        names.update(key for key in instance if found(pattern, key))
    for keyword in ("additionalProperties", "unevaluatedProperties"):
        if keyword in schema:
            fits = _fitting(validator, schema[keyword])
            names.update(key for key, member in instance.items() if fits(member))
    for reached, subschema in _in_place(validator, instance, schema):
        names |= _names(reached, instance, subschema)
    return names


def unevaluated_items(
    validator: Any, value: Any, instance: Any, schema: Any
) -> Iterator[ValidationError]:
    """The keyword, with the place of an item that is not allowed."""
    if validator.is_type(instance, "array"):
        evaluated = _places(validator, instance, schema)
        rest = ((place, item) for place, item in enumerate(instance) if place not in evaluated)
        yield from _each(validator, value, rest, "has an item that is not allowed")


def _places(validator: Any, instance: list[Any], schema: Any) -> set[int]:
    """The places of the items that a schema evaluates in an array that fits it."""
    budget.current().check()
    if isinstance(schema, bool):
        return set()
    first = schema.get("prefixItems", ())
    if "items" in schema:
        if "additionalItems" in schema or not isinstance(schema["items"], list):
            return set(range(len(instance)))
        first = schema["items"]
    places = set(range(len(first)))
    for keyword in ("contains", "unevaluatedItems"):
        if keyword in schema:
            fits = _fitting(validator, schema[keyword])
            places.update(place for place, item in enumerate(instance) if fits(item))
    for reached, subschema in _in_place(validator, instance, schema):
        places |= _places(reached, instance, subschema)
    return places


def _each(
    validator: Any, value: Any, rest: Iterable[tuple[str | int, Any]], forbidden: str
) -> Iterator[ValidationError]:
    """The keyword for what is not evaluated, with its places. forbidden: said where nothing may be."""
    for place, part in rest:
        if value is False:
            yield ValidationError(forbidden, path=[place])
        else:
            yield from validator.descend(part, value, path=place)


def _in_place(
    validator: Any, instance: dict[str, Any] | list[Any], schema: dict[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """The subschemas that a value fits by the schema, each with its validator."""
    resolver = validator._resolver
    resolved = [resolver.lookup(schema[k]) for k in ("$ref", "$dynamicRef") if k in schema]
    if "$recursiveRef" in schema:
        resolved.append(specifications.lookup_recursive_ref(resolver))
    for target in resolved:
        yield validator.evolve(schema=target.contents, _resolver=target.resolver), target.contents
    applied = [
        subschema
        for keyword in ("dependentSchemas", "dependencies")
        for name, subschema in schema.get(keyword, {}).items()
        if isinstance(instance, dict) and name in instance and not isinstance(subschema, list)
    ]
    branches = [one for k in ("allOf", "oneOf", "anyOf") for one in schema.get(k, ())]
    applied += [one for one in branches if _fitting(validator, one)(instance)]
    if "if" in schema:
        fits = _fitting(validator, schema["if"])(instance)
        applied += [schema["if"]] if fits else []
        applied += [schema[k] for k in ("then" if fits else "else",) if k in schema]
    for subschema in applied:
        yield validator.evolve(schema=subschema), subschema


def _fitting(validator: Any, schema: Any) -> Callable[[Any], bool]:
    return lambda value: next(validator.descend(value, schema), None) is None
