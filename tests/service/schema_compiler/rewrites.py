"""Random schemas for each rewrite and kind of keyword, with values of which some are valid."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

Schema = Any
Made = tuple[Schema, list[Any]]
"""A schema, and values to try."""

NAMES = ("a", "b", "c", "ab")
SCALARS = (None, True, False, 0, 1, 2, 3, 5, -1, 1.5, 2.5, "", "a", "b", "ab", "abc")
PATTERNS = ("^a", "b$", "^[ab]+$", "c", "^(a|c)$", "^ab$", "^.{2,}$")
SEVENTH = "http://json-schema.org/draft-07/schema#"
FOURTH = "http://json-schema.org/draft-04/schema#"
NINETEENTH = "https://json-schema.org/draft/2019-09/schema"


def leaf(rng: Random) -> Schema:
    """A schema of scalars."""
    return rng.choice(
        (
            {"type": "integer"}, {"type": "string"}, {"type": "boolean"}, {"const": 1},
            {"const": "a"}, {"enum": ["a", "b", 2]}, {"type": "string", "maxLength": 1},
            {"type": "number", "minimum": 1}, {"maximum": 2}, {"minLength": 2}, {"type": "null"},
            {"type": ["string", "null"]}, {"not": {"type": "string"}}, True, {"pattern": "^a"},
            {"type": "integer", "multipleOf": 2}, {"type": "array", "maxItems": 1}, {"type": "object"},
        )
    )  # fmt: skip


def some_names(rng: Random, least: int = 0, most: int = 3) -> list[str]:
    return rng.sample(NAMES, rng.randint(least, most))


def properties(rng: Random, most: int = 3) -> dict[str, Schema]:
    return {name: leaf(rng) for name in some_names(rng, 1, most)}


def an_object(rng: Random) -> dict[str, Schema]:
    """A schema of objects with some names."""
    found: dict[str, Any] = {"properties": properties(rng)}
    if rng.random() < 0.8:
        found["type"] = "object"
    if rng.random() < 0.6:
        found["required"] = some_names(rng, 0, 2)
    if rng.random() < 0.6:
        found["additionalProperties"] = rng.choice((False, False, leaf(rng)))
    return found


def objects(rng: Random, number: int = 4) -> list[Any]:
    return [{name: rng.choice(SCALARS) for name in some_names(rng)} for _ in range(number)]


def arrays(rng: Random, number: int = 4) -> list[Any]:
    return [[rng.choice(SCALARS) for _ in range(rng.randint(0, 4))] for _ in range(number)]


def scalars(rng: Random, number: int = 5) -> list[Any]:
    return [rng.choice(SCALARS) for _ in range(number)]


def either(rng: Random) -> Made:
    """Objects or scalars."""
    return (an_object(rng), objects(rng)) if rng.random() < 0.5 else (leaf(rng), scalars(rng))


def _all_of(rng: Random) -> Made:
    first, values = either(rng)
    second = an_object(rng) if isinstance(values[0], dict) else leaf(rng)
    found = {"allOf": [first, second, *([leaf(rng)] if rng.random() < 0.2 else [])]}
    if rng.random() < 0.4:
        found |= an_object(rng) if isinstance(values[0], dict) else {"type": ["integer", "string"]}
    return found, values


def _const_with_siblings(rng: Random) -> Made:
    listed = [*objects(rng, 2), *arrays(rng, 1), *scalars(rng, 3)]
    found: dict[str, Any] = {"enum": [*listed]} if rng.random() < 0.7 else {"const": listed[0]}
    sibling = rng.choice((an_object, leaf, leaf))(rng)
    if isinstance(sibling, dict):
        found = {**sibling, **found} if "enum" not in sibling else {**found, "allOf": [sibling]}
    if rng.random() < 0.3:
        found["not"] = leaf(rng)
    return found, listed


def _required_alone(rng: Random) -> Made:
    found: dict[str, Any] = {"required": some_names(rng, 1, 2)}
    if rng.random() < 0.7:
        found["type"] = "object"
    if rng.random() < 0.4:
        found["additionalProperties"] = leaf(rng)
    if rng.random() < 0.3:
        found["maxProperties"] = rng.randint(1, 3)
    return found, [*objects(rng), 1, []]


def _types(rng: Random) -> Made:
    names = ("null", "boolean", "integer", "number", "string", "array", "object")
    found: dict[str, Any] = {"type": rng.sample(names, rng.randint(1, 4))}
    for keyword, value in (
        ("minimum", 2), ("maxLength", 1), ("maxItems", 1), ("required", ["a"]), ("multipleOf", 2),
        ("pattern", "^a"), ("items", {"type": "integer"}), ("additionalProperties", {"const": 1}),
    ):  # fmt: skip
        if rng.random() < 0.3:
            found[keyword] = value
    return found, [*scalars(rng), *arrays(rng, 2), *objects(rng, 2)]


def _one_of(rng: Random) -> Made:
    branches: list[Any] = []
    tagged = rng.random() < 0.5
    for tag in ("a", "b", "c")[: rng.randint(2, 3)]:
        if tagged:
            one = an_object(rng)
            one["properties"] = {"kind": {"const": tag}, **one["properties"]}
            if rng.random() < 0.8:
                one["required"] = ["kind"]
        else:
            one = rng.choice((leaf, an_object))(rng)
        branches.append(one)
    values = [*objects(rng), *scalars(rng, 3)]
    if tagged:
        values = [{"kind": rng.choice("abc"), **one} for one in objects(rng)]
    return {rng.choice(("oneOf", "oneOf", "anyOf")): branches}, values


def _bounds(rng: Random) -> Made:
    def bounds() -> dict[str, Any]:
        keywords = rng.sample(
            ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), 2
        )
        return {
            k: rng.choice((0.5, 1, 2, 3, 1.5) if k == "multipleOf" else (-3, -1, 0, 1, 2.5, 7, 12))
            for k in keywords
        }

    found: dict[str, Any] = {"type": rng.choice(("integer", "number")), **bounds()}
    found["allOf"] = [bounds() for _ in range(rng.randint(0, 2))]
    if rng.random() < 0.3:
        found["not"] = bounds()
    if not found["allOf"]:
        del found["allOf"]
    return found, [*range(-4, 14, 2), *range(-3, 13, 3), -0.5, 0.5, 1.5, 2.5, 7.5]


def _closed_in_parts(rng: Random) -> Made:
    found = an_object(rng)
    found["additionalProperties"] = rng.choice((False, leaf(rng)))
    found["allOf"] = [an_object(rng) for _ in range(rng.randint(1, 2))]
    return found, objects(rng)


def _dependent_required(rng: Random) -> Made:
    found = an_object(rng)
    listed = {name: some_names(rng, 0, 2) for name in some_names(rng, 1, 2)}
    if rng.random() < 0.3:
        found["$schema"], found["dependencies"] = SEVENTH, listed
    else:
        found["dependentRequired"] = listed
    return found, objects(rng)


def _dependent_schemas(rng: Random) -> Made:
    found = an_object(rng)
    listed = {name: rng.choice((an_object, leaf))(rng) for name in some_names(rng, 1, 2)}
    if rng.random() < 0.3:
        found["$schema"], found["dependencies"] = SEVENTH, listed
    else:
        found["dependentSchemas"] = listed
    return found, objects(rng)


def _conditions(rng: Random) -> Made:
    own, values = either(rng)
    part = an_object if isinstance(values[0], dict) else leaf
    found = dict(own) if isinstance(own, dict) else {}
    found["if"] = part(rng)
    for keyword in ("then", "else"):
        if rng.random() < 0.7:
            found[keyword] = rng.choice((part(rng), False)) if rng.random() < 0.3 else part(rng)
    return found, values


def _not(rng: Random) -> Made:
    own, values = either(rng)
    found = dict(own) if isinstance(own, dict) else {}
    inner = an_object if isinstance(values[0], dict) else leaf
    negated: Any = inner(rng)
    if rng.random() < 0.4:
        negated = {rng.choice(("anyOf", "allOf", "oneOf")): [negated, inner(rng)]}
    found["not"] = negated
    return found, values


def _pattern_properties(rng: Random) -> Made:
    found = an_object(rng)
    chosen = rng.sample(PATTERNS, rng.randint(1, 2))
    found["patternProperties"] = {one: rng.choice((False, leaf(rng), leaf(rng))) for one in chosen}
    if rng.random() < 0.3:
        found["allOf"] = [{"patternProperties": {rng.choice(PATTERNS): leaf(rng)}}]
    return found, objects(rng)


def _counts(rng: Random) -> Made:
    found = an_object(rng)
    found |= {rng.choice(("minProperties", "maxProperties")): rng.randint(0, 3)}
    if rng.random() < 0.5:
        found |= {"minProperties": rng.randint(0, 2), "maxProperties": rng.randint(1, 4)}
    if rng.random() < 0.3:
        found["patternProperties"] = {"^a": leaf(rng)}
    return found, objects(rng)


FORMATS = {
    "date": ["2024-02-29", "2023-02-29"], "time": ["23:59:60Z", "25:00:00Z", "10:00:00+01:00"],
    "date-time": ["2024-02-29T00:00:00Z", "2024-02-29"], "ipv4": ["1.2.3.4", "1.2.3.256", "01.2.3.4"],
    "ipv6": ["::1", "1::2::3", "::1.2.3.4"], "uuid": ["0" * 8 + "-0000" * 3 + "-" + "0" * 12, "0"],
    "email": ["a@b", "a", '"a b"@c.d'], "hostname": ["a-b.c", "-a", "a" * 64],
    "idn-email": ["ü@b", "ü"], "idn-hostname": ["ü-b.c", "-ü", "Ü"], "duration": ["P1D", "P"],
    "uri": ["a:b", "b"], "uri-reference": ["//a/b", "a b"], "json-pointer": ["/a/~0", "~"],
    "relative-json-pointer": ["0#", "01"], "uri-template": ["{a}", "{"], "iri": ["a:é", "é"],
    "regex": ["a", "("], "unknown": ["x"],
}  # fmt: skip


def _formats(rng: Random) -> Made:
    name = rng.choice(tuple(FORMATS))
    found: dict[str, Any] = {"type": "string", "format": name}
    if rng.random() < 0.3:
        found = {"type": "string", "not": {"format": name}}
    if rng.random() < 0.4:
        found |= rng.choice(({"maxLength": 12}, {"pattern": "[0-9]"}, {"minLength": 8}))
    return found, FORMATS[name] if "not" in found else []


def _reference(rng: Random) -> Made:
    own, values = either(rng)
    found = dict(own) if isinstance(own, dict) else {}
    part = an_object if isinstance(values[0], dict) else leaf
    draft = rng.choice(("", "", SEVENTH))
    holder = "definitions" if draft else "$defs"
    found |= {"$ref": f"#/{holder}/one", holder: {"one": part(rng)}}
    if rng.random() < 0.3:
        found["$ref"] = f"#/{holder}/two"
        found[holder]["two"] = {"$ref": f"#/{holder}/one", "allOf": [part(rng)]}
    if draft:
        found["$schema"] = draft
    elif rng.random() < 0.3:
        found["$defs"]["one"] = {"$anchor": "x", "allOf": [found["$defs"]["one"]]}
        found["$ref"] = "#x"
    return found, values


def _recursion(rng: Random) -> Made:
    node = an_object(rng)
    node["properties"]["c"] = {"$ref": "#/$defs/node"} if rng.random() < 0.6 else {"$ref": "#"}
    if rng.random() < 0.5:
        node["properties"]["b"] = {
            "type": "array",
            "items": {"$ref": "#/$defs/node"},
            "maxItems": 2,
        }
    found = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    values = [{"c": one, "a": rng.choice(SCALARS)} for one in objects(rng)]
    return found, [*values, *({"b": [one]} for one in objects(rng, 2)), *objects(rng, 2)]


def _tuples(rng: Random) -> Made:
    found: dict[str, Any] = {"type": "array"} if rng.random() < 0.7 else {}
    prefix = [leaf(rng) for _ in range(rng.randint(1, 3))]
    rest = rng.choice((False, leaf(rng)))
    old = rng.random() < 0.3
    if old:
        found |= {"$schema": rng.choice((SEVENTH, FOURTH, NINETEENTH)), "items": prefix}
        found |= {"additionalItems": rest} if rest is not True else {}
        if found["$schema"] == FOURTH:  # without true, false and const as schemas
            found = {"$schema": FOURTH, "items": [{"type": "integer"}, {"minimum": 1}]}
            found |= {"additionalItems": rng.choice((False, {"type": "string"}))}
    else:
        found["prefixItems"] = prefix
        if rng.random() < 0.7:
            found["items"] = rest
    for keyword in ("minItems", "maxItems"):
        if rng.random() < 0.3:
            found[keyword] = rng.randint(0, 4)
    return found, arrays(rng, 6)


def _contains(rng: Random) -> Made:
    found: dict[str, Any] = {"type": "array", "contains": leaf(rng)}
    if rng.random() < 0.5:
        found["minContains"] = rng.choice((0, 1, 2, 2.0))
    if rng.random() < 0.5:
        found["maxContains"] = rng.choice((1, 1.0, 2, 3))
    if rng.random() < 0.5:
        found["items"] = leaf(rng)
    if rng.random() < 0.5:
        found["maxItems"] = rng.randint(1, 4)
    return found, arrays(rng, 6)


def _unique_items(rng: Random) -> Made:
    found: dict[str, Any] = {"type": "array", "uniqueItems": rng.random() < 0.9}
    if rng.random() < 0.8:
        found["items"] = rng.choice(
            ({"enum": [1, True, "a"]}, {"enum": [0, False, [0], [False]]}, {"type": "boolean"}, leaf(rng))
        )  # fmt: skip
    if rng.random() < 0.4:
        found["prefixItems"] = [leaf(rng)]
    if rng.random() < 0.5:
        found["maxItems"] = rng.randint(1, 3)
    return found, arrays(rng, 6)


def _property_names(rng: Random) -> Made:
    found = an_object(rng)
    found["propertyNames"] = rng.choice(
        (
            {"maxLength": 1}, {"pattern": rng.choice(PATTERNS)}, {"enum": ["a", "b"]}, False, {"const": "a"},
            {"minLength": 2, "pattern": "b"}, {"not": {"const": "a"}}, {"type": "string"},
        )
    )  # fmt: skip
    return found, objects(rng)


def _some_members(rng: Random) -> dict[str, Schema]:
    if rng.random() < 0.6:
        return {"properties": properties(rng, 2)}
    found: dict[str, Schema] = {"patternProperties": {rng.choice(PATTERNS): leaf(rng)}}
    return found | ({"properties": properties(rng, 1)} if rng.random() < 0.5 else {})


def _unevaluated_properties(rng: Random) -> Made:
    found = {"type": "object", **_some_members(rng)}
    part = rng.choice(("allOf", "anyOf", "oneOf", "if", "$ref", "dependentSchemas", "not"))
    if part == "not":
        inner = {**_some_members(rng), "required": ["b"]}
        found["not"] = rng.choice(
            ({"not": inner}, {"if": inner, "then": False}, {"oneOf": [inner, {}]}, inner)
        )
    elif part in ("allOf", "anyOf", "oneOf"):
        found[part] = [
            _some_members(rng),
            {"required": ["b"], "properties": {"b": True}},
        ]
    elif part == "if":
        found |= {"if": {"properties": {"a": leaf(rng)}, "required": ["a"]}}
        found |= {
            "then": _some_members(rng),
            "else": {"properties": {"c": leaf(rng)}},
        }
    elif part == "$ref":
        found |= {"$ref": "#/$defs/one", "$defs": {"one": _some_members(rng)}}
    else:
        found[part] = {"a": _some_members(rng)}
    found["unevaluatedProperties"] = rng.choice((False, False, leaf(rng)))
    if rng.random() < 0.2:
        found["$schema"] = NINETEENTH
    return found, objects(rng, 6)


def _unevaluated_items(rng: Random) -> Made:
    found: dict[str, Any] = {"type": "array", "prefixItems": [leaf(rng)]}
    part = rng.choice(("allOf", "anyOf", "contains", "none"))
    if part in ("allOf", "anyOf"):
        found[part] = [{"prefixItems": [True, leaf(rng)]}, {"minItems": 2}]
    elif part == "contains":
        found[part] = leaf(rng)
    found["unevaluatedItems"] = rng.choice((False, False, leaf(rng)))
    return found, arrays(rng, 6)


KINDS: dict[str, Callable[[Random], Made]] = {
    "allOf": _all_of,
    "const and enum with siblings": _const_with_siblings,
    "required without properties": _required_alone,
    "type unions": _types,
    "oneOf of disjoint branches": _one_of,
    "numeric bounds": _bounds,
    "additionalProperties with allOf": _closed_in_parts,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "if, then, else": _conditions,
    "not": _not,
    "patternProperties": _pattern_properties,
    "minProperties and maxProperties": _counts,
    "formats": _formats,
    "$ref with siblings": _reference,
    "recursion": _recursion,
    "prefixItems and items": _tuples,
    "contains": _contains,
    "uniqueItems": _unique_items,
    "propertyNames": _property_names,
    "unevaluatedProperties": _unevaluated_properties,
    "unevaluatedItems": _unevaluated_items,
}


def combined(rng: Random) -> Made:
    """Two schemas, often of one kind, in one."""
    kinds = [one for name, one in KINDS.items() if name not in ("recursion", "$ref with siblings")]
    first = rng.choice(kinds)
    second = first if rng.random() < 0.4 else rng.choice(kinds)
    (a, fits_a), (b, fits_b) = first(rng), second(rng)
    both = [*fits_a, *fits_b]
    made: tuple[Made, ...] = (
        ({"allOf": [a, b]}, both),
        ({"anyOf": [a, b]}, both),
        ({"oneOf": [a, b]}, both),
        ({"allOf": [a], "not": b}, both),
        ({"if": a, "then": b}, both),
        ({"if": a, "else": b}, both),
        (
            {"type": "object", "properties": {"a": a, "b": b}, "required": ["a"]},
            [{"a": one, "b": other} for one, other in zip(fits_a, fits_b, strict=False)],
        ),
        ({"type": "array", "items": a, "contains": b}, [[one] for one in both]),
    )
    return rng.choice(made)


def of_draft(schema: Schema, draft: str) -> Schema:
    """The same in an older draft: in its forms, where it has some, else in those of the later ones."""
    return {"$schema": draft, **_older(schema, draft)}


def _older(part: Any, draft: str) -> Any:
    if isinstance(part, list):
        return [_older(one, draft) for one in part]
    if not isinstance(part, dict):
        return part
    found = {keyword: _older(value, draft) for keyword, value in part.items()}
    if "prefixItems" in found:
        if "items" in found:
            found["additionalItems"] = found.pop("items")
        found["items"] = found.pop("prefixItems")
    if "const" in found and draft == FOURTH:
        found["enum"] = [found.pop("const")]
    for keyword in ("dependentRequired", "dependentSchemas"):
        if keyword in found and draft != NINETEENTH:
            found["dependencies"] = found.pop(keyword)
    if draft != NINETEENTH:
        # The library takes what is evaluated from the keywords of the draft that it is of.
        found.pop("unevaluatedItems", None)
        found.pop("unevaluatedProperties", None)
    return found
