"""Names that come twice in an object: the last one counts, and a grammar that enforces everything never
lets an answer through that is invalid without the others."""

from __future__ import annotations

import itertools
import json
import random
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks import judge
from service.schema_compiler.jsontext import JsonTextError, decode, without_repeats
from service.schema_compiler.report import Enforcement
from tests.service.schema_compiler import schemas
from tests.service.schema_compiler.agreement import analysed, valid
from tests.service.schema_compiler.rewrites import KINDS

# Documents as lists of pairs, with names that repeat

_SPACES = st.sampled_from(("", "", "", " ", "\n\t", "  \r\n"))
_NAMES = st.sampled_from((
    '"a"', '"\\u0061"', '"b"', '"\\n"', '"\\u000a"', '"\\""', '"{"', '"}"', '","', '"[x,"', '"é"', '"\\u00e9"',
    '"😀"', '"\\ud83d\\ude00"', '""', '"\\\\"', '"\\/"', '"/"', '"a\\u0000"',
))  # fmt: skip
_SCALARS = st.one_of(
    st.sampled_from((
        "1.50", "-0", "1E+2", "0.10000000000000000001", "9007199254740993", "true", "false", "null",
        '"}"', '"{\\"a\\":1,"', '"\\\\"', '"x"', "2",
    )),
    _NAMES,
)  # fmt: skip


@st.composite
def _spaced(draw: st.DrawFn, opened: str, parts: list[str], closed: str) -> str:
    text = opened + draw(_SPACES)
    for i, part in enumerate(parts):
        text += ("," + draw(_SPACES) if i else "") + part + draw(_SPACES)
    return text + closed


@st.composite
def _object(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    members = draw(st.lists(st.tuples(_NAMES, inner), max_size=5))
    parts = [f"{name}{draw(_SPACES)}:{draw(_SPACES)}{value}" for name, value in members]
    return draw(_spaced("{", parts, "}"))


_DOCUMENTS = st.recursive(
    _SCALARS,
    lambda inner: (
        _object(inner) | st.lists(inner, max_size=4).flatmap(lambda parts: _spaced("[", parts, "]"))
    ),
    max_leaves=14,
)


class _Pairs(list[tuple[str, Any]]):
    """The members of an object, in order."""


def _read(text: str) -> Any:
    """The document with all members, and numbers as they are written."""
    return json.loads(
        text,
        object_pairs_hook=_Pairs,
        parse_float=lambda digits: ("number", digits),
        parse_int=lambda digits: ("number", digits),
    )


def _last_ones(value: Any) -> Any:
    """The oracle: the document without the members that a later one replaces."""
    if isinstance(value, _Pairs):
        kept = _Pairs()
        for i, (name, member) in enumerate(value):
            if all(later != name for later, _ in value[i + 1 :]):
                kept.append((name, _last_ones(member)))
        return kept
    return [_last_ones(item) for item in value] if isinstance(value, list) else value


def _is_within(part: str, whole: str) -> bool:
    """Whether the characters of one text are some of another, in order."""
    rest = iter(whole)
    return all(character in rest for character in part)


@pytest.mark.slow
@settings(max_examples=300)
@given(_DOCUMENTS, _SPACES, _SPACES)
def test_the_last_member_of_a_name_stays_as_it_is_written(
    document: str, before: str, after: str
) -> None:
    text = f"{before}{document}{after}"
    cut = without_repeats(text)
    assert _read(cut) == _last_ones(_read(text))
    assert _is_within(cut, text)
    assert cut.startswith(before)
    assert cut.endswith(after)
    assert without_repeats(cut) == cut
    if _read(text) == _last_ones(_read(text)):
        assert cut == text
    else:
        event("repeated names")
        with pytest.raises(JsonTextError, match="duplicate key"):
            decode(text)
    exact = decode(cut, exact=True)
    assert exact == judge.exact(cut)
    value = decode(text, exact=True, names_may_repeat=True)
    assert (value, json.dumps(value, default=str)) == (exact, json.dumps(exact, default=str))


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ('{"a": 1, "a": 2}', '{"a": 2}'),
        ('{"a":1,"b":2,"a":3,"c":1.50}', '{"b":2,"a":3,"c":1.50}'),
        ('{ "a" : [1, 2] , "a" : {} }', '{ "a" : {} }'),
        ('{"a": 1, "a": 2, "a": 3}', '{"a": 3}'),
        ('{"a": {"a": 1, "a": 2}, "b": 0}', '{"a": {"a": 2}, "b": 0}'),
        ('{"a": {"x": 1, "x": 2}, "a": 0}', '{"a": 0}'),
        ('[{"a": 1}, {"a": 2}]', '[{"a": 1}, {"a": 2}]'),
        ('{"a": {"a": 1}}', '{"a": {"a": 1}}'),
        ('{"a": "a", "b": "a"}', '{"a": "a", "b": "a"}'),
        ('{"\\u0061": 1, "a": 2}', '{"a": 2}'),
        ("1", "1"),
    ],
)
def test_what_is_cut(text: str, cut: str) -> None:
    assert without_repeats(text) == cut


def test_numbers_of_members_that_count_are_exact() -> None:
    text = '{"n": 1e400, "n": 0.1, "m": 12345678901234567890.10}'
    with pytest.raises(JsonTextError, match="too large"):
        decode(text, exact=True, names_may_repeat=True)  # it is written, so parsers meet it
    found = decode(text.replace("1e400", "1"), exact=True, names_may_repeat=True)
    assert found == {"n": Decimal("0.1"), "m": Decimal("12345678901234567890.10")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "{" + ", ".join(['"a": 1'] * 200_000) + "}",
        "{" + ", ".join(f'"a{i % 1000}": [{{"b": 1, "b": 2}}]' for i in range(100_000)) + "}",
        '{"a": "' + '\\"{,' * 300_000 + '"}',
        '{"a": ' * 190 + "1" + "}" * 190,
    ],
    ids=["one name", "nested", "a string", "deep"],
)
def test_cutting_takes_linear_time(text: str) -> None:
    began = time.process_time()
    cut = without_repeats(text)
    assert time.process_time() - began < 3
    decode(cut)


# Grammars


def _members(names: str, values: tuple[str, ...], most: int) -> list[str]:
    """All objects of up to so many members, as texts."""
    each = [f'"{name}": {value}' for name in names for value in values]
    found = []
    for size in range(most + 1):
        found += ["{" + ", ".join(some) + "}" for some in itertools.product(each, repeat=size)]
    return found


OBJECTS = _members("abx", ("1", '"s"', "[]"), 3)
SMALL: dict[str, Any] = {"type": "integer"}
A = {"properties": {"a": {}}}
SCHEMAS: dict[str, tuple[Any, bool]] = {
    "any object": ({"type": "object"}, True),
    "properties": ({"type": "object", "properties": {"a": SMALL}, "required": ["a"]}, True),
    "additional values": ({"type": "object", **A, "additionalProperties": SMALL}, True),
    "patterns": ({"type": "object", "patternProperties": {"^[ab]": SMALL}}, True),
    "closed patterns": (
        {"type": "object", "patternProperties": {"^[ab]": SMALL}, "additionalProperties": False}, True,
    ),
    "names": ({"type": "object", "propertyNames": {"pattern": "^[ax]"}}, True),
    "some name": ({"type": "object", "not": {"propertyNames": {"pattern": "^a"}}}, True),
    "one": ({"type": "object", "minProperties": 1}, True),
    "two": ({"type": "object", "minProperties": 2}, False),
    "required and one more": ({"type": "object", "required": ["a"], "minProperties": 2}, True),
    "required and two more": ({"type": "object", "required": ["a"], "minProperties": 3}, False),
    "at most two": ({"type": "object", "maxProperties": 2}, True),
    "exactly two": ({"type": "object", "minProperties": 2, "maxProperties": 2}, False),
    "not few": ({"type": "object", "not": {"maxProperties": 1}}, False),
    "not many": ({"type": "object", "not": {"minProperties": 3}}, True),
    "two counts": (
        {"type": "object", "allOf": [{"minProperties": 2}, {"minProperties": 3}]}, False,
    ),
    "some value": ({"type": "object", "not": {"additionalProperties": SMALL}}, True),
    "some value by pattern": ({"type": "object", "not": {"patternProperties": {"^[ab]": SMALL}}}, True),
    "two values": (
        {"type": "object", "allOf": [
            {"not": {"patternProperties": {"^[ab]": SMALL}}}, {"not": {"patternProperties": {"^[ax]": SMALL}}},
        ]},
        True,
    ),
    "two values that exclude each other": (
        {"type": "object", "not": {"anyOf": [
            {"additionalProperties": SMALL}, {"additionalProperties": {"not": SMALL}},
        ]}},
        False,
    ),
    "some name that is not listed": ({"type": "object", "not": {**A, "additionalProperties": False}}, True),
    "a value or none": (
        {"type": "object", "not": {"properties": {"a": SMALL}, "required": ["a"]}, "additionalProperties": {}}, True,
    ),
    "some value of a listed name": ({"type": "object", "not": {"patternProperties": {"^(a|b)$": SMALL}}}, True),
    "condition on a value": (
        {"type": "object", "if": {"properties": {"a": SMALL}}, "then": {"required": ["b"]}}, True,
    ),
    "condition on a count": (
        {"type": "object", "if": {"minProperties": 3}, "then": {"required": ["a"]}, "else": {"required": ["b"]}},
        False,
    ),
    "condition on a count, met by different names": (
        {"type": "object", "if": {"minProperties": 2}, "then": {"required": ["a"]}, "else": {"required": ["b"]}},
        True,
    ),
    "condition on other values": (
        {"type": "object", "if": {**A, "additionalProperties": SMALL}, "then": {"required": ["a"]}}, True,
    ),
    "dependent": (
        {"type": "object", "dependentRequired": {"x": ["a"]}, "dependentSchemas": {"b": {"required": ["x"]}}},
        True,
    ),
    "one of": (
        {"type": "object", "oneOf": [{"required": ["a"]}, {"properties": {"b": SMALL}, "required": ["b"]}]}, True,
    ),
    "unevaluated": (
        {"anyOf": [A, {"properties": {"b": SMALL}, "required": ["b"]}], "unevaluatedProperties": SMALL}, True,
    ),
    "all of": ({"allOf": [{"type": "object", **A}, {"properties": {"b": SMALL}}]}, True),
    "forbidden": ({"type": "object", "not": {"required": ["x"]}}, True),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_an_enforcing_grammar_accepts_is_valid_without_repeats(name: str) -> None:
    """Every object of up to three members out of nine."""
    schema, is_enforced = SCHEMAS[name]
    found = analysed(schema)
    assert found is not None
    assert (found.report.enforcement is Enforcement.ENFORCED) is is_enforced
    grammar = schemas.compiled(found.grammar.ebnf)
    accepted = [text for text in OBJECTS if schemas.accepts(grammar, text)]
    repeated = [text for text in accepted if without_repeats(text) != text]
    assert repeated, "additional names may repeat"
    invalid = [text for text in accepted if not valid(schema, text)]
    if is_enforced:
        assert not invalid
    else:
        assert invalid, "it is reported as checked without need"
        assert all(without_repeats(text) != text for text in invalid), (
            "only the repeats are checked"
        )
    for text in accepted:
        verdict = judge.judged(json.dumps(schema), without_repeats(text))
        assert valid(schema, text) == (verdict == "valid"), text


_VALUES = st.sampled_from(
    ("1", "0", '"a"', "true", "null", "[]", "[1]", "{}", '{"a": 1}', '{"b": 1, "b": 2}')
)
_PAIRS = st.lists(st.tuples(st.sampled_from(schemas.NAMES), _VALUES), min_size=1, max_size=4).map(
    lambda pairs: "{" + ", ".join(f'"{name}": {value}' for name, value in pairs) + "}"
)


@pytest.mark.slow
@settings(max_examples=300)
@given(schemas.schemas("object"), st.lists(_PAIRS, min_size=10, max_size=20))
def test_random_schemas_and_documents_with_repeated_names(schema: Any, texts: list[str]) -> None:
    found = analysed(schema)
    if found is None or found.report.enforcement is not Enforcement.ENFORCED:
        return
    event("a schema that is enforced")
    grammar = schemas.compiled(found.grammar.ebnf)
    for text in texts:
        if schemas.accepts(grammar, text):
            event("an accepted document")
            if without_repeats(text) != text:
                event("an accepted document with a repeated name")
            assert valid(schema, text), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rewrites_and_documents_with_repeated_names(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(10):
        schema, _ = KINDS[kind](rng)
        found = analysed(schema)
        if found is None or found.report.enforcement is not Enforcement.ENFORCED:
            continue
        grammar = schemas.compiled(found.grammar.ebnf)
        for text in rng.sample(OBJECTS, 150):
            if schemas.accepts(grammar, text):
                assert valid(schema, text), (schema, text)
