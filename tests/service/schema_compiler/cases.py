"""Cases for every keyword in every draft that knows it: a schema, with values that fit and that do not.

A value that is not of the type a keyword speaks of fits: the first thing that implementations forget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NEWEST, SECOND, SEVENTH, SIXTH, FOURTH = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
)
EVERY = (NEWEST, SECOND, SEVENTH, SIXTH, FOURTH)
SINCE_6, SINCE_7, SINCE_2019 = EVERY[:4], EVERY[:3], EVERY[:2]
UNTIL_2019, UNTIL_7 = EVERY[1:], EVERY[2:]


@dataclass(frozen=True, slots=True)
class Case:
    """checked: keywords that only the final validation enforces here, by the report."""

    keyword: str
    drafts: tuple[str, ...]
    schema: Any
    fits: tuple[Any, ...]
    not_fits: tuple[Any, ...] = ()
    checked: tuple[str, ...] = ()


def _closed(**properties: Any) -> dict[str, Any]:
    return {"properties": properties, "additionalProperties": False}


_TREE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
_NODE = {
    "type": "object", "properties": {"id": {"type": "integer"}, "in": {"$ref": "#/definitions/node"}},
    "required": ["id"],
}  # fmt: skip
_STRING_FIRST = {"if": {"type": "string"}, "then": {"maxLength": 1}, "else": {"minimum": 5}}
_SHOUT = {"properties": {"a": {"const": 1}}, "required": ["a"]}

CASES = (
    # any value
    Case("type", EVERY, {"type": "integer"}, (0, -7, 10**20), (1.5, "1", None, True, [], {})),
    Case("type", EVERY, {"type": "number"}, (0, 1.5, -2e10), ("1", True, None)),
    Case("type", EVERY, {"type": "boolean"}, (True, False), (0, 1, "true", None)),
    Case("type", EVERY, {"type": "null"}, (None,), (0, "", False, [], {})),
    Case("type", EVERY, {"type": "string"}, ("", "é😀", '"\\\n'), (1, None, [], {})),
    Case("type", EVERY, {"type": ["string", "null"]}, ("a", None), (1, False)),
    Case("type", EVERY, {"type": ["integer", "number"], "maximum": 2}, (1, 1.5), (2.5, "a")),
    Case("enum", EVERY, {"enum": [1, "a", [1, {"b": None}]]}, (1, "a", [1, {"b": None}]), (True, "b", [1])),
    Case("enum", EVERY, {"enum": [0, False, "é\u2028"]}, (0, False, "é\u2028"), (None, "", 1)),
    Case("enum", EVERY, {"enum": [1, "a", "ab"], "type": "string", "maxLength": 1}, ("a",), (1, "ab")),
    Case("enum", EVERY, {"enum": [{"a": 1}, {"a": 2, "b": 1}], "required": ["b"]}, ({"a": 2, "b": 1},), ({"a": 1},)),
    Case("const", SINCE_6, {"const": {"a": [1.5, True]}}, ({"a": [1.5, True]},), ({"a": [1.5, 1]}, {})),
    Case("const", SINCE_6, {"const": 0}, (0,), (False, None, "0", 1)),
    Case("const", SINCE_6, {"const": 3, "minimum": 2, "multipleOf": 3}, (3,), (6, 2)),
    # numbers
    Case("minimum", EVERY, {"minimum": 2}, (2, 2.5, 10, "a", None), (1, 1.9, -3)),
    Case("minimum", EVERY, {"type": "integer", "minimum": -12}, (-12, 0, 345), (-13, -100)),
    Case("maximum", EVERY, {"maximum": -0.5}, (-0.5, -1, "a", []), (0, -0.4, 7)),
    Case("maximum", EVERY, {"type": "integer", "maximum": 2.5}, (2, 0, -9), (3, 10)),
    Case("exclusiveMinimum", SINCE_6, {"exclusiveMinimum": 1}, (1.1, 2, "a"), (1, 0)),
    Case("exclusiveMinimum", (FOURTH,), {"minimum": 1, "exclusiveMinimum": True}, (1.1, 2), (1, 0)),
    Case("exclusiveMinimum", (FOURTH,), {"minimum": 1, "exclusiveMinimum": False}, (1, 2), (0.9,)),
    Case("exclusiveMaximum", SINCE_6, {"exclusiveMaximum": 1, "maximum": 5}, (0.9, -1, []), (1, 5)),
    Case("exclusiveMaximum", (FOURTH,), {"maximum": 1, "exclusiveMaximum": True}, (0.9, -1), (1, 2)),
    Case("multipleOf", EVERY, {"type": "integer", "multipleOf": 7}, (0, 7, -14, 700), (1, 8, -13)),
    Case("multipleOf", EVERY, {"multipleOf": 0.5}, (0.5, 2, "a"), (0.25, 1.7)),
    Case("multipleOf", EVERY, {"multipleOf": 0.01}, (0.07, 0.29, 8.21, 19.99, -597.56, 3, "a"), (0.005, 19.999, 1.001)),
    Case("multipleOf", EVERY, {"type": "number", "multipleOf": 0.05, "minimum": 0.05, "maximum": 0.3},
         (0.05, 0.15, 0.3), (0, 0.07, 0.35)),
    Case("multipleOf", EVERY, {"type": "number", "not": {"multipleOf": 0.1}}, (0.05, 1.23), (0.3, 0.7, 2)),
    Case("enum", EVERY, {"enum": [0.1, 1.0]}, (0.1, 1, 1.0), (0.10000000000000002, "0.1", 2)),
    Case("enum", EVERY, {"type": "number", "not": {"enum": [0.3]}}, (0.1, 0.29), (0.3,)),
    Case("multipleOf", EVERY, {"type": "integer", "multipleOf": 4, "minimum": 5, "maximum": 13}, (8, 12), (4, 10, 16)),
    # strings
    Case("minLength", EVERY, {"minLength": 2}, ("ab", "😀é", 1, None), ("", "😀")),
    Case("maxLength", EVERY, {"maxLength": 2}, ("", "😀é", 123, []), ("abc",)),
    Case("maxLength", EVERY, {"type": "string", "minLength": 3, "maxLength": 3}, ("abc",), ("ab", "abcd")),
    Case("pattern", EVERY, {"pattern": "b+"}, ("abc", "b", 1), ("", "ac")),
    Case("pattern", EVERY, {"type": "string", "pattern": r"^\d{2}(-[a-c]|$)"}, ("12", "12-ax"), ("1", "12-d")),
    Case("pattern", EVERY, {"type": "string", "pattern": "^.$", "minLength": 1}, ("é",), ("\n", "ab", "")),
    Case("format", EVERY, {"format": "date"}, ("2024-02-29", 1), ("2023-02-29", "2024-2-29", "")),
    Case("format", EVERY, {"type": "string", "format": "ipv4"}, ("1.2.3.255",), ("1.2.3", "1.2.3.256", "01.2.3.4")),
    Case("format", EVERY, {"type": "string", "format": "ipv6"}, ("::1", "1::1.2.3.4"), ("1", "1::2::3", "::g")),
    Case("format", EVERY, {"format": "uuid", "maxLength": 36}, ("0" * 8 + "-0000" * 3 + "-" + "f" * 12,), ("0",)),
    Case("format", EVERY, {"type": "string", "format": "regex"},
         ("", "^a+$", "(^|/)pack(?:age)?\\.json$", "[^\"\\w.-]{2,30}?|b", "^(?:[A-Z]|(é|a)+b)*"),
         ("(", "a**", "a{3,2}", "[z-a]", "\\")),
    Case("format", EVERY, {"type": "string", "format": "regex", "minLength": 1}, ("a",), ("", "+")),
    Case("format", EVERY, {"type": "string", "format": "regex", "pattern": "^/.+/$"},
         ("/(a|b)\\d+/",), ("//", "/(/", "a")),
    Case("format", EVERY, {"type": "string", "format": "regex", "maxLength": 9},
         ("[a-z]", ""), ("(((", "a" * 10), ("maxLength",)),
    Case("format", EVERY, {"type": "string", "not": {"format": "email"}}, ("nobody",), ("a@b",)),
    Case("format", EVERY, {"type": "string", "not": {"format": "regex"}}, ("(",), ("a",), ("format",)),
    # objects
    Case("properties", EVERY, {"properties": {"a": {"type": "integer"}}},
         ({}, {"a": 1}, {"b": "x"}, []), ({"a": "1"},)),
    Case("properties", EVERY, {"type": "object", **_closed(a={}, b={"type": "null"})},
         ({}, {"a": [1]}, {"a": 1, "b": None}), ({"b": 1}, {"c": 1})),
    Case("properties", EVERY, _closed(**{'"\\\n': {"type": "null"}}), ({'"\\\n': None},), ({'"\\\n': 1}, {"": 1})),
    Case("properties", SINCE_6, {"properties": {"a": False}}, ({}, {"b": 1}), ({"a": 1},)),
    Case("required", EVERY, {"required": ["a", "b"]},
         ({"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}, "a"), ({}, {"a": 1})),
    Case("required", EVERY, {"type": "object", "required": ["b"], **_closed(a={}, b={})},
         ({"b": 1}, {"a": 1, "b": 1}), ({}, {"a": 1})),
    Case("additionalProperties", EVERY, {"additionalProperties": {"type": "integer"}},
         ({}, {"x": 1}, [1]), ({"x": "1"},)),
    Case("additionalProperties", EVERY, {"type": "object", "additionalProperties": False}, ({},), ({"": 1},)),
    Case("additionalProperties", EVERY, {"allOf": [{"properties": {"a": {}}}], **_closed(b={})},
         ({}, {"b": 1}), ({"a": 1},)),
    Case("patternProperties", EVERY, {"patternProperties": {"^a": {"type": "integer"}}},
         ({"a": 1, "b": "x"}, 1), ({"ab": "x"},)),
    Case("patternProperties", EVERY,
         {"patternProperties": {"^x-": {}, "b$": {"type": "null"}}, **_closed(y={})},
         ({"x-1": 1, "y": 2, "b": None}, {"x-b": None}), ({"x-b": 1}, {"z": None})),
    Case("propertyNames", SINCE_6, {"propertyNames": {"pattern": "^[a-c]$"}},
         ({}, {"a": 1, "c": 2}, "d"), ({"d": 1}, {"ab": 1})),
    Case("propertyNames", SINCE_6, {"propertyNames": False, "type": "object"}, ({},), ({"a": 1},)),
    Case("minProperties", EVERY, {"minProperties": 1}, ({"a": 1}, {"a": 1, "b": 2}, []), ({},)),
    Case("maxProperties", EVERY, {"maxProperties": 1}, ({}, {"a": 1}, "ab"), ({"a": 1, "b": 2},)),
    Case("maxProperties", EVERY,
         {"type": "object", "minProperties": 1, "maxProperties": 2, **_closed(a={}, b={}, c={})},
         ({"a": 1}, {"b": 1, "c": 1}), ({}, {"a": 1, "b": 1, "c": 1})),
    Case("minProperties", SINCE_6, {"minProperties": 1.0, "maxProperties": 2.0, **_closed(a={}, b={}, c={})},
         ({"a": 1},), ({}, {"a": 1, "b": 1, "c": 1})),
    Case("minLength", SINCE_6, {"minLength": 1.0, "maxLength": 2.0, "not": {"maxLength": 1.0}},
         ("ab",), ("", "a", "abc")),
    Case("dependencies", EVERY, {"dependencies": {"a": ["b"]}}, ({}, {"b": 1}, {"a": 1, "b": 2}, []), ({"a": 1},)),
    Case("dependencies", EVERY, {"dependencies": {"a": {"required": ["b"]}}}, ({}, {"a": 1, "b": 2}), ({"a": 1},)),
    Case("dependentRequired", SINCE_2019, {"dependentRequired": {"a": ["b", "c"]}},
         ({}, {"a": 1, "b": 2, "c": 3}), ({"a": 1, "b": 2},)),
    Case("dependentRequired", SINCE_2019,
         {"dependentRequired": {"a": ["c"], "b": ["c"], "d": ["a", "d"], "e": ["d", "a"]}},
         ({}, {"c": 1}, {"b": 1, "c": 2}, {"a": 1, "c": 2, "d": 3}, {"x": 1}),
         ({"b": 2}, {"a": 1, "d": 1}, {"c": 1, "d": 1})),
    Case("dependentSchemas", SINCE_2019, {"dependentSchemas": {"a": _closed(a={})}},
         ({"a": 1}, {"b": 1}), ({"a": 1, "b": 1},)),
    Case("unevaluatedProperties", SINCE_2019,
         {"allOf": [{"properties": {"a": {}}}], "properties": {"b": {}}, "unevaluatedProperties": False},
         ({}, {"a": 1, "b": 2}), ({"c": 1},)),
    Case("unevaluatedProperties", SINCE_2019,
         {"anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"b": {}}}],
          "unevaluatedProperties": {"type": "integer"}},
         ({"a": 1, "b": "x"}, {"b": "x", "c": 3}, {"a": 2}), ({"a": "x"}, {"c": "x"})),
    Case("unevaluatedProperties", SINCE_2019,
         {"type": "object", "patternProperties": {"^x-": {"type": "string"}}, "properties": {"a": {}},
          "allOf": [{"patternProperties": {"1$": {}}}], "unevaluatedProperties": False},
         ({}, {"a": 1, "x-b": "", "b1": 2}, {"x-1": ""}), ({"b": 1}, {"x-b": 1}, {"x-1": 1})),
    Case("unevaluatedProperties", SINCE_2019,
         {"type": "object", "anyOf": [{"patternProperties": {"^a": {"type": "integer"}}, "required": ["a"]}, {}],
          "unevaluatedProperties": {"type": "string"}},
         ({"a": 1, "ab": 2, "b": ""}, {"a": "", "b": ""}), ({"ab": 1}, {"a": 1, "b": 1}, {"a": 1, "ab": []})),
    # What satisfies a subschema inside not has evaluated nothing.
    Case("unevaluatedProperties", SINCE_2019,
         {"type": "object", "properties": {"b": {}}, "not": {"properties": {"a": {"const": 1}}, "required": ["a"]},
          "unevaluatedProperties": False},
         ({}, {"b": 1}), ({"a": 2}, {"a": 1}, {"c": 1})),
    *(
        Case("unevaluatedProperties", SINCE_2019,
             {"type": "object", "properties": {"b": {}}, "not": negated, "unevaluatedProperties": False},
             fits, ({"a": 1}, {"a": 1, "b": 1}, {"c": 1}), ("unevaluatedProperties", *counted))
        for negated, fits, *counted in (
            ({"not": _SHOUT}, ()),
            ({"oneOf": [_SHOUT, {"maxProperties": 2}]}, (), "maxProperties"),
            ({"if": _SHOUT, "then": {"minProperties": 9}}, ()),
            ({"if": {"required": ["c"]}, "then": {}, "else": {"minProperties": 2}}, ({}, {"b": 1})),
        )
    ),
    Case("unevaluatedProperties", (NEWEST,),
         {"$id": "urn:tree", "$dynamicAnchor": "node", "$ref": "urn:base", "properties": {"name": {}},
          "$defs": {"base": {"$id": "urn:base", "$dynamicAnchor": "node", "properties": {
              "next": {"$dynamicRef": "#node", "unevaluatedProperties": False}}}}},
         ({"name": 1}, {"next": {"name": 1}}), ({"next": {"other": 1}},), ("unevaluatedProperties", "$dynamicRef")),
    # arrays
    Case("items", EVERY, {"items": {"type": "integer"}}, ([], [1, 2], {}), (["a"], [1, "a"])),
    Case("items", SINCE_6, {"type": "array", "items": False}, ([],), ([1],)),
    Case("items", UNTIL_2019, {"type": "array", "items": [{"type": "integer"}, {"type": "null"}]},
         ([], [1], [1, None, "x"]), (["a"], [1, 1])),
    Case("additionalItems", UNTIL_2019, {"items": [{}], "additionalItems": {"type": "null"}},
         ([1], [1, None], []), ([1, 1],)),
    # Without a list, additionalItems says nothing.
    Case("items", UNTIL_2019, {"items": {"type": "integer"}, "additionalItems": False}, ([1, 2],), (["a"],)),
    Case("additionalItems", UNTIL_2019, {"type": "array", "items": [{}, {}], "additionalItems": False},
         ([], [1, 2]), ([1, 2, 3],)),
    Case("prefixItems", (NEWEST,), {"prefixItems": [{"type": "integer"}, {"type": "null"}]},
         ([], [1], [1, None, 5], "x"), (["a"], [1, 2])),
    Case("prefixItems", (NEWEST,), {"type": "array", "prefixItems": [{}], "items": {"type": "null"}},
         ([1], [1, None]), ([1, 1],)),
    Case("minItems", EVERY, {"minItems": 2}, ([1, 2], [1, 2, 3], "a"), ([], [1])),
    Case("maxItems", EVERY, {"maxItems": 1}, ([], [1], {"a": 1, "b": 2}), ([1, 2],)),
    Case("maxItems", EVERY, {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 3},
         ([1], [1, 2, 2]), ([], [1] * 4, [3])),
    Case("uniqueItems", EVERY, {"uniqueItems": True},
         ([], [1, 2], [1, True], "aa"), ([1, 1], [{}, {}]), ("uniqueItems",)),
    Case("uniqueItems", EVERY, {"type": "array", "items": {"enum": [0, 1, "a"]}, "uniqueItems": True, "maxItems": 3},
         ([0, "a"], [1]), ([0, 0],)),
    Case("uniqueItems", EVERY,
         {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 3}, "uniqueItems": True},
         ([], [2], [3, 1, 2]), ([1, 1], [1, 2, 1], [0], [1, 2, 3, 3], 1)),
    Case("uniqueItems", EVERY, {"uniqueItems": False, "type": "array"}, ([1, 1],), (1,)),
    Case("contains", SINCE_6, {"contains": {"const": 1}}, ([1], [0, 1, 1], {}), ([], [2])),
    Case("contains", SINCE_6, {"type": "array", "allOf": [{"contains": {"const": n}} for n in range(3)]},
         ([0, 1, 2], [2, 5, 1, 0]), ([0, 1], [1, 1, 2])),
    Case("minContains", SINCE_2019, {"contains": {"const": 1}, "minContains": 2}, ([1, 1], [1, 0, 1]), ([1], [])),
    Case("minContains", SINCE_2019, {"contains": {"const": 1}, "minContains": 2.0}, ([1, 1], [1, 0, 1]), ([1], [])),
    Case("maxContains", SINCE_2019, {"contains": {"const": 1}, "maxContains": 1.0}, ([1], [0, 1]), ([1, 1], [])),
    Case("minItems", SINCE_6, {"minItems": 1.0, "maxItems": 2.0, "not": {"minItems": 2.0}}, ([1],), ([], [1, 2])),
    Case("minContains", SINCE_2019, {"type": "array", "contains": {"const": 1}, "minContains": 0}, ([], [2]), (1,)),
    Case("maxContains", SINCE_2019, {"contains": {"const": 1}, "maxContains": 1}, ([1], [0, 1]), ([1, 1], [])),
    Case("maxContains", SINCE_2019,
         _closed(a={"type": "array", "contains": {"const": 1}, "minContains": 2, "maxContains": 1}),
         ({},), ({"a": [1]},)),
    Case("unevaluatedItems", (NEWEST,), {"prefixItems": [{}], "unevaluatedItems": False},
         ([], [1]), ([1, 2],), ("unevaluatedItems",)),
    Case("unevaluatedItems", (SECOND,), {"items": [{}], "unevaluatedItems": {"type": "null"}},
         ([1], [1, None]), ([1, 2],), ("unevaluatedItems",)),
    # combinations
    Case("allOf", EVERY, {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 5}]}, (2, 5), (1, 6, "a", 2.5)),
    Case("allOf", EVERY, {"allOf": [{"properties": {"a": {"minimum": 1}}}, {"properties": {"a": {"maximum": 3}}}]},
         ({"a": 2}, {}), ({"a": 0}, {"a": 4})),
    Case("anyOf", EVERY, {"anyOf": [{"type": "null"}, {"minimum": 3}], "type": ["null", "integer"]},
         (None, 3), (2, "a")),
    Case("oneOf", EVERY, {"oneOf": [{"type": "integer"}, {"minimum": 2}], "type": "number"}, (1, 2.5), (3, 1.5)),
    Case("oneOf", EVERY, {"oneOf": [_closed(a={}), _closed(b={})], "type": "object"},
         ({"a": 1}, {"b": 1}), ({}, {"a": 1, "b": 1})),
    Case("oneOf", EVERY, {"oneOf": [{"type": ["null", "string"]}, {"type": ["null", "integer"]}]},
         ("a", 1), (None, 1.5)),  # the branches overlap in null alone
    Case("oneOf", EVERY, {"oneOf": [{"enum": [None, True, "a"]}, {"enum": [None, True, 1]}]},
         ("a", 1), (None, True, False)),
    Case("not", EVERY, {"not": {"type": ["integer", "string"]}}, (None, 1.5, []), (1, "a")),
    Case("not", EVERY, {"type": "object", "not": {"required": ["a"]}}, ({}, {"b": 1}), ({"a": 1},)),
    Case("not", EVERY, {"type": "string", "not": {"enum": ["a", "b"]}}, ("", "ab"), ("a", "b")),
    Case("not", EVERY, {"type": "boolean", "not": {"enum": [False]}}, (True,), (False, None)),
    Case("not", EVERY, {"not": {"enum": [True, "a"]}}, (False, "b"), (True, "a")),
    Case("not", EVERY,
         {"type": "object", "allOf": [{"not": {"patternProperties": {one: {"type": "null"}}}} for one in "abc"]},
         ({"abc": 1}, {"a": 1, "b": 1, "c": 1}, {"x": None, "ab": 1, "c": 1}), ({"a": 1, "b": 1}, {"abc": None})),
    Case("if", SINCE_7, _STRING_FIRST, ("a", 5, None), ("ab", 4)),
    Case("then", SINCE_7, {"if": _SHOUT, "then": {"required": ["b"]}, "type": "object"},
         ({}, {"a": 1, "b": 1}, {"a": 2}), ({"a": 1},)),
    Case("else", SINCE_7, {"if": _SHOUT, "else": {"maxProperties": 0}, "type": "object"},
         ({}, {"a": 1, "b": 1}), ({"a": 2},)),
    # references
    Case("$ref", EVERY, {"definitions": {"n": {"type": "integer"}}, "items": {"$ref": "#/definitions/n"}},
         ([1], []), (["a"],)),
    Case("$ref", EVERY, _TREE, ({}, {"next": {"next": {}}}), ({"next": 1}, {"next": {"x": 1}})),
    Case("$ref", SINCE_2019, {"$defs": {"n": {"minimum": 2}}, "$ref": "#/$defs/n", "type": "integer"}, (2,), (1, 2.5)),
    Case("$ref", UNTIL_7,
         {"definitions": {"n": {"minimum": 2}}, "items": {"$ref": "#/definitions/n", "type": "string"}},
         ([2], [{}]), ([1],)),
    Case("$defs", SINCE_2019, {"$defs": {"a/b~": {"type": "null"}}, "$ref": "#/$defs/a~1b~0"}, (None,), (1,)),
    Case("definitions", EVERY, {"definitions": {"node": _NODE}, "$ref": "#/definitions/node"},
         ({"id": 1, "in": {"id": 2}},), ({"id": 1, "in": {}}, {})),
    Case("$anchor", SINCE_2019, {"$defs": {"x": {"$anchor": "here", "type": "null"}}, "items": {"$ref": "#here"}},
         ([None],), ([1],)),
    Case("$id", SINCE_6,
         {"$id": "http://a.b/c", "definitions": {"n": {"$id": "d", "type": "null"}}, "items": {"$ref": "d"}},
         ([None],), ([1],)),
    Case("$dynamicRef", (NEWEST,),
         {"$dynamicAnchor": "t", **_closed(a={"type": "integer"}, c={"$dynamicRef": "#t"})},
         ({"c": {"a": 1}},), ({"c": {"a": "x"}}, {"c": {"b": 1}})),
    Case("$dynamicAnchor", (NEWEST,),
         {"$defs": {"x": {"$dynamicAnchor": "t", "type": "null"}}, "items": {"$ref": "#t"}},
         ([None],), ([1],)),
    Case("$recursiveRef", (SECOND,), {"$recursiveAnchor": True, **_closed(c={"$recursiveRef": "#"})},
         ({"c": {}},), ({"c": {"a": 1}},)),
    # what says nothing about a value
    *(
        Case(keyword, drafts, {"type": "null", keyword: value}, (None,), (1,))
        for keyword, drafts, value in (
            ("title", EVERY, "t"), ("description", EVERY, "d"), ("default", EVERY, 1), ("$comment", SINCE_7, "c"),
            ("examples", SINCE_6, [1]), ("readOnly", SINCE_7, True), ("contentMediaType", SINCE_7, "text/html"),
            ("contentSchema", SINCE_2019, {"type": "string"}), ("x-own", EVERY, {"type": "string"}),
        )
    ),
)  # fmt: skip
