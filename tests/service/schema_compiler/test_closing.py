"""``close_objects``: which objects are closed, and that an answer under the closed schema is valid under
the schema as sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from service.errors import GrammarError
from service.schema_compiler.api import Options, analyse, compile_schema
from service.schema_compiler.frontend.checked_schema import checked_schema
from service.schema_compiler.frontend.closing import CLOSE_BY, OPEN, closed, open_objects
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.schema_compiler.report import Enforcement
from service.types import Grammar, GrammarKind
from tests.service.schema_compiler import schemas
from tests.service.schema_compiler.agreement import admitted, valid

A: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
B: dict[str, Any] = {"type": "object", "properties": {"b": {"type": "integer"}}}


def kind(value: str, **more: Any) -> dict[str, Any]:
    """A branch of a union that a required property tells from the others."""
    return {
        "type": "object",
        "properties": {"kind": {"const": value}, **more},
        "required": ["kind"],
    }


def found(schema: Any) -> dict[str, bool]:
    """The open objects of a schema by pointer, and whether they can be closed."""
    objects = open_objects(checked_schema(json.dumps(schema)))
    return {one.pointer: not one.why_not for one in objects}


def closing(schema: Any) -> Any:
    checked = checked_schema(json.dumps(schema))
    return json.loads(closed(checked, open_objects(checked), DEFAULT_LIMITS))


CASES: dict[str, tuple[Any, dict[str, bool]]] = {
    "properties": (A, {"": True}),
    "no properties listed": ({"type": "object", "properties": {}}, {"": True}),
    "no properties": ({"type": "object"}, {}),
    "any": (True, {}),
    "closed": ({**A, "additionalProperties": False}, {}),
    "open on purpose": ({**A, "additionalProperties": True}, {}),
    "others with a schema": ({**A, "additionalProperties": {"type": "string"}}, {}),
    "others by pattern": ({**A, "patternProperties": {"^x-": {}}}, {}),
    "others by name": ({**A, "propertyNames": {"maxLength": 3}}, {}),
    "others unevaluated": ({**A, "unevaluatedProperties": False}, {}),
    "nested": (
        {"type": "object", "properties": {"p": A, "q": {"type": "array", "items": B}}},
        {"": True, "/properties/p": True, "/properties/q/items": True},
    ),
    "by reference": (
        {"$defs": {"A": A, "unused": B}, "type": "array", "items": {"$ref": "#/$defs/A"}}, {"/$defs/A": True},
    ),
    "itself": ({"type": "object", "properties": {"next": {"$ref": "#"}}}, {"": True}),
    "optional, as in pydantic": (
        {"$defs": {"A": A}, "properties": {"p": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}}},
        {"": True, "/$defs/A": True},
    ),
    "one part of allOf": ({"allOf": [A], "description": "x"}, {"/allOf/0": True}),
    "parts of allOf": ({"allOf": [A, B]}, {"/allOf/0": False, "/allOf/1": False}),
    "inherited": (
        {"$defs": {"A": A}, "allOf": [{"$ref": "#/$defs/A"}], **B}, {"": False, "/$defs/A": False},
    ),
    "beside a reference": ({"$defs": {"A": A}, "$ref": "#/$defs/A", **B}, {"": False, "/$defs/A": False}),
    "required and not listed": ({**A, "required": ["b"]}, {"": False}),
    "more asked for than listed": ({**A, "minProperties": 2}, {"": False}),
    "as many asked for as listed": ({**A, "minProperties": 1}, {"": True}),
    "values listed": ({**A, "enum": [{"x": 1}]}, {"": False}),
    "branches of its own names": (
        {**A, "anyOf": [{"required": ["a"]}, {"properties": {"a": {"minimum": 1}}}]}, {"": True},
    ),
    "branches of other names": ({**A, "anyOf": [{"required": ["b"]}]}, {"": False}),
    "a condition on its own names": (
        {**A, "if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["a"]}}, {"": True},
    ),
    "not": ({"not": A}, {}),
    "not by reference": ({"$defs": {"A": A}, "not": {"$ref": "#/$defs/A"}}, {"/$defs/A": False}),
    "below not": ({"not": {"items": A}}, {"/not/items": False}),
    "in a condition and elsewhere": (
        {"$defs": {"A": A}, "if": {"$ref": "#/$defs/A"}, "then": {"type": "object"}, "items": {"$ref": "#/$defs/A"}},
        {"/$defs/A": False},
    ),
    "then and else": ({"if": {"type": "array"}, "then": {"items": A}, "else": B}, {"/then/items": True, "/else": True}),
    "oneOf, told apart": (
        {"oneOf": [kind("x"), kind("y", b={}), {"type": "null"}]}, {"/oneOf/0": True, "/oneOf/1": True},
    ),
    "oneOf of references, told apart": (
        {"$defs": {"X": kind("x"), "Y": kind("y")}, "oneOf": [{"$ref": "#/$defs/X"}, {"$ref": "#/$defs/Y"}]},
        {"/$defs/X": True, "/$defs/Y": True},
    ),
    "oneOf that overlaps": ({"oneOf": [A, B]}, {"/oneOf/0": False, "/oneOf/1": False}),
    "oneOf with the same tag": ({"oneOf": [kind("x"), kind("x")]}, {"/oneOf/0": False, "/oneOf/1": False}),
    "oneOf with a tag that may be missing": (
        {"oneOf": [{**kind("x"), "required": []}, kind("y")]}, {"/oneOf/0": False, "/oneOf/1": False},
    ),
    "oneOf with 1 and 1.0": (
        {"oneOf": [kind("x", n={"const": 1}), {**kind("x", n={"const": 1.0}), "required": ["kind", "n"]}]},
        {"/oneOf/0": False, "/oneOf/1": False},
    ),
    "contains": ({"contains": A}, {"/contains": True}),
    "at most so many": ({"contains": A, "maxContains": 1}, {"/contains": False}),
    "a draft that ignores siblings": (
        {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"A": A},
         "items": {"$ref": "#/definitions/A", "properties": {"x": {}}}},
        {"/definitions/A": True},
    ),
    "names with signs": ({"properties": {"a/b~c": A}}, {"": True, "/properties/a~1b~0c": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_which_objects_are_closed(name: str) -> None:
    schema, objects = CASES[name]
    assert found(schema) == objects
    if any(objects.values()):
        again = closing(schema)
        assert again != schema
        assert not any(found(again).values()), "once is enough"


def test_the_rest_of_a_schema_stays_as_it_is() -> None:
    schema = (
        '{"type":"object","properties":{"n":{"multipleOf":0.010000000000000000000001},'
        '"é":{"items":{"properties":{"x":{}}}}}}'
    )
    checked = checked_schema(schema)
    text = closed(checked, open_objects(checked), DEFAULT_LIMITS)
    assert "0.010000000000000000000001" in text
    assert "é" in text
    assert json.loads(text) == {
        **json.loads(schema),
        "properties": {
            "n": {"multipleOf": 0.010000000000000000000001},
            "é": {"items": {"properties": {"x": {}}, "additionalProperties": False}},
        },
        "additionalProperties": False,
    }


_EXTRA = st.dictionaries(st.sampled_from((*schemas.NAMES, "x")), schemas.values(), max_size=4)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    st.sampled_from(("object", "array")).flatmap(schemas.schemas),
    st.lists(schemas.values() | _EXTRA | st.lists(_EXTRA, max_size=2), min_size=8, max_size=16),
)
def test_what_fits_the_closed_schema_fits_the_schema(schema: Any, values: list[Any]) -> None:
    if not admitted(schema):
        return
    narrow = closing(schema)
    if narrow == schema:
        return
    event("closed")
    for value in values:
        text = json.dumps(value)
        if valid(narrow, text):
            event("fits")
            assert valid(schema, text), (narrow, text)
        elif valid(schema, text):
            event("fits the open schema alone")


_PARTS = st.fixed_dictionaries(
    {"properties": st.dictionaries(st.sampled_from("ab"), st.sampled_from(({}, {"const": 1})))},
    optional={
        "type": st.just("object"),
        "required": st.lists(st.sampled_from("abx"), max_size=2, unique=True),
    },
)
_BRANCHES = st.lists(_PARTS, min_size=1, max_size=3)
_JOINED = st.one_of(
    *(st.builds(lambda parts, keyword=k: {keyword: parts}, _BRANCHES) for k in ("oneOf", "anyOf")),
    st.builds(lambda parts: {"allOf": parts}, _BRANCHES),
    st.builds(lambda part: {"not": part}, _PARTS),
    st.fixed_dictionaries({"if": _PARTS, "then": _PARTS}, optional={"else": _PARTS}),
    st.builds(lambda one, part: {"contains": part, "maxContains": one}, st.integers(0, 2), _PARTS),
)
_OBJECTS = st.dictionaries(st.sampled_from("abx"), st.sampled_from((1, 2)), max_size=3)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    st.one_of(_JOINED, st.builds(lambda one, part: {**one, **part}, _JOINED, _PARTS)),
    st.booleans(),
    st.lists(_OBJECTS | st.lists(_OBJECTS, max_size=3), min_size=10, max_size=20),
)
def test_branches_and_conditions_are_not_loosened(
    schema: Any, by_reference: bool, values: list[Any]
) -> None:
    if by_reference:
        (keyword, *_) = [
            k for k in ("oneOf", "anyOf", "allOf", "not", "if", "contains") if k in schema
        ]
        held = schema[keyword]
        parts = held if isinstance(held, list) else [held]
        references = [{"$ref": f"#/$defs/{i}"} for i in range(len(parts))]
        moved = references if isinstance(held, list) else references[0]
        defined = {str(i): part for i, part in enumerate(parts)}
        schema = {**schema, keyword: moved, "$defs": defined, "additionalItems": references[0]}
    narrow = closing(schema)
    for value in values:
        if valid(narrow, json.dumps(value)):
            assert valid(schema, json.dumps(value)), (narrow, value)


def test_the_report_says_what_was_closed_and_what_was_not() -> None:
    schema = {
        "type": "object",
        "properties": {"p": A, "q": {"allOf": [A, {"required": ["b"]}]}},
        "minProperties": 1,
    }
    opened = compile_schema(json.dumps(schema))
    said = {one.pointer: one.why for one in opened.report.keywords if one.why}
    assert said == {
        "/properties": f"{OPEN}{CLOSE_BY}",
        "/properties/p/properties": OPEN,
        "/properties/q/allOf/0/properties": OPEN,
    }
    narrow = compile_schema(json.dumps(schema), options=Options(close_objects=True))
    assert narrow.report.enforcement is Enforcement.ENFORCED
    assert [one.pointer for one in narrow.report.rewrites if "close_objects" in one.what] == [
        "",
        "/properties/p",
    ]
    (left,) = [one for one in narrow.report.keywords if one.why]
    assert left.pointer == "/properties/q/allOf/0/properties"
    assert "unevaluatedProperties: false" in left.why
    assert json.loads(narrow.schema)["additionalProperties"] is False
    assert opened.schema == json.dumps(schema)


def test_closing_makes_counts_enforced() -> None:
    schema = {**A, "properties": {"a": {}, "b": {}}, "minProperties": 2}
    report = compile_schema(json.dumps(schema)).report
    (checked,) = report.checked
    assert checked.pointer == "/minProperties"
    for word in ("close_objects", 'extra="forbid"', "z.strictObject"):
        assert word in checked.why
    narrow = compile_schema(json.dumps(schema), options=Options(close_objects=True)).report
    assert narrow.enforcement is Enforcement.ENFORCED


def test_the_analysis_has_the_closed_schema_and_takes_it_again() -> None:
    asked = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(A), close_objects=True)
    grammar = analyse(asked, DEFAULT_LIMITS).grammar
    assert json.loads(grammar.source) == {**A, "additionalProperties": False}
    assert grammar.close_objects is True
    assert analyse(grammar, DEFAULT_LIMITS).grammar == grammar
    plain = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(A))
    assert analyse(plain, DEFAULT_LIMITS).grammar.source == plain.source


def test_a_schema_that_is_too_large_once_it_is_closed() -> None:
    text = json.dumps(A)
    limits = SchemaLimits(max_bytes=len(text))
    compile_schema(text, limits)
    with pytest.raises(GrammarError) as caught:
        compile_schema(text, limits, Options(close_objects=True))
    assert caught.value.reason == "SCHEMA_TOO_LARGE"
    assert "with its objects closed" in caught.value.violations[0].description


@pytest.mark.slow
def test_large_schemas() -> None:
    deep: dict[str, Any] = {}
    for i in range(3_000):
        deep[f"n{i}"] = {"$ref": f"#/$defs/n{i + 1}", "properties": {f"p{i}": {}}}
    deep["n3000"] = A
    wide = {"oneOf": [kind(str(i)) for i in range(600)]}
    assert found({"$defs": deep, "$ref": "#/$defs/n0"})["/$defs/n3000"] is False
    assert not any(found(wide).values())


def test_a_schema_as_deep_as_the_limits_allow_is_closed() -> None:
    deep = A
    for _ in range(120):  # two levels each, so more than an answer may have
        deep = {"type": "object", "properties": {"a": deep}}
    found = compile_schema(
        json.dumps(deep), SchemaLimits(max_depth=300), Options(close_objects=True)
    )
    assert found.report.enforcement is Enforcement.ENFORCED
    assert found.schema.count('"additionalProperties":') == 121
