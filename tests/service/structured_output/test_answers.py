"""The final validation: jsonschema is the oracle, the clock is the bound."""

from __future__ import annotations

import contextlib
import json
import random
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.judge import judged
from service.errors import GrammarError, OutputInvalid
from service.schema_compiler.frontend.drafts import DRAFTS
from service.structured_output.answers import AnswerValidator, parse_json


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
        ({"type": "object", "minProperties": 2}, '{"a": 1, "a": 2}', "", "minProperties"),
        ({"properties": {"a": {"minimum": 3}}}, '{"a": 3, "a": 2}', "/a", "minimum"),
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


@pytest.mark.parametrize("draft", [*DRAFTS, ""])
@pytest.mark.parametrize(
    ("keyword", "value", "answer"),
    [
        ("type", "string", "1"),
        ("type", ["string", "null"], "1"),
        ("type", "integer", "1.5"),
        ("enum", [1, "a"], "2"),
        ("const", 1, "2"),
        ("format", "date", '"a"'),
        ("pattern", "^a", '"b"'),
        ("minLength", 2, '"a"'),
        ("maxLength", 1, '"ab"'),
        ("minimum", 1, "0"),
        ("maximum", 1, "2"),
        ("exclusiveMinimum", 1, "1"),
        ("exclusiveMaximum", 1, "1"),
        ("multipleOf", 2, "3"),
        ("required", ["a"], "{}"),
        ("minItems", 1, "[]"),
        ("maxItems", 1, "[1, 2]"),
        ("minProperties", 1, "{}"),
        ("maxProperties", 1, '{"a": 1, "b": 2}'),
    ],
)
def test_a_subschema_of_leaf_keywords_is_asserted(
    keyword: str, value: Any, answer: str, draft: str
) -> None:
    if draft.endswith("draft-04/schema") and keyword.startswith("exclusive"):
        schema: Any = {"title": "t", keyword: True, keyword[9:].lower(): value}
        keyword = keyword[9:].lower()
    else:
        schema = {"title": "t", keyword: value}
    named = {"$schema": draft} if draft else {}
    error = refused({**named, "properties": {"n": {"items": schema}}}, f'{{"n": [{answer}]}}')
    assert error.metadata == {"pointer": "/n/0", "keyword": keyword}


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
def test_unusual_valid_answers_pass(text: str) -> None:
    assert AnswerValidator("true").parse(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "document"),
    [
        ('{"a": 2, "b": 1.50, "a": 3}', '{"b": 1.50, "a": 3}'),
        ('{"a": "x", "c": {"d": 0, "d": 1}, "a": 3}', '{"c": {"d": 1}, "a": 3}'),
        (' {"a": 3} ', ' {"a": 3} '),
    ],
)
def test_of_repeated_names_the_last_one_is_validated(text: str, document: str) -> None:
    validator = AnswerValidator(json.dumps({"properties": {"a": {"minimum": 3}}}))
    assert validator.check(text) == document
    assert validator.parse(text) == json.loads(text) == json.loads(document)
    assert list(validator.parse(text)) == list(json.loads(document))


def test_the_message_quotes_no_answer() -> None:
    secret = "the-words-of-the-image"
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


@pytest.mark.slow
def test_exponential_validation_is_stopped() -> None:
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


def test_a_violation_in_lists_of_lists_is_found_in_few_steps() -> None:
    """What checks a simple subschema before it looks for errors must not do so at each level: 2^30."""
    schema: Any = {"type": "string"}
    for _ in range(30):
        schema = {"type": "array", "items": schema}
    error = refused(schema, "[" * 30 + "1" + "]" * 30, steps=200)
    assert error.metadata == {"pointer": "/0" * 30, "keyword": "type"}


def test_a_reference_to_the_root_stays_bounded() -> None:
    """Meeting ``$schema`` again must not lead back to the library's own validator."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": {"a": {"$ref": "#"}, "b": {"pattern": "^a$"}},
    }
    error = refused(schema, '{"a": {"a": {"b": "a\\n"}}}')
    assert error.metadata == {"pointer": "/a/a/b", "keyword": "pattern"}


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "(x+x+)+y", r"^(\w+\s?)*$"])
def test_patterns_that_hang_backtracking_engines_are_fast(pattern: str) -> None:
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


@pytest.mark.parametrize(
    ("schema", "fits", "not_fits"),
    [
        ('{"multipleOf": 0.01}', "0.07 0.29 19.99 8.21 32.01 597.56 -4.35 7 1e2 0.10", "0.005 1e-3"),
        ('{"multipleOf": 0.1}', "9" * 400 + " 1e300 0.3", "1e-400 0.30000000000000004"),
        ('{"multipleOf": 1e-7}', "1e-7 0.0000003 12 1e300", "1e-8 1e-999999999"),
        ('{"multipleOf": 1e-400}', "1e-400 3e-399 5 1e308", "1e-401 1e-999999999"),
        ('{"multipleOf": 3}', "9007199254740993 3.0 1.2e1", "9007199254740994 1e300"),
        ('{"minimum": 0.1}', "0.1 0.10000000000000000001", "0.09999999999999999999999"),
        ('{"exclusiveMaximum": 0.1}', "0.09999999999999999999999 0 -1e300", "0.1 0.100"),
        ('{"exclusiveMinimum": 0}', "1e-400 1e-999999999 5", "0 0.0 -0.0 0e-999999999999999999999"),
        ('{"maximum": 9007199254740992}', "9007199254740992.0", "9007199254740993.0"),
        ('{"enum": [0.1, 1.0, 1e2]}', "0.1 0.100 1e-1 1 1.0 100 1E+2", "0.10000000000000000001 2"),
        ('{"const": 0.30}', "0.3 3e-1", "0.30000000000000000000001"),
        ('{"not": {"const": 0.1}}', "0.10000000000000000000001", "0.1 1e-1"),
        ('{"uniqueItems": true}', "[0.1,0.10000000000000000001] [1,true]", "[0.1,0.10] [1,1.0] [1e2,100]"),
        ('{"type": "integer"}', "1.0 1e2 1e300 0e-5", "1.00000000000000000000001 1e-999999999"),
        ('{"maxLength": 1.0, "minItems": 1.0}', '"a" [1]', '"ab" []'),
    ],
)  # fmt: skip
def test_numbers_are_compared_as_written_decimals(schema: str, fits: str, not_fits: str) -> None:
    validator = AnswerValidator(schema)
    for text in fits.split():
        validator.parse(text)
    for text in not_fits.split():
        with pytest.raises(OutputInvalid) as caught:
            validator.parse(text)
        assert caught.value.metadata["keyword"] in schema


def test_numbers_of_other_drafts() -> None:
    """Only in draft-04 is 1.0 no integer."""
    validator = AnswerValidator(
        '{"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer"}'
    )
    validator.parse("10")
    for text in ("1.0", "1e1"):
        with pytest.raises(OutputInvalid):
            validator.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1e400", "a number is too large"),
        ("-1e999999999", "a number is too large"),
        ("1e" + "9" * 4000, "a number is too large"),
        ("1e-" + "9" * 30, "a number is too small"),
        ("0." + "1" * 5000, "a number has too many digits"),
    ],
)
def test_numbers_beyond_bounds_are_refused_at_once(text: str, why: str) -> None:
    for schema in ({}, {"multipleOf": 0.01}, {"type": "integer", "maximum": 3, "enum": [1]}):
        error = refused(schema, f"[{text}]")
        assert error.metadata["keyword"] == "json"
        assert why in error.message


def test_exponents_cost_no_time() -> None:
    texts = ["1e300", "-1e-999999999", "9.99e-9999999999999999", "0e9999999999999999", "1e-400"]
    schema = """{"items": {"multipleOf": 7e-300, "minimum": 1e-300, "maximum": 1e-999999999,
        "exclusiveMinimum": 1e-9999999999999999, "enum": [1e-999999999, 2], "type": "integer"},
        "uniqueItems": true}"""
    began = time.process_time()
    for text in texts * 20:
        with pytest.raises(OutputInvalid):
            AnswerValidator(schema).parse(f"[{text}]")
    assert time.process_time() - began < 2


@pytest.mark.slow
def test_ten_thousand_amounts_are_accepted_and_others_refused() -> None:
    """Amounts are made from integers of cents, and what is none from tenths of a cent."""
    chance = random.Random(7)
    validator = AnswerValidator('{"type": "number", "multipleOf": 0.01}')
    for _ in range(10_000):
        cents = chance.randrange(10 ** chance.randrange(1, 9))
        amount = f"{'-' * chance.randrange(2)}{cents // 100}.{cents % 100:02}"
        validator.parse(amount)
        with pytest.raises(OutputInvalid):
            validator.parse(amount + str(chance.randrange(1, 10)))


_DECIMALS = st.one_of(
    st.integers(-50, 50).map(str),
    st.decimals(-20, 20, places=2).map(str),
    st.decimals(-1, 1, places=5).map(str),
    st.sampled_from(
        ["1e2", "1E-2", "-0.0", "9007199254740993", "9007199254740993.0", "1e-320", "0.1e1", "3e25"]
    ),
)
_STEPS = st.sampled_from(["0.01", "0.1", "1", "0.05", "2.5", "3", "1e-3", "0.3", "1e1", "7.0"])


@settings(max_examples=60)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "multipleOf": _STEPS,
            "minimum": _DECIMALS,
            "maximum": _DECIMALS,
            "exclusiveMinimum": _DECIMALS,
            "exclusiveMaximum": _DECIMALS,
            "enum": st.lists(_DECIMALS, min_size=1, max_size=4, unique=True).map(", ".join),
            "const": _DECIMALS,
            "type": st.just('"integer"'),
        },
    ),
    st.lists(_DECIMALS, min_size=5, max_size=20),
)
@pytest.mark.slow
def test_the_library_on_fractions_agrees(keywords: dict[str, str], texts: list[str]) -> None:
    members = [
        f'"{keyword}": ' + (f"[{value}]" if keyword == "enum" else value)
        for keyword, value in keywords.items()
    ]
    for schema in (f"{{{', '.join(members)}}}", f'{{"not": {{{", ".join(members)}}}}}'):
        validator = AnswerValidator(schema)
        for text in texts:
            found = "valid"
            try:
                validator.parse(text)
            except OutputInvalid:
                found = "invalid"
            assert found == judged(schema, text), text


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
    """The schema without keywords of other drafts, which the library ignores there."""
    if isinstance(schema, list):
        return [in_draft(item, dialect) for item in schema]
    if not isinstance(schema, dict):
        return schema
    foreign = DRAFTS[dialect].foreign | DRAFTS[dialect].newer
    return {k: in_draft(v, dialect) for k, v in schema.items() if k not in foreign}


_NEWEST, _BEFORE = jsonschema.Draft202012Validator, jsonschema.Draft201909Validator
# Its own functions for 2019-09 take the keywords of a schema in additionalProperties for names, and
# fail at a boolean in items.
_BEFORE = jsonschema.validators.extend(
    _BEFORE, {k: _NEWEST.VALIDATORS[k] for k in ("unevaluatedProperties", "unevaluatedItems")}
)


def plain(schema: Any, dialect: str) -> Any:
    """The library's validator, which knows nothing of ours."""
    cls = jsonschema.validators.validator_for({"$schema": dialect})
    cls.check_schema(schema)
    return (_BEFORE if cls is jsonschema.Draft201909Validator else cls)(schema)


@pytest.mark.slow
@settings(max_examples=150)
@given(schemas, leaves, leaves, values, st.sampled_from([*DRAFTS]))
def test_the_library_agrees(schema: Any, a: Any, b: Any, value: Any, dialect: str) -> None:
    if isinstance(schema, dict):
        schema = {**schema, "$schema": dialect, "$defs": {"a": a, "b": b}}
        schema = in_draft(schema, dialect)
    else:
        dialect = _NEWEST.META_SCHEMA["$id"]
    library = None
    with contextlib.suppress(jsonschema.SchemaError):
        library = plain(schema, dialect)
    assume(library is not None)
    judged = None
    with contextlib.suppress(GrammarError):  # references that lead back to themselves
        judged = judge(schema, value)
    assume(judged is not None)
    assert judged == library.is_valid(value)


member = st.sampled_from([True, True, {}, {"type": "integer"}])
named = st.dictionaries(names, member, min_size=1, max_size=2)
matched = st.dictionaries(st.sampled_from(["a", "^b", "c$", "^[ab]+$"]), member, max_size=2)


def combinations(inner: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    """Keywords that apply schemas to the same value, by name."""
    lists = {k: st.lists(inner, min_size=1, max_size=3) for k in ("allOf", "anyOf", "oneOf")}
    return {**lists, "if": st.fixed_dictionaries({"if": inner, "then": inner, "else": inner})}


@st.composite
def some_keywords(draw: st.DrawFn, kinds: dict[str, st.SearchStrategy[Any]]) -> Any:
    """A schema of one or two of the keywords."""
    some = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=2, unique=True))
    schema = {keyword: draw(kinds[keyword]) for keyword in some}
    return {**schema, **schema["if"]} if "if" in schema else schema


@st.composite
def evaluating(draw: st.DrawFn, depth: int = 2) -> Any:
    """A schema that evaluates some names, and that many an object fits."""
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "properties": named,
        "patternProperties": matched,
        "required": st.lists(names, max_size=1),
        "maxProperties": st.integers(0, 3),
    }
    if depth:
        inner = evaluating(depth - 1)
        kinds |= {
            "additionalProperties": member,
            "unevaluatedProperties": member,
            "$ref": st.just("#/$defs/one"),
            "not": inner,
            "dependentSchemas": st.dictionaries(names, inner, min_size=1, max_size=2),
        }
        kinds |= combinations(inner)
    return draw(some_keywords(kinds))


@pytest.mark.slow
@settings(max_examples=200)
@given(
    evaluating(),
    evaluating(1),
    st.sampled_from([False, False, {"type": "integer"}]),
    st.lists(
        st.dictionaries(names, st.sampled_from([1, 1, "x"]), max_size=4), min_size=4, max_size=8
    ),
    st.booleans(),
)
def test_unevaluated_properties(
    schema: Any, part: Any, rest: Any, objects: list[Any], is_newest: bool
) -> None:
    """Which of the properties are, the library says, too, for patterns that both read alike."""
    cls = _NEWEST if is_newest else jsonschema.Draft201909Validator
    dialect = cls.META_SCHEMA["$id"]
    part = json.loads(json.dumps(part).replace("#/$defs/one", "#/$defs/two"))
    defined = {"one": part, "two": {"patternProperties": {"^a": {"type": "integer"}}}}
    schema = {**schema, "$schema": dialect, "$defs": defined, "unevaluatedProperties": rest}
    library = plain(schema, dialect)
    for value in objects:
        assert judge(schema, value) == library.is_valid(value), value


_COUNTED: dict[str, st.SearchStrategy[Any]] = {
    "prefixItems": st.lists(member, min_size=1, max_size=2),
    "items": member,
    "contains": st.sampled_from([{"type": "integer"}, {"type": "string"}]),
    "minContains": st.just(0),
    "minItems": st.integers(0, 2),
    "maxItems": st.integers(1, 3),
}


@st.composite
def evaluating_items(draw: st.DrawFn, depth: int = 2) -> Any:
    """A schema that evaluates some items, and that many an array fits."""
    kinds = dict(_COUNTED)
    if depth:
        inner = evaluating_items(depth - 1)
        kinds |= {"unevaluatedItems": member, "$ref": st.just("#/$defs/one"), "not": inner}
        kinds |= combinations(inner)
    return draw(some_keywords(kinds))


@pytest.mark.slow
@settings(max_examples=200)
@given(
    evaluating_items(),
    evaluating_items(0),
    st.sampled_from([False, False, {"type": "integer"}]),
    st.lists(st.lists(st.sampled_from([1, 1, "x"]), max_size=4), min_size=4, max_size=8),
)
def test_unevaluated_items(schema: Any, part: Any, rest: Any, arrays: list[Any]) -> None:
    schema = {**schema, "$defs": {"one": part}, "unevaluatedItems": rest}
    library = plain(schema, _NEWEST.META_SCHEMA["$id"])
    for value in arrays:
        assert judge(schema, value) == library.is_valid(value), value


_FIRST = {"prefixItems": [{"type": "integer"}]}


@pytest.mark.parametrize(
    "schema",
    [
        _FIRST,
        {"allOf": [_FIRST]},
        {"anyOf": [{"items": {}, "maxItems": 0}, _FIRST]},
        {"if": _FIRST},
        {"if": False, "then": {"items": {}}, "else": _FIRST},
        {"$ref": "#/$defs/a", "$defs": {"a": _FIRST}},
        {"contains": {"type": "integer"}},
        {"allOf": [{"$id": "urn:a", "$ref": "#/$defs/a", "$defs": {"a": _FIRST}}]},
        {"dependentSchemas": {"x": {"items": {}}}, **_FIRST},  # of objects only
        {"$schema": _BEFORE.META_SCHEMA["$id"], "items": [{}]},
    ],
)
def test_each_keyword_that_evaluates_items(schema: Any) -> None:
    schema = {**schema, "unevaluatedItems": False}
    AnswerValidator(json.dumps(schema)).parse("[1]")
    error = refused(schema, '[1, "x"]')
    assert error.metadata == {"pointer": "/1", "keyword": "unevaluatedItems"}


_INNER = {"$id": "urn:inner", "$ref": "#/definitions/a", "definitions": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "fits", "not_fits"),
    [
        ({"not": {"allOf": [_INNER]}}, '"a"', "1"),
        ({"not": _INNER}, '"a"', "1"),
        ({"if": _INNER, "then": {"minimum": 1}}, "1", "0"),
        ({"contains": _INNER}, "[1]", '["a"]'),
        ({"contains": _INNER, "maxContains": 1}, '[1, "a"]', "[1, 1]"),
        ({"oneOf": [{"type": "number"}, _INNER]}, "0.5", "1"),
        ({"anyOf": [_INNER]}, "1", '"a"'),
    ],
)
def test_a_reference_leads_from_the_id_that_it_stands_under(
    schema: Any, fits: str, not_fits: str
) -> None:
    schema = {"definitions": {"a": {"type": "string"}}, **schema}
    AnswerValidator(json.dumps(schema)).parse(fits)
    refused(schema, not_fits)


@pytest.mark.parametrize("items", [{"items": True}, {"items": [{}], "additionalItems": {}}])
def test_all_items_are_evaluated_in_an_earlier_draft(items: Any) -> None:
    schema = {"$schema": _BEFORE.META_SCHEMA["$id"], **items, "unevaluatedItems": False}
    AnswerValidator(json.dumps(schema)).parse("[1, 2, 3]")


_MATCH_A = {"patternProperties": {"^a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "schema",
    [
        _MATCH_A,
        {"allOf": [_MATCH_A]},
        {"anyOf": [{"properties": {"b": False}, "required": ["b"]}, _MATCH_A]},
        {"oneOf": [{"properties": {"b": {}}, "required": ["c"]}, _MATCH_A]},
        {"if": _MATCH_A},
        {"if": {}, "then": _MATCH_A, "else": {"properties": {"b": {}}}},
        {"if": False, "then": {"properties": {"b": {}}}, "else": _MATCH_A},
        {"dependentSchemas": {"ab": _MATCH_A, "c": {"properties": {"b": {}}}}},
        {"dependencies": {"ab": _MATCH_A, "c": {"properties": {"b": {}}}, "d": []}},
        {"$ref": "#/$defs/a", "$defs": {"a": _MATCH_A}},
        {"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a", **_MATCH_A}}},
        {"allOf": [{"unevaluatedProperties": {}, "maxProperties": 1}]},
        {"allOf": [{"additionalProperties": {}, "maxProperties": 1}]},
        # A reference is one to the subschema with an $id that it stands in.
        {"allOf": [{"$id": "urn:a", "$ref": "#/$defs/a", "$defs": {"a": _MATCH_A}}]},
        {"not": {"not": {"properties": {"b": {}}}}, **_MATCH_A},
    ],
)
def test_each_keyword_that_evaluates(schema: Any) -> None:
    schema = {**schema, "unevaluatedProperties": False}
    AnswerValidator(json.dumps(schema)).parse('{"ab": 1}')
    error = refused(schema, '{"ab": 1, "b": 1}')
    if "maxProperties" not in json.dumps(schema):
        assert error.metadata == {"pointer": "/b", "keyword": "unevaluatedProperties"}


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$"])
def test_unevaluated_properties_with_patterns_that_hang_backtracking_engines(pattern: str) -> None:
    schema = {"patternProperties": {pattern: {}}, "unevaluatedProperties": False}
    began = time.process_time()
    AnswerValidator(json.dumps(schema)).parse(json.dumps({"a" * 5000: 1}))
    error = refused(schema, json.dumps({"a": 1, "a" * 5000 + "!": 1}))
    assert time.process_time() - began < 2
    assert error.metadata["keyword"] == "unevaluatedProperties"


def test_unevaluated_properties_take_linear_time() -> None:
    schema = {"patternProperties": {"^a": {}}, "unevaluatedProperties": False}
    began = time.process_time()
    AnswerValidator(json.dumps(schema)).parse(json.dumps({f"a{i}": 1 for i in range(20_000)}))
    assert time.process_time() - began < 2


@pytest.mark.slow
def test_the_search_for_unevaluated_properties_is_limited() -> None:
    levels = {
        f"a{i}": {
            "dependentSchemas": {
                "x": {"$ref": f"#/$defs/a{i + 1}"},
                "y": {"$ref": f"#/$defs/a{i + 1}"},
            }
        }
        for i in range(40)
    }
    schema = {"unevaluatedProperties": False, "$ref": "#/$defs/a0", "$defs": {**levels, "a40": {}}}
    schema = {"patternProperties": {"z": {}}, **schema}
    began = time.process_time()
    error = refused(schema, '{"x": 1, "y": 1}', seconds=0.2)
    assert time.process_time() - began < 2
    assert "bounded time" in error.message


@pytest.mark.slow
@settings(max_examples=200)
@given(values)
def test_answers_are_parsed_like_strict_json(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
