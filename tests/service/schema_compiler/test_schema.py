"""Which schemas are admitted, and how the others are refused."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import GrammarError, OutputInvalid, ServiceError
from service.schema_compiler.frontend.checked_schema import check_json_schema, checked_schema
from service.schema_compiler.limits import SchemaLimits
from service.structured_output.answers import AnswerValidator

DRAFT7 = "http://json-schema.org/draft-07/schema#"
DRAFT4 = "http://json-schema.org/draft-04/schema#"
DRAFT2020 = "https://json-schema.org/draft/2020-12/schema"


def refused(schema: Any, limits: SchemaLimits = SchemaLimits()) -> GrammarError:  # noqa: B008 - frozen
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(GrammarError) as caught:
        check_json_schema(text, limits, "task.inline.grammar.json_schema")
    assert caught.value.violations[0].field == "task.inline.grammar.json_schema"
    return caught.value


@pytest.mark.parametrize(
    "schema",
    [
        True,
        False,
        {},
        {"required": ["a"]},
        {"$schema": DRAFT7, "type": "object"},
        {
            "$schema": "http://json-schema.org/draft-04/schema",
            "minimum": 1,
            "exclusiveMinimum": True,
        },
        {"$schema": "http://json-schema.org/draft-06/schema#", "const": 1},
        {"$schema": "https://json-schema.org/draft/2019-09/schema", "minContains": 1},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "prefixItems": [True]},
        {"properties": {"child": {"$ref": "#"}}},
        {"$defs": {"a": {"$anchor": "x", "type": "string"}}, "items": {"$ref": "#x"}},
        {
            "$id": "https://example.com/s",
            "$defs": {"a": {}},
            "$ref": "https://example.com/s#/$defs/a",
        },
        {"x-own": {"type": "string"}, "items": {"$ref": "#/x-own"}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}},
        {"properties": {"$ref": {"type": "string"}, "$schema": {"type": "string"}}},
        {"properties": {"pattern": {"type": "string"}}, "default": {"$ref": "http://x"}},
        {"enum": [{"$ref": "http://x/"}]},
        {"title": "ü 😀 \u2028"},
        {"$schema": DRAFT7, "$defs": {"a": {"type": False}}},  # no keyword there, and never used
        {"$schema": DRAFT4, "properties": {"$ref": {"type": "string"}}},
    ],
)
def test_admitted_as_sent(schema: Any) -> None:
    assert check_json_schema(json.dumps(schema)) == schema


@pytest.mark.parametrize(
    "text", ["", "{", "nul", "{'a': 1}", '{"a": NaN}', "{} {}", '{"a": 1e999}']
)
def test_not_json(text: str) -> None:
    assert refused(text).reason == "SCHEMA_NOT_JSON"


def test_a_duplicate_key_is_refused() -> None:
    error = refused('{"type": "string", "type": "number"}')
    assert error.reason == "SCHEMA_NOT_JSON"
    assert 'duplicate key "type"' in error.message


@pytest.mark.parametrize("schema", [1, "x", [], None])
def test_not_a_schema(schema: Any) -> None:
    assert refused(json.dumps(schema)).reason == "SCHEMA_INVALID"


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "strin"}, "/type"),
        ({"properties": {"a/b": {"minLength": -1}}}, "/properties/a~1b/minLength"),
        ({"required": "a"}, "/required"),
        ({"required": ["a", "a"]}, "/required"),
        ({"$schema": DRAFT2020, "items": [{}]}, "/items"),
        ({"$schema": DRAFT7, "exclusiveMinimum": True, "minimum": 1}, "/exclusiveMinimum"),
        (
            {"$schema": DRAFT4, "maximum": 1, "items": {"exclusiveMaximum": True}},
            "/items/exclusiveMaximum",
        ),
        ({"exclusiveMinimum": True}, "/exclusiveMinimum"),
        ({"items": [{}], "prefixItems": [{}]}, "/items"),
        ({"$schema": DRAFT7, "dependentRequired": {"a": "b"}}, "/dependentRequired/a"),
        ({"$schema": DRAFT4, "if": 3}, "/if"),
        ({"$schema": DRAFT7, "prefixItems": [{"type": "strin"}]}, "/prefixItems/0/type"),
        ({"$schema": DRAFT4, "enum": []}, "/enum"),
        ({"allOf": []}, "/allOf"),
        ({"$schema": "https://example.com/own"}, "/$schema"),
        ({"$schema": 7}, "/$schema"),
        ({"$schema": DRAFT7, "additionalItems": 3}, "/additionalItems"),
        ({"$ref": "#/$defs/none"}, "/$ref"),
        ({"items": {"$ref": "#nowhere"}}, "/items/$ref"),
        ({"$ref": "#/x", "x": 3}, "/$ref"),
        ({"items": {"$ref": "#/x"}, "x": {"type": 3}}, "/items/$ref/type"),
        ({"$schema": DRAFT4, "items": {"$ref": {}}}, "/items/$ref"),
        ({"$schema": DRAFT4, "type": "string", "$ref": [3]}, "/$ref"),
        ({"$schema": DRAFT4, "items": {"$ref": None}}, "/items/$ref"),
        (
            {"$schema": DRAFT7, "$ref": "#/$defs/a", "$defs": {"a": {"items": {"type": False}}}},
            "/$defs/a/items/type",
        ),
        (
            {"$schema": DRAFT7, "$ref": "#/$defs/a/not", "$defs": {"a": {"not": {"type": 1}}}},
            "/$defs/a/not/type",
        ),
        (
            {
                "items": {"$schema": DRAFT7},
                "$schema": "https://json-schema.org/draft/2020-12/schema",
            },
            "/items/$schema",
        ),
    ],
)
def test_invalid_with_a_pointer(schema: Any, pointer: str) -> None:
    error = refused(schema)
    assert error.reason == "SCHEMA_INVALID"
    assert error.metadata["pointer"] == pointer
    assert pointer in error.message


@pytest.mark.parametrize(
    "reference",
    [
        "http://169.254.169.254/latest",
        "https://json-schema.org/draft/2020-12/schema",
        "file:///etc/passwd",
        "other.json#/a",
        "//host/x",
        "urn:x:y",
    ],
)
@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
def test_nothing_outside_the_schema_is_referred_to(keyword: str, reference: str) -> None:
    error = refused({"properties": {"a": {keyword: reference}}})
    assert error.reason == "SCHEMA_REMOTE_REF"
    assert error.metadata["pointer"] == f"/properties/a/{keyword}"
    assert reference not in error.message


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"not": {"$ref": "#"}},
        {"if": {"$ref": "#"}},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"anyOf": [True, {"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}},
        },
        {"dependentSchemas": {"a": {"$ref": "#"}}},
    ],
)
def test_a_schema_that_never_ends_is_refused(schema: Any) -> None:
    error = refused(schema)
    assert error.reason == "SCHEMA_INVALID"
    assert "without end" in error.message


def test_size() -> None:
    text = json.dumps({"title": "é" * 100}, ensure_ascii=False)
    size = len(text.encode())
    check_json_schema(text, SchemaLimits(max_bytes=size))
    error = refused(text, SchemaLimits(max_bytes=size - 1))
    assert error.reason == "SCHEMA_TOO_LARGE"
    assert error.metadata == {"limit": str(size - 1), "actual": str(size)}


def nested(levels: int) -> str:
    return '{"not":' * (levels - 1) + "{}" + "}" * (levels - 1)


def test_depth() -> None:
    check_json_schema(nested(64))
    error = refused(nested(65))
    assert error.reason == "SCHEMA_TOO_DEEP"
    assert error.metadata == {"limit": "64", "actual": "65"}


@pytest.mark.parametrize("text", ["[" * 60_000, '{"a":' * 13_000, "[" * 30_000 + "]" * 30_000])
def test_depth_is_known_before_anything_recurses(text: str) -> None:
    assert refused(text).reason == "SCHEMA_TOO_DEEP"


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"pattern": "^b(?<!a)"}, "look-behind"),
        ({"pattern": r"(a)\1"}, "back-references"),
        ({"patternProperties": {"(": True}}, "parenthesis"),
        ({"items": {"pattern": "a" * 1025}}, "1025 characters"),
        ({"pattern": "(?:(?:a{0,99}){0,99}){0,99}"}, "too large"),
        ({"items": {"$ref": "#/x"}, "x": {"pattern": "["}}, "bracket"),
    ],
)
def test_patterns_run_in_linear_time_or_are_refused(schema: Any, what: str) -> None:
    error = refused(schema)
    assert error.reason == "SCHEMA_PATTERN_UNSUPPORTED"
    assert what in error.message


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"$schema": DRAFT7, "properties": {"a": {"$dynamicRef": "#"}}}, "/properties/a/$dynamicRef"),
        ({"properties": {"a": {"$recursiveRef": "#"}}}, "/properties/a/$recursiveRef"),
        (
            {"$schema": DRAFT7, "$ref": "#/definitions/a", "unevaluatedProperties": False,
             "definitions": {"a": {"type": "object"}}},
            "/unevaluatedProperties",
        ),
    ],
)  # fmt: skip
def test_a_keyword_that_can_take_no_effect_is_refused(schema: Any, pointer: str) -> None:
    error = refused(schema)
    assert error.reason == "SCHEMA_UNSUPPORTED"
    assert error.metadata["pointer"] == pointer
    assert "in $schema" in error.message


@pytest.mark.parametrize(
    ("name", "draft"),
    [
        ("https://json-schema.org/draft-07/schema#", "draft-07"),
        ("http://json-schema.org/draft-07/schema", "draft-07"),
        ("http://json-schema.org/draft-07/schema#/", "draft-07"),
        (" HTTP://JSON-Schema.org/draft-07/schema/ ", "draft-07"),
        ("//json-schema.org/draft-07/schema#", "draft-07"),
        ("json-schema.org/draft-06/schema.json#", "draft-06"),
        ("http://json-schema.org/draft-05/schema#", "draft-04"),
        ("http://json-schema.org/draft-04/hyper-schema#", "draft-04"),
        ("http://www.json-schema.org/draft-04/schema#", "draft-04"),
        ("http://json-schema.org/draft/2019-09/schema#", "2019-09"),
        ("https://json-schema.org/draft/2020-12/schema#", "2020-12"),
        ("http://json-schema.org/schema#", "2020-12"),
        ("https://json-schema.org/schema", "2020-12"),
    ],
)
def test_spellings_of_the_draft(name: str, draft: str) -> None:
    assert checked_schema(json.dumps({"$schema": name, "type": "string"})).draft.name == draft
    inside = {"$schema": DRAFT7, "items": {"$schema": name}}
    if draft == "draft-07":
        assert check_json_schema(json.dumps(inside)) == inside
    else:
        assert "another draft" in refused(inside).message


@pytest.mark.parametrize(
    "name",
    ["http://json-schema.org/draft-03/schema#", "http://json-schema.org/draft-07/", "draft-07", "",
     "https://example.com/json-schema.org/draft-07/schema#", "http://json-schema.org/draft-07/schema#a"],
)  # fmt: skip
def test_an_unknown_draft_is_refused(name: str) -> None:
    error = refused({"$schema": name})
    assert error.metadata["pointer"] == "/$schema"
    assert "https://json-schema.org/draft/2020-12/schema" in error.message


def judged(schema: Any, text: str) -> bool:
    try:
        AnswerValidator(json.dumps(schema)).parse(text)
    except OutputInvalid:
        return False
    return True


@pytest.mark.parametrize(
    ("schema", "fits", "fits_not"),
    [
        ({"$schema": DRAFT4, "enum": ["a", 1, "a", 1.0]}, "1", '"b"'),
        ({"$schema": DRAFT4, "exclusiveMinimum": 1}, "2", "1"),
        ({"$schema": DRAFT4, "maximum": 3, "exclusiveMaximum": 2}, "1", "2"),
        ({"$schema": DRAFT4, "required": [], "additionalProperties": False}, "{}", '{"a": 1}'),
        ({"$schema": DRAFT4, "properties": {"a": False, "b": True}}, '{"b": 1}', '{"a": 1}'),
        ({"minimum": 1, "exclusiveMinimum": True}, "2", "1"),
        ({"minimum": 1, "exclusiveMinimum": False}, "1", "0"),
        ({"maximum": 1, "exclusiveMaximum": True}, "0", "1"),
        ({"items": [{"type": "null"}], "additionalItems": False}, "[null]", "[null, 1]"),
        ({"items": [{"type": "null"}, {"const": 1}]}, "[null, 1, 2]", "[null, 2]"),
        ({"items": [{}], "unevaluatedItems": False}, "[1]", "[1, 2]"),
        ({"$schema": DRAFT7, "prefixItems": [{"const": 1}], "items": False}, "[1]", "[1, 2]"),
        ({"$schema": DRAFT7, "contains": {"const": 1}, "maxContains": 1}, "[1, 2]", "[1, 1]"),
        ({"$schema": DRAFT7, "$defs": {"a": {"const": 1}}, "items": {"$ref": "#/$defs/a"}}, "[1]", "[2]"),
        (
            {"$schema": DRAFT7, "allOf": [{"$ref": "#/definitions/a"}], "unevaluatedProperties": False,
             "definitions": {"a": {"properties": {"a": {}}}}},
            '{"a": 1}', '{"b": 1}',
        ),
    ],
)  # fmt: skip
def test_other_forms_and_newer_keywords_are_asserted(schema: Any, fits: str, fits_not: str) -> None:
    assert judged(schema, fits)
    assert not judged(schema, fits_not)


@pytest.mark.parametrize(
    "part",
    [
        {"$ref": "#/definitions/missing"},
        {"$ref": "https://example.com/elsewhere"},
        {"$ref": "#/definitions/part"},
        {"items": {"pattern": "(?<=a)b"}},
        {"properties": {"a": {"$dynamicRef": "#"}}},
        {"allOf": [{"$schema": "http://json-schema.org/draft-04/schema#"}]},
    ],
)
def test_a_part_that_nothing_refers_to_is_not_refused(part: Any) -> None:
    unused = {"$schema": DRAFT7, "type": "object", "definitions": {"part": part}}
    assert check_json_schema(json.dumps(unused)) == unused
    used = unused | {"additionalProperties": {"$ref": "#/definitions/part"}}
    assert refused(used).metadata["pointer"].startswith("/definitions/part")
    beside = {
        "$schema": DRAFT7,
        "items": {"$ref": "#/definitions/a", "not": part},
        "definitions": {"a": {}},
    }
    assert check_json_schema(json.dumps(beside)) == beside


ENVELOPES = [
    ({"name": "n", "strict": True, "schema": {"type": "object"}}, "/schema"),
    ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"anyOf": [{}]}}}, "/json_schema/schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 1}}}},
     "/response_format/json_schema/schema"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"enum": [1]}}}}, "/text/format/schema"),
    ({"name": "n", "description": "d", "input_schema": {"properties": {}}}, "/input_schema"),
    ({"name": "n", "inputSchema": {"$ref": "#/$defs/a", "$defs": {"a": {}}}}, "/inputSchema"),
    ({"type": "function", "function": {"name": "n", "parameters": {"type": "object"}}}, "/function/parameters"),
    ({"type": "function", "name": "n", "parameters": {"type": "object"}, "strict": True}, "/parameters"),
    ({"title": "t", "$schema": DRAFT7, "schema": {"$defs": {"a": {}}, "title": "x"}}, "/schema"),
]  # fmt: skip


@pytest.mark.parametrize(("envelope", "pointer"), ENVELOPES)
def test_an_envelope_is_refused_with_the_member_to_send(envelope: Any, pointer: str) -> None:
    error = refused(envelope)
    assert error.reason == "SCHEMA_ENVELOPE"
    assert error.metadata == {"pointer": pointer}
    assert f'holds one at "{pointer}": send that member alone' in error.message


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "schema": {"type": "object"}},
        {"properties": {"schema": {"type": "object"}, "parameters": {"type": "object"}}},
        {"schema": "http://example.com"},
        {"parameters": {"a": 1}, "description": "d"},
        {"schema": {}},
        {"$ref": "#/schema", "schema": {"type": "object"}},
        {"$defs": {"schema": {"type": "object"}}},
        {"format": "date", "schema": {"type": "object"}},
    ],
)
def test_a_schema_with_such_a_member_is_no_envelope(schema: Any) -> None:
    assert check_json_schema(json.dumps(schema)) == schema


def put_together(*drafts: str) -> dict[str, Any]:
    """A root without a draft, and definitions that name theirs. In draft-04 a bound is exclusive by a boolean."""
    named = {f"d{i}": {"$schema": uri} for i, uri in enumerate(drafts)}
    bound = {"minimum": 1, "exclusiveMinimum": True}
    return {"definitions": named, "properties": {"a": bound}}


def test_subschemas_that_agree_on_a_draft_name_it_for_the_whole() -> None:
    schema = put_together(
        "http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-04/schema"
    )
    validator = AnswerValidator(json.dumps(schema))
    assert validator.parse('{"a": 2}') == {"a": 2}
    with pytest.raises(OutputInvalid):
        validator.parse('{"a": 1}')


@pytest.mark.parametrize("other", [DRAFT7, "http://example.com/mine"])
def test_subschemas_that_do_not_agree_on_a_known_draft_are_refused(other: str) -> None:
    schema = put_together("http://json-schema.org/draft-04/schema#", other)
    used = {
        "properties": {name: {"$ref": f"#/definitions/{name}"} for name in schema["definitions"]}
    }
    assert "another draft" in refused(json.dumps(schema | used)).message


@pytest.mark.parametrize(
    ("draft", "name"), [("draft-04", "id"), ("draft-06", "$id"), ("draft-07", "$id")]
)
def test_a_reference_leads_past_a_property_of_this_name(draft: str, name: str) -> None:
    """The library takes the properties for a schema with a base of its own."""
    schema = {
        "$schema": f"http://json-schema.org/{draft}/schema#",
        "properties": {
            "a": {"items": {"properties": {name: {"type": "string"}, "b": {"type": "null"}}}},
            "c": {"$ref": "#/properties/a/items/properties/b"},
        },
    }
    validator = AnswerValidator(json.dumps(schema))
    validator.check('{"c": null}')
    with pytest.raises(OutputInvalid):
        validator.check('{"c": 1}')


@pytest.mark.parametrize("place", ["const", "properties", "title-of-mine"])
def test_names_that_are_no_keywords_there_are_left_alone(place: str) -> None:
    schema = {"$schema": DRAFT7, place: {"prefixItems": {"type": "array"}}}
    assert check_json_schema(json.dumps(schema)) == schema


@pytest.mark.slow
def test_a_hostile_schema_is_checked_in_bounded_time() -> None:
    """Arrays of unequal types make the library compare each with each."""
    began = time.process_time()
    refused('{"required": [' + ",".join(["{}", "[]", "1"] * 7000) + "]}")
    refused({f"x{i}": 0 for i in range(100)} | {"type": ["string"] * 6000})
    assert time.process_time() - began < 6


@pytest.mark.slow
def test_look_aheads_of_all_patterns_together_are_bounded() -> None:
    error = refused({"allOf": [{"pattern": f"^(?:(?!{i}x).)*$"} for i in range(1_000)]})
    assert error.reason == "SCHEMA_PATTERN_UNSUPPORTED"
    assert "too large together" in error.message
    check_json_schema(json.dumps({"allOf": [{"pattern": f"^(?:(?!{i}x).)*$"} for i in range(100)]}))


def test_a_repeated_schema_is_compiled_once() -> None:
    text = json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(300)}})
    assert checked_schema(text) is checked_schema(text)


keys = st.sampled_from(
    ["type", "$ref", "$id", "$schema", "items", "properties", "allOf", "not", "pattern", "enum",
     "$defs", "required", "minimum", "$anchor", "$dynamicRef", "patternProperties", "a"]
)  # fmt: skip
scalars = st.sampled_from(
    [
        "string",
        "#",
        "#/$defs/a",
        "#a",
        "http://x",
        "a",
        "(",
        DRAFT7,
        "%",
        "http://[",
        1,
        -1,
        True,
        None,
    ]
)
jsons = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=300)
@given(jsons)
def test_any_json_is_admitted_or_refused(schema: Any) -> None:
    with contextlib.suppress(GrammarError):
        validator = checked_schema(json.dumps(schema))
        assert validator.document == schema


@pytest.mark.slow
@settings(max_examples=200)
@given(st.text(max_size=30) | st.text('{}[]",:\\ "$ref#', max_size=40))
def test_any_text_is_admitted_or_refused(text: str) -> None:
    with contextlib.suppress(ServiceError):
        check_json_schema(text)


_FOURTH = "http://json-schema.org/draft-04/schema#"


@pytest.mark.parametrize(
    "document",
    [
        {"items": [{"$anchor": "a", "type": "null"}], "additionalItems": {"$ref": "#a"}},
        {"items": [{"$id": "a:b", "type": "null"}], "additionalItems": {"$ref": "a:b"}},
        {
            "$schema": _FOURTH,
            "properties": {"a": True},
            "items": [{"id": "#a", "type": "null"}],
            "additionalItems": {"$ref": "#a"},
        },
    ],
)
def test_names_are_found_beside_forms_of_other_drafts(document: dict[str, Any]) -> None:
    """Lists as items of the latest draft, and booleans in draft-04."""
    validator = AnswerValidator(json.dumps(document))
    validator.parse("[null, null]")
    with pytest.raises(OutputInvalid):
        validator.parse("[null, 1]")


@pytest.mark.parametrize(
    "schema", [{"items": [{}]}, {"$schema": _FOURTH, "properties": {"a": True}}]
)
def test_names_that_nothing_has_beside_forms_of_other_drafts(schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match=r'at "/not/\$ref": points to nothing in this schema'):
        checked_schema(json.dumps({**schema, "not": {"$ref": "#nowhere"}}))
