"""Violations that are found before an answer ends: at once where they can be known, and never wrongly."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from service.engines.fake import FakeEngine
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.report import Enforcement
from service.structured_output.prefix_check import (
    MAX_PIECE,
    PrefixCheck,
    Violation,
    prefix_check,
)
from service.types import Capabilities, Enforcer, PropertyOrder
from tests.service.schema_compiler import schemas
from tests.service.schema_compiler.agreement import admitted, analysed, valid

COLLECTION = Path(__file__).parents[4] / "shared" / "maskbench" / "public.jsonl"
MASKS = FakeEngine().capabilities
LOOSE = settings(deadline=None, suppress_health_check=list(HealthCheck))


def found_at(schema: Any, text: str, *, final: bool = True) -> tuple[int, Violation] | None:
    """The number of characters after which a violation is found."""
    check = PrefixCheck(json.dumps(schema), names_are_final=final)
    for number, character in enumerate(text, 1):
        violation = check.feed(character)
        if violation is not None:
            return number, violation
    return None


NAME = {"type": "string", "maxLength": 3}
CODES = {"type": "array", "items": {"type": "integer"}, "maxItems": 2, "uniqueItems": True}
PERSON = {"type": "object", "properties": {"name": NAME, "codes": CODES}}
CASES = [
    # schema, text up to the place where the violation is known, pointer, keyword
    (NAME, '"abcd', "", "maxLength"),
    (NAME, '"a\\u00e9\\n\\\\', "", "maxLength"),
    (NAME, '"ab\\ud83d\\ude00x', "", "maxLength"),
    (NAME, '"😀😀😀😀', "", "maxLength"),
    ({"enum": ["a", 1, None, {}]}, "[", "", "enum"),
    ({"type": "integer"}, '"', "", "type"),
    (False, "1", "", "false"),
    ({"items": {"maximum": 5}}, "[3, 12,", "/1", "maximum"),
    ({"items": {"multipleOf": 0.01}}, "[0.07, 0.015,", "/1", "multipleOf"),
    ({"items": {"pattern": "^a"}}, '["a", "b"', "/1", "pattern"),
    ({"items": {"format": "date"}}, '["2026-02-30"', "/0", "format"),
    ({"items": {"minLength": 2}}, '["a"', "/0", "minLength"),
    (CODES, "[1, 2, 3", "", "maxItems"),
    (CODES, "[1, 1]", "", "uniqueItems"),
    ({"uniqueItems": True}, '[1, true, "1", 1.0,', "", "uniqueItems"),
    ({"prefixItems": [True, False]}, "[1, n", "/1", "false"),
    ({"prefixItems": [True], "items": NAME}, '["long", "long', "/1", "maxLength"),
    ({"propertyNames": NAME}, '{"abc": 1, "abcd"', "", "propertyNames"),
    ({"maxProperties": 1}, '{"a": {"b": 1}, "a": 2, "b"', "", "maxProperties"),
    ({**PERSON, "additionalProperties": False}, '{"other"', "/other", "additionalProperties"),
    (
        {"patternProperties": {"^x": True}, "additionalProperties": False},
        '{"xa": 1, "a"',
        "/a",
        "additionalProperties",
    ),
    (PERSON, '{"name": "abcd', "/name", "maxLength"),
    (PERSON, '{"a": [{}, "]"], "codes": [7, 7,', "/codes", "uniqueItems"),
    ({"items": PERSON}, '[{"name": ""}, {"name": "abcd', "/1/name", "maxLength"),
    ({"$ref": "#/$defs/n", "$defs": {"n": NAME}}, '"abcd', "", "maxLength"),
    ({"allOf": [{"maxLength": 5}, {"maxLength": 1}]}, '"ab', "", "maxLength"),
    ({"anyOf": [NAME, {"type": "null"}]}, '"abcd', "", "maxLength"),
    ({"anyOf": [NAME, {"maxLength": 5}]}, '"abcdef', "", "maxLength"),
    ({"oneOf": [{"maxItems": 1}, {"maxItems": 3}, {"type": "object"}]}, "[1,2,3,4", "", "maxItems"),
    ({"anyOf": [PERSON, {"type": "null"}]}, '{"name": "abcd', "/name", "maxLength"),
    ({**PERSON, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, '{"name": "abcd', "/name", "maxLength"),
    ({"properties": {"a": {"items": [NAME], "additionalItems": {"const": 1}}}, "$schema":
      "http://json-schema.org/draft-07/schema#"}, '{"a": ["abc", 1, 2]', "/a/2", "const"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "text", "pointer", "keyword"), CASES)
def test_where_it_is_found(schema: Any, text: str, pointer: str, keyword: str) -> None:
    if keyword == "enum":  # a list: its items may come, so that this waits for the validation
        assert found_at(schema, text) is None
        return
    assert found_at(schema, text) == (len(text), Violation(pointer, keyword))
    check = PrefixCheck(json.dumps(schema), names_are_final=True)
    assert check.feed(text) == Violation(pointer, keyword), "in one piece"
    assert check.feed(text) == Violation(pointer, keyword), "and it stays"


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (NAME, '"a\\ud83d\\ude00b"'),
        ({"maximum": 5}, "[12]"),
        ({"type": "number", "maximum": 5}, "12e-1"),
        ({"items": {"maximum": 5}}, "[12e-1]"),
        ({"not": {"maxLength": 3}}, '"abcd"'),
        ({"if": {"maxLength": 3}, "then": {"const": "a"}}, '"abcd"'),
        ({"anyOf": [{"maxItems": 1}, {"maxItems": 3}]}, "[1,2,3]"),
        ({"oneOf": [NAME, {"minLength": 4}]}, '"abcd"'),
        ({"contains": {"const": 1}}, "[2, 1]"),
        (CODES, "[1, 2]"),
        (PERSON, '{"name": "abc", "codes": []}'),
        ({"anyOf": [PERSON, {"required": ["x"]}]}, '{"name": "abcd", "x": 1}'),
        ({"uniqueItems": True}, '[1, true, "1", [1], [1, 1]]'),
    ],
)
def test_what_is_valid_is_left_alone(schema: Any, text: str) -> None:
    assert valid(schema, text)
    assert found_at(schema, text) is None


def test_a_member_whose_name_may_come_again() -> None:
    """The last one counts, so that only the name itself is for good."""
    for schema in (PERSON, {"additionalProperties": NAME}, {"patternProperties": {"^n": NAME}}):
        text = '{"name": "abcd", "name": "a"}'
        assert valid(schema, text)
        assert found_at(schema, text, final=False) is None
    listed = {"additionalProperties": NAME}
    assert found_at(listed, '{"name": "abcd"', final=True) is None, "no grammar keeps it apart"
    either = {"anyOf": [PERSON, {"type": "object", "properties": {"codes": {}}}]}
    assert found_at(either, '{"name": "abcd"', final=True) is None


def test_when_there_is_a_check() -> None:
    def made(
        schema: Any,
        capabilities: Capabilities = MASKS,
        order: PropertyOrder = PropertyOrder.DECLARED,
    ) -> PrefixCheck | None:
        analysis = analysed(schema, order)
        assert analysis is not None
        return prefix_check(analysis.grammar, analysis.report, capabilities, DEFAULT_LIMITS)

    name = {"type": "string", "maxLength": 3}
    codes = {"type": "array", "uniqueItems": True}
    schema = {"type": "object", "properties": {"name": name, "codes": codes}}
    text = '{"codes": [1, 1]'
    assert made({"type": "object", "properties": {"name": name}}) is None, "all is enforced"
    check = made(schema)
    assert check is not None
    assert check.feed(text) == Violation("/codes", "uniqueItems")
    # Where keywords on names are only checked, a grammar may repeat listed names, too.
    check = made({**schema, "minProperties": 2})
    assert check is not None
    assert check.feed(text) is None
    check = made(schema, order=PropertyOrder.ANY)
    assert check is not None
    assert check.feed(text) is None, "in any order, listed names may come again"
    check = made(schema, replace(MASKS, enforcer=Enforcer.VALIDATION))
    assert check is not None
    assert check.feed(text) is None, "the grammar is not kept at all"


@pytest.mark.parametrize(
    "pieces", [["x" * (MAX_PIECE + 1)], ["{'a'"], ['"\\q'], ["[1 2"], ['{"a" 1'], ["]"], ["nul]"], ['"\\ud800"']]
)  # fmt: skip
def test_what_it_cannot_read_is_left_to_the_validation(pieces: list[str]) -> None:
    check = PrefixCheck('{"maxLength": 1, "maxItems": 1, "maxProperties": 1}')
    assert [check.feed(piece) for piece in [*pieces, '"long"', "[1, 2]"]] == [None] * (
        len(pieces) + 2
    )


def test_too_many_subschemas_are_left_to_the_validation() -> None:
    """Two references to the next level at each: 2**20 ways to the last one."""
    definitions: dict[str, Any] = {"d20": {"maxLength": 1}}
    for number in range(20):
        target = {"$ref": f"#/$defs/d{number + 1}"}
        definitions[f"d{number}"] = {"allOf": [target, target]}
    assert found_at({"$ref": "#/$defs/d0", "$defs": definitions}, '"abc"') is None


def pieces_of(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(0, 6))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def is_found(schema: Any, text: str, rng: random.Random, *, final: bool) -> bool:
    check = PrefixCheck(json.dumps(schema), names_are_final=final)
    return any(map(check.feed, pieces_of(text, rng)))


def check_documents(schema: Any, values: list[Any], seed: int) -> None:
    """What is found is invalid, for documents and for texts in which names come again."""
    if not admitted(schema):
        return
    rng = random.Random(seed)
    for value in values:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
        for final in (False, True):
            if is_found(schema, text, rng, final=final):
                event("a violation")
                assert not valid(schema, text), text
        again = text.replace('"b":', '"a":').replace('"ab":', '"a":')
        if is_found(schema, again, rng, final=False):
            event("a violation beside repeated names")
            assert not valid(schema, again), again


GENERIC_LIST = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://example.org/strings",
    "$ref": "list",
    "$defs": {
        "strings": {"$dynamicAnchor": "T", "type": "string", "maxLength": 500},
        "list": {
            "$id": "list",
            "type": "array",
            "items": {"$dynamicRef": "#T"},
            "$defs": {"any": {"$dynamicAnchor": "T", "not": {}}},
        },
    },
}
RECURSIVE_LIST = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "$id": "https://example.org/numbers",
    "$recursiveAnchor": True,
    "anyOf": [{"type": "integer"}, {"$ref": "list"}],
    "$defs": {
        "list": {
            "$id": "list",
            "$recursiveAnchor": True,
            "type": ["array"],
            "items": {"$recursiveRef": "#"},
        }
    },
}


@pytest.mark.parametrize(
    ("schema", "text"), [(GENERIC_LIST, '["abc", "d"]'), (RECURSIVE_LIST, "[1, [2]]")]
)
def test_what_a_dynamic_reference_stands_for_is_left_to_the_validation(
    schema: Any, text: str
) -> None:
    assert valid(schema, text)
    assert found_at(schema, text) is None


def test_an_answer_has_a_bounded_share_of_the_event_loop() -> None:
    """Each item costs 2,048 checks of a number; the pieces together have a quarter of a second."""
    definitions: dict[str, Any] = {"d0": {"minimum": 0}}
    for depth in range(11):
        inner = {"$ref": f"#/$defs/d{depth}"}
        definitions[f"d{depth + 1}"] = {"allOf": [inner, inner]}
    items = {"type": "integer", "if": {"$ref": "#/$defs/d11"}, "then": True}
    schema = {"type": "array", "uniqueItems": True, "items": items, "$defs": definitions}
    check = PrefixCheck(json.dumps(schema), names_are_final=True)
    check.feed("[")
    begun = time.thread_time()
    pieces = 0
    while check.is_active and pieces < 10_000:
        check.feed(f"{pieces},")
        pieces += 1
    assert pieces < 10_000
    assert time.thread_time() - begun < 5, "of the thread alone, so the load does not matter"


DOCUMENTS = st.sampled_from(schemas.FAMILIES).flatmap(
    lambda family: st.tuples(
        schemas.schemas(family), st.lists(schemas.families(family), min_size=4, max_size=12)
    )
)


@pytest.mark.slow
@settings(LOOSE, max_examples=500)
@given(DOCUMENTS, st.integers(0, 1000))
def test_no_false_alarm(both: tuple[Any, list[Any]], seed: int) -> None:
    check_documents(*both, seed)


@pytest.mark.slow
@settings(LOOSE, max_examples=150)
@given(
    st.sampled_from(schemas.FAMILIES).flatmap(schemas.schemas),
    st.sampled_from(PropertyOrder),
    st.integers(0, 1000),
)
def test_no_false_alarm_on_texts_of_the_grammar(
    schema: Any, order: PropertyOrder, seed: int
) -> None:
    """With what a server takes for granted of names: its grammar in the declared order does not repeat
    listed ones."""
    analysis = analysed(schema, order)
    if analysis is None or analysis.report.enforcement is Enforcement.ENFORCED:
        return
    rng = random.Random(seed)
    grammar = schemas.compiled(analysis.grammar.ebnf)
    for _ in range(8):
        text = schemas.walk(grammar, rng)
        check = prefix_check(analysis.grammar, analysis.report, MASKS, DEFAULT_LIMITS)
        assert check is not None
        if text is not None and any(map(check.feed, pieces_of(text, rng))):
            event("a violation")
            assert not valid(schema, text), text


@pytest.mark.slow
@pytest.mark.skipif(
    not COLLECTION.is_file(), reason="the collection of public schemas is not there"
)
def test_instances_of_public_schemas() -> None:
    """No valid instance is refused, and many invalid ones are found early."""
    rng = random.Random(5)
    early = 0
    lines = COLLECTION.read_text().splitlines()
    for line in lines[::4]:
        case = json.loads(line)
        if not admitted(case["schema"]):
            continue
        for test in case["tests"]:
            text = json.dumps(test["data"], ensure_ascii=False)
            if is_found(case["schema"], text, rng, final=True):
                early += 1
                assert not valid(case["schema"], text), (case["name"], text)
    assert early > 100
