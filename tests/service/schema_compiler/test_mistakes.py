"""Warnings on schemas: what is found, and what is left alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from service.errors import GrammarError
from service.schema_compiler.frontend import schema_warnings as mistakes
from service.schema_compiler.frontend.checked_schema import checked_schema
from service.schema_compiler.frontend.drafts import ASSERTING
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import SchemaWarning, WarningKind

COLLECTION = Path(__file__).parents[4] / "shared" / "maskbench" / "public.jsonl"
DRAFT7 = "http://json-schema.org/draft-07/schema#"
DRAFT4 = "http://json-schema.org/draft-04/schema#"
OBJECT = {"type": "object"}


def found(schema: Any, kind: WarningKind | None = None) -> list[SchemaWarning]:
    warnings = mistakes.find(checked_schema(json.dumps(schema)))
    return [one for one in warnings if kind is None or one.kind is kind]


def misspelt(schema: Any) -> list[tuple[str, str]]:
    """Pointers, and the keywords that are named in their place."""
    warnings = found(schema, WarningKind.MISSPELT_KEYWORD)
    return [(one.pointer, one.message.split("; ")[1].removesuffix(" is one")) for one in warnings]


@pytest.mark.parametrize(
    ("name", "value", "keyword"),
    [
        ("propertes", {"a": {}}, "properties"),
        ("requried", ["a"], "required"),
        ("requires", ["a"], "required"),
        ("additonalProperties", False, "additionalProperties"),
        ("aditionalPropertis", False, "additionalProperties"),
        ("additional_properties", False, "additionalProperties"),
        ("enums", ["a"], "enum"),
        ("Enum", ["a"], "enum"),
        ("Type", "object", "type"),
        ("tpye", ["object"], "type"),
        ("$type", "string", "type"),
        ("types", "string", "type"),
        ("maxlength", 3, "maxLength"),
        ("max_length", 3, "maxLength"),
        ("minimun", 3, "minimum"),
        ("pattren", "^a", "pattern"),
        ("any_of", [{}, {}], "anyOf"),
        ("oneof", [{}], "oneOf"),
        ("item", {"type": "string"}, "items"),
        ("ref", "#/$defs/a", "$ref"),
        ("uniqueItem", True, "uniqueItems"),
        ("patternProperty", {"^a": {}}, None),  # three letters away
        ("If", {"type": "string"}, "if"),
        ("cosnt", 3, "const"),
    ],
)
def test_misspelt_keywords(name: str, value: Any, keyword: str | None) -> None:
    schema = {**({} if "ype" in name or name == "tpye" else OBJECT), name: value}
    expected = [] if keyword is None else [(f"/{name}", keyword)]
    assert misspelt({"items": schema, "not": {"const": 1}}) == [
        (f"/items{pointer}", meant) for pointer, meant in expected
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("note", "a text"),
        ("x-requried", ["a"]),
        ("_required", ["a"]),
        ("example", {"a": 1}),
        ("nullable", True),
        ("discriminator", {"propertyName": "kind"}),
        ("id", "a"),
        ("iff", True),
        ("when", "a > 1"),
        ("formats", ["a", "b"]),
        ("types", {"a": 1}),
        ("enumNames", ["a"]),
        ("option", ["a"]),
        ("requires", "python>=3.10"),
        ("require", True),
        ("item", "a"),
        ("ref", "branch"),
        ("propertyOrder", 3),
        ("min", 1),
        ("defaults", {}),
        ("descripton", "a"),
        ("patterns", ["^a"]),
        ("$defs", {}),
        ("", {}),
        ("q" * 5000, {}),
    ],
)
def test_names_that_are_no_keywords_on_purpose(name: str, value: Any) -> None:
    assert misspelt(OBJECT | {name: value}) == []


def test_names_are_compared_only_where_keywords_stand() -> None:
    schema = {
        "properties": {"requried": {"type": "string"}, "enums": {"const": {"propertes": {}}}},
        "default": {"requried": ["a"]},
        "$defs": {"never": {"requried": ["a"]}},
        "required": ["a"],
        "require": ["a"],  # beside the keyword itself
    }
    assert misspelt(schema) == []
    beside = {"$schema": DRAFT7, "items": {"$ref": "#/definitions/a", "requried": ["a"]}}
    assert misspelt(beside | {"definitions": {"a": OBJECT}}) == []


def test_every_keyword_is_known_in_other_cases_and_with_one_letter_less() -> None:
    for keyword in ASSERTING:
        assert keyword in mistakes._close_to(keyword.upper(), compared=True)
        if len(keyword.strip("$")) >= 5:
            assert mistakes._close_to(keyword[:-1], compared=True)[0] == keyword
        assert mistakes._Names().meant(keyword, None) is None


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_the_warnings_on_public_schemas_are_mistakes(step: int) -> None:
    """All of them were looked at: each means the keyword that is named."""
    if not COLLECTION.is_file():
        pytest.skip("the collection of public schemas is not there")
    names: Counter[tuple[str, str]] = Counter()
    limits = SchemaLimits(max_bytes=40_000)
    for line in COLLECTION.read_text().splitlines()[::step]:
        try:
            warnings = mistakes.find(checked_schema(json.dumps(json.loads(line)["schema"]), limits))
        except GrammarError:
            continue
        for one in warnings:
            if one.kind is WarningKind.MISSPELT_KEYWORD:
                names[one.pointer.rpartition("/")[2], one.message] += 1
    known = {"requires", "additonalProperties", "requred", "item"}
    assert {name for name, _ in names} <= known


@pytest.mark.parametrize(
    ("schema", "advice"),
    [
        ({"type": "string", "nullable": True}, '"type": ["string", "null"]'),
        ({"type": ["string", "integer"], "nullable": True}, '"type": ["string", "integer", "null"]'),
        (
            {"type": "string", "enum": ["a"], "nullable": True},
            '"type": ["string", "null"], and null among the values of enum',
        ),
        ({"allOf": [OBJECT], "nullable": True}, '{"anyOf": [{…}, {"type": "null"}]}'),
    ],
)  # fmt: skip
def test_nullable(schema: Any, advice: str) -> None:
    (one,) = found({"properties": {"a/b": schema}}, WarningKind.NULLABLE)
    assert one.pointer == "/properties/a~1b/nullable"
    assert one.message.endswith(f"write {advice}")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "nullable": False},
        {"type": ["string", "null"], "nullable": True},
        {"properties": {"nullable": {"type": "boolean"}}},
    ],
)
def test_nullable_without_effect(schema: Any) -> None:
    assert found(schema, WarningKind.NULLABLE) == []


@pytest.mark.parametrize(
    ("schema", "hint"),
    [
        (True, ""),
        ({}, ""),
        ({"title": "a", "description": "b", "x-own": 1}, ""),
        ({"properties": {"a": {}, "b": {"items": {}}}, "additionalProperties": True}, ""),
        ({"format": "no-such-format", "required": []}, ""),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {}}}, '"$ref": "#/$defs/a"'),
        ({"$defs": {"a/b": OBJECT}}, '"$ref": "#/$defs/a~1b"'),
        ({"definitions": {"a": OBJECT}}, '"$ref": "#/definitions/a"'),
        ({"Invoice": OBJECT}, '"/Invoice" looks like a schema'),
    ],
)
def test_a_schema_that_constrains_nothing(schema: Any, hint: str) -> None:
    (one,) = found(schema)
    assert (one.pointer, one.kind) == ("", WarningKind.CONSTRAINS_NOTHING)
    assert one.message.startswith("constrains nothing: every JSON value fits")
    assert one.message.endswith(hint)


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"type": "object"},
        {"properties": {"a": {"type": "string"}}},
        {"properties": {"a": False}},
        {"additionalProperties": False},
        {"not": {}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"minimum": 1}}},
        {"format": "date"},
        {"prefixItems": [True, False]},
    ],
)
def test_a_schema_that_constrains_something(schema: Any) -> None:
    assert found(schema, WarningKind.CONSTRAINS_NOTHING) == []


@pytest.mark.parametrize(
    ("schema", "pointer", "part"),
    [
        ({"$schema": DRAFT4, "items": {"const": 1}}, "/items/const", "newer than draft-04"),
        ({"$schema": DRAFT4, "exclusiveMinimum": 1}, "/exclusiveMinimum", "newer than draft-04"),
        ({"minimum": 1, "exclusiveMinimum": True}, "/exclusiveMinimum", "as in draft-04"),
        ({"items": [{"type": "null"}]}, "/items", "called prefixItems"),
        (
            {"$schema": DRAFT4, "properties": {"a": {"const": 1}, "b": {"const": 2}}},
            "/properties/a/const", "(and 1 more)",
        ),
    ],
)  # fmt: skip
def test_what_is_read_as_in_another_draft(schema: Any, pointer: str, part: str) -> None:
    (one,) = found(schema)
    assert (one.pointer, one.kind) == (pointer, WarningKind.OTHER_DRAFT)
    assert part in one.message


@pytest.mark.parametrize(
    ("schema", "pointer", "part"),
    [
        (
            {"$schema": DRAFT7, "items": {"$ref": "#/definitions/a", "maxItems": 1, "title": "t"},
             "definitions": {"a": {"type": "array"}}},
            "/items/maxItems", "beside $ref, where draft-07 ignores everything",
        ),
        ({"type": "array", "then": {"maxItems": 1}}, "/then", "without if"),
        ({"type": "array", "minContains": 2}, "/minContains", "without contains"),
        ({"prefixItems": [{"type": "null"}], "additionalItems": False}, "/additionalItems", "call it items"),
    ],
)  # fmt: skip
def test_keywords_that_say_nothing_where_they_stand(schema: Any, pointer: str, part: str) -> None:
    (one,) = found(schema)
    assert (one.pointer, one.kind) == (pointer, WarningKind.IGNORED)
    assert part in one.message


def test_a_part_that_never_applies_and_is_wrong() -> None:
    schema = OBJECT | {"$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/none"}}}}}
    (one,) = found(schema)
    assert (one.pointer, one.kind) == ("/$defs/a/properties/b/$ref", WarningKind.UNUSED)
    assert one.message == "never applies to a value; if it did: points to nothing in this schema"


def test_nothing_is_said_of_ordinary_schemas() -> None:
    assert found(
        {
            "$schema": DRAFT7, "title": "t", "type": "object", "required": ["a"], "examples": [{}],
            "properties": {"a": {"type": ["string", "null"], "format": "date"},
                           "b": {"$ref": "#/definitions/b", "description": "d", "default": 1},
                           "c": {"items": {"type": "string"}, "additionalItems": False}},
            "definitions": {"b": {"type": "integer", "minimum": 1}, "unused": {"type": "string"}},
        }
    ) == []  # fmt: skip


def test_warnings_of_a_kind_are_bounded_and_counted() -> None:
    many = {f"p{i}": {"type": "string", "nullable": True} for i in range(80)}
    warnings = found({"properties": many})
    assert len(warnings) == mistakes.MAX_OF_A_KIND
    assert warnings[-1].message.endswith("(and 30 more)")


@pytest.mark.slow
def test_thousands_of_unknown_names_take_bounded_time() -> None:
    names = {f"additional{i}proprties"[:26]: 1 for i in range(4_000)}
    schema = checked_schema(json.dumps(OBJECT | names))
    began = time.process_time()
    mistakes.find(schema)
    assert time.process_time() - began < 3
