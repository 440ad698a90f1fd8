"""The final validation: jsonschema is the oracle, the clock is the bound."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.errors import GrammarError, OutputInvalid
from service.tasks.answers import AnswerValidator, parse_json
from service.tasks.keywords import DRAFTS


def refused(schema: Any, text: str, **bounds: Any) -> OutputInvalid:
    with pytest.raises(OutputInvalid) as caught:
        AnswerValidator(json.dumps(schema), **bounds).parse(text)
    return caught.value


@pytest.mark.parametrize(
    ("schema", "answer", "pointer", "keyword"),
    [
        ({"type": "object"}, "[]", "", "type"),
        (
            {"properties": {"a/b": {"items": {"minimum": 3}}}},
            '{"a/b": [3, 2]}',
            "/a~1b/1",
            "minimum",
        ),
        ({"required": ["a"]}, "{}", "", "required"),
        ({"additionalProperties": False}, '{"x": 1}', "/x", "additionalProperties"),
        ({"patternProperties": {"^a": {"type": "string"}}}, '{"ab": 1}', "/ab", "type"),
        ({"items": {"pattern": "^a$"}}, '["a", "a\\n"]', "/1", "pattern"),
        ({"uniqueItems": True}, '[{"a": 1}, {"a": 1.0}]', "", "uniqueItems"),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}}, "1", "", "type"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "3", "", "oneOf"),
        (False, "1", "", "false"),
        ({"properties": {"a": False}}, '{"a": 1}', "/a", "false"),
        ({"const": 9007199254740993}, "9007199254740992", "", "const"),
        ({"maximum": 2}, "1e999", "", "json"),
        ({}, '{"a": 1, "a": 1}', "", "json"),
        ({}, "NaN", "", "json"),
        ({}, "-Infinity", "", "json"),
        ({}, "{} {}", "", "json"),
        ({}, "```json\n{}\n```", "", "json"),
        ({}, '{"a": 1', "", "json"),
        ({}, "'a'", "", "json"),
        ({}, '"\\ud800"', "", "json"),
        ({}, "9" * 5000, "", "json"),
        ({}, "[" * 300 + "]" * 300, "", "json"),
    ],
)
def test_the_first_violation_is_named(schema: Any, answer: str, pointer: str, keyword: str) -> None:
    error = refused(schema, answer)
    assert error.metadata == {"pointer": pointer, "keyword": keyword}


@pytest.mark.parametrize(
    "text",
    [
        '"\\ud83d\\ude00"',
        '"\u2028"',
        '"\\u0000"',
        "12345678901234567890123",
        " [1 , 2]\n",
        "-0",
        "1e5",
    ],
)
def test_odd_but_valid(text: str) -> None:
    assert AnswerValidator("true").parse(text) == json.loads(text)


def test_the_message_quotes_no_answer() -> None:
    secret = "the-words-of-the-picture"
    for schema, answer in (
        ({"type": "integer"}, f'"{secret}"'),
        ({"pattern": "x$"}, f'"{secret}"'),
        ({"enum": [1]}, f'["{secret}"]'),
        ({}, f'{{"a": "{secret}'),
    ):
        assert secret not in refused(schema, answer).message


def test_a_long_pointer_is_cut() -> None:
    error = refused({"additionalProperties": {"type": "null"}}, json.dumps({"k" * 9999: 1}))
    assert len(error.message) < 400
    assert len(error.metadata["pointer"]) <= 500


def test_work_that_explodes_is_ended() -> None:
    """Each level applies the next one twice: 2^40 checks from a schema of 40 lines."""
    levels = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**levels, "a40": {}}}
    for dialect in (*DRAFTS, None):
        if dialect is not None:
            schema["$schema"] = dialect
        began = time.process_time()
        error = refused(schema, "1", seconds=0.2)
        assert time.process_time() - began < 2
        assert "bounded time" in error.message


def test_a_reference_to_the_root_stays_bounded() -> None:
    """Meeting ``$schema`` again must not lead back to the library's own validator."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": {"a": {"$ref": "#"}, "b": {"pattern": "^a$"}},
    }
    error = refused(schema, '{"a": {"a": {"b": "a\\n"}}}')
    assert error.metadata == {"pointer": "/a/a/b", "keyword": "pattern"}


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "(x+x+)+y", r"^(\w+\s?)*$"])
def test_patterns_that_hang_others(pattern: str) -> None:
    began = time.process_time()
    refused({"pattern": pattern}, json.dumps("a" * 5000 + "!" + "x" * 20000))
    refused({"patternProperties": {pattern: False}}, json.dumps({"axxy" + "a" * 30: 1, "a": 1}))
    assert time.process_time() - began < 2


def test_a_pattern_too_slow_for_its_text_is_an_error() -> None:
    error = refused({"pattern": "(?:.?){6000}x"}, json.dumps("a" * 20_000))
    assert "bounded time" in error.message


@pytest.mark.parametrize("dialect", [None, *DRAFTS])
def test_dependencies_in_every_draft(dialect: str | None) -> None:
    """The later drafts have split the keyword up; it is not forgotten there."""
    schema: dict[str, Any] = {"dependencies": {"a": ["b"], "c": {"required": ["d"]}}}
    if dialect is not None:
        schema["$schema"] = dialect
    AnswerValidator(json.dumps(schema)).parse('{"a": 1, "b": 2}')
    assert refused(schema, '{"a": 1}').metadata["keyword"] == "dependencies"
    assert refused(schema, '{"c": 1}').metadata["keyword"] == "required"


@pytest.mark.slow
def test_unique_items_of_any_kind_in_linear_time() -> None:
    items = json.dumps([{"a": [i, {}]} for i in range(20_000)])
    began = time.process_time()
    AnswerValidator('{"uniqueItems": true}').parse(items)
    assert time.process_time() - began < 2


def test_a_number_that_overflows_the_arithmetic() -> None:
    assert "too large" in refused({"multipleOf": 0.1}, "9" * 400).message


names = st.sampled_from(["a", "b", "ab", "c"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.0, 1.0, 1.5, "", "a", "ab\n"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
leaves = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "array", "string", "integer", "number", "boolean"]),
        "minimum": st.integers(-2, 2),
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "minLength": st.integers(0, 2),
        "pattern": st.sampled_from(["a", "^a", "b+", "^[ab]{1,2}"]),
        "uniqueItems": st.booleans(),
        "required": st.lists(names, max_size=2, unique=True),
        "enum": st.lists(values, min_size=1, max_size=2),
        "const": values,
        "maxItems": st.integers(0, 2),
        "minProperties": st.integers(0, 2),
    },
)
schemas = st.recursive(
    leaves | st.booleans(),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "properties": st.dictionaries(names, inner, max_size=2),
            "patternProperties": st.dictionaries(
                st.sampled_from(["a", "^b", "c$"]), inner, max_size=2
            ),
            "additionalProperties": inner,
            "items": inner,
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "oneOf": st.lists(inner, min_size=1, max_size=2),
            "not": inner,
            "if": inner,
            "then": inner,
            "else": inner,
            "contains": inner,
            "minContains": st.integers(0, 2),
            "propertyNames": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "dependentSchemas": st.dictionaries(names, inner, max_size=2),
            "dependentRequired": st.dictionaries(names, st.lists(names, unique=True), max_size=2),
            "unevaluatedProperties": inner,
            "unevaluatedItems": inner,
            "$ref": st.sampled_from(["#/$defs/a", "#/$defs/b"]),
        },
    ),
    max_leaves=6,
)


def judge(schema: Any, value: Any) -> bool:
    try:
        AnswerValidator(json.dumps(schema)).parse(json.dumps(value))
    except OutputInvalid:
        return False
    return True


def in_draft(schema: Any, dialect: str) -> Any:
    """The schema without keywords of other drafts, which are refused."""
    if isinstance(schema, list):
        return [in_draft(item, dialect) for item in schema]
    if not isinstance(schema, dict):
        return schema
    foreign = DRAFTS[dialect].foreign
    return {k: in_draft(v, dialect) for k, v in schema.items() if k not in foreign}


@pytest.mark.slow
@settings(max_examples=150)
@given(schemas, leaves, leaves, values, st.sampled_from([*DRAFTS]))
def test_the_library_agrees(schema: Any, a: Any, b: Any, value: Any, dialect: str) -> None:
    if isinstance(schema, dict):
        schema = {**schema, "$schema": dialect, "$defs": {"a": a, "b": b}}
        schema = in_draft(schema, dialect)
    cls = jsonschema.validators.validator_for(schema)
    try:
        cls.check_schema(schema)
    except jsonschema.SchemaError:
        assume(False)
    judged = None
    with contextlib.suppress(GrammarError):  # references that lead back to themselves
        judged = judge(schema, value)
    assume(judged is not None)
    assert judged == cls(schema).is_valid(value)


@settings(max_examples=200)
@given(values)
def test_an_answer_is_what_json_says(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
