"""Limits of strings that the decoder counts: which bounds the table has, and what is enforced."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from lmdeploy_ext.lengths.follower import Follower
from lmdeploy_ext.lengths.table import Table
from service.schema_compiler.api import CompiledSchema, Options, compile_schema
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.lower.string_constraints import TOO_LONG
from service.schema_compiler.report import Enforcement


def compiled(schema: Any, **options: Any) -> CompiledSchema:
    return compile_schema(
        json.dumps(schema), DEFAULT_LIMITS, Options(**{"lengths_beside": True, **options})
    )


def text(low: int | None = None, high: int | None = None) -> dict[str, Any]:
    bounds = {"minLength": low, "maxLength": high}
    return {
        "type": "string",
        **{name: value for name, value in bounds.items() if value is not None},
    }


def closed(**properties: Any) -> dict[str, Any]:
    names = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    }


def lengths_at(found: CompiledSchema, before: str) -> tuple[int, int | None] | None:
    """Least and greatest length of the string that comes after a text; None if nothing is limited."""
    if not found.lengths:
        return None
    table = Table(found.lengths)
    follower = Follower(table)
    assert follower.feed(before.encode() + b'"')
    maximum = follower.left
    return max(follower.need, 0), None if maximum == 2**31 - 1 else maximum


def why(found: CompiledSchema) -> dict[str, str]:
    checked = (one for one in found.report.keywords if one.enforcement is Enforcement.CHECKED)
    return {one.pointer: one.why for one in checked}


@pytest.mark.parametrize(
    ("low", "high"), [(0, 255), (0, 2000), (70, None), (3, 70), (0, 5), (2000, 2000)]
)
def test_lengths_are_enforced(low: int, high: int | None) -> None:
    for schema, before in [
        (text(low, high), ""),
        (closed(a=text(low, high)), '{"a": '),
        ({"type": "array", "items": text(low, high)}, "[[1], "),
        ({"type": "object", "additionalProperties": text(low, high)}, '{"x": "", "y": '),
        ({"anyOf": [text(low, high), {"type": "null"}]}, ""),
        (
            {"$defs": {"t": text(low, high)}, **closed(b=closed(a={"$ref": "#/$defs/t"}))},
            '{"b": {"a": ',
        ),
    ]:
        before = before.replace('"": ', "")
        found = compiled(schema)
        assert found.report.enforcement is Enforcement.ENFORCED, (schema, why(found))
        before = before.replace('"x": "", ', '"x": 1, ')
        assert lengths_at(found, before) == (low, high)


def test_a_grammar_does_not_count() -> None:
    schema = closed(a=text(2, 60), b=text(None, 30))
    beside, counted = compiled(schema), compiled(schema, lengths_beside=False)
    assert len(beside.grammar) < len(counted.grammar)
    assert compiled(closed(a=text(), b=text())).grammar == beside.grammar
    assert counted.lengths == b""


def test_without_limits_there_is_no_table() -> None:
    for schema in ({}, closed(a=text()), {"type": "integer"}, {"enum": ["abc"]}, text(0)):
        assert compiled(schema).lengths == b"", schema


def test_names_and_indices_lead_to_their_limits() -> None:
    schema = closed(
        a=text(None, 1),
        ab=text(None, 2),
        list={
            "type": "array",
            "prefixItems": [text(None, 3), text(None, 4)],
            "items": text(None, 5),
        },
        **{'é"\\': text(None, 6)},
    )
    found = compiled({**schema, "required": [], "additionalProperties": text(None, 7)})
    assert found.report.enforcement is Enforcement.ENFORCED
    for before, most in {
        '{"a": ': 1, '{"ab": ': 2, '{"list": [': 3, '{"list": ["", ': 4, '{"list": ["", "", ': 5,
        '{"é\\"\\\\": ': 6, '{"abc": ': 7, '{"list": ["", "", "", ""], "other": ': 7,
    }.items():  # fmt: skip
        assert lengths_at(found, before) == (0, most), before


def test_alternatives_at_one_place_share_the_widest_bounds() -> None:
    same = compiled(
        {"anyOf": [closed(a=text(None, 70)), closed(a=text(None, 70), b={"type": "null"})]}
    )
    assert same.report.enforcement is Enforcement.ENFORCED
    assert lengths_at(same, '{"a": ') == (0, 70)
    one = {
        "anyOf": [
            closed(kind={"const": 1}, a=text(None, 70)),
            closed(kind={"const": 2}, a=text(5, 90)),
        ]
    }
    found = compiled(one)
    assert why(found) == {"/anyOf/0/properties/a/maxLength": TOO_LONG}
    assert lengths_at(found, '{"kind": 1, "a": ') == (0, 90)
    free = compiled({"anyOf": [closed(a=text(None, 70)), closed(a={"type": "string"})]})
    assert why(free) == {"/anyOf/0/properties/a/maxLength": TOO_LONG}
    assert lengths_at(free, '{"a": ') is None


def test_the_grammar_counts_the_short_of_several_alternatives() -> None:
    schema = {
        "anyOf": [
            closed(kind={"const": 1}, a=text(None, 7), b=text(None, 80)),
            closed(kind={"const": 2}, a=text(5, 90), b=text(None, 80)),
        ]
    }
    found = compiled(schema)
    assert found.report.enforcement is Enforcement.ENFORCED, why(found)
    assert lengths_at(found, '{"kind": 1, "a": ') == (0, 90)
    assert lengths_at(found, '{"kind": 1, "a": "", "b": ') == (0, 80)


def test_constants_at_a_place_can_be_written() -> None:
    inside = compiled({"anyOf": [{"enum": ["red", "green"]}, text(2, 70)]})
    assert inside.report.enforcement is Enforcement.ENFORCED
    assert lengths_at(inside, "") == (2, 70)
    longer = compiled({"anyOf": [{"enum": ["x" * 100, ""]}, text(2, 70)]})
    assert set(why(longer)) == {"/anyOf/1/maxLength"}
    deep = compiled(
        {
            "anyOf": [
                {"const": {"a": ["x" * 100]}},
                closed(a={"type": "array", "items": text(0, 90)}),
            ]
        }
    )
    assert set(why(deep)) == {"/anyOf/1/properties/a/items/maxLength"}


def test_patterns_count_in_the_grammar() -> None:
    schema = {**text(2, 20), "pattern": "^[a-z ]+$"}
    found = compiled(schema)
    assert found.report.enforcement is Enforcement.ENFORCED
    assert found.lengths == b""
    assert found.grammar == compiled(schema, lengths_beside=False).grammar


def test_an_excluded_text_at_its_full_length_is_not_begun_to_the_end() -> None:
    found = compiled({**text(None, 3), "not": {"enum": ["abc", "ab"]}})
    assert found.report.enforcement is Enforcement.ENFORCED
    from tests.service.engines.common.test_lengths import Walker

    walker = Walker(found)
    assert walker.allows(b'"ab')
    assert not walker.allows(b'"abc')
    assert walker.allows(b'"abd"')
    assert not walker.allows(b'"ab"')
    assert not walker.allows(b'"abdd')


def test_a_value_that_contains_itself() -> None:
    node = closed(name=text(None, 100), below={"type": "array", "items": {"$ref": "#"}})
    found = compiled(node)
    assert found.report.enforcement is Enforcement.ENFORCED
    assert lengths_at(found, '{"name": "", "below": [{"name": "", "below": [{"name": ') == (0, 100)


def test_negated_lengths() -> None:
    found = compiled({"type": "string", "not": {"minLength": 80}})
    assert found.report.enforcement is Enforcement.ENFORCED, why(found)
    assert lengths_at(found, "") == (0, 79)


def test_too_many_positions_fall_back_to_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.schema_compiler.emit import length_plan

    monkeypatch.setattr(length_plan, "MAX_STATES", 2)
    schema = closed(a=text(None, 70), b=text(None, 20))
    found = compiled(schema)
    assert found.lengths == b""
    assert why(found) == {"/properties/a/maxLength": TOO_LONG}
    assert found.grammar == compiled(schema, lengths_beside=False).grammar


def pattern(source: str, **others: Any) -> dict[str, Any]:
    return {"type": "string", "pattern": source, **others}


@pytest.mark.parametrize(
    ("schema", "bounds"),
    [
        (pattern("^[a-z]{1,255}$"), (0, 255)),  # the grammar counts to 1
        (pattern("^x-[a-z]{70,}$"), (72, None)),
        (pattern("^[a-z]{128}$"), (128, 128)),
        (pattern("^[a-z]{1,255}$", maxLength=100), (0, 100)),
        (pattern("^[a-z]+@[a-z]+$", maxLength=254), (0, 254)),
        (pattern("^[a-z]+$", minLength=80, maxLength=90), (80, 90)),
    ],
)
def test_lengths_beside_a_pattern(schema: Any, bounds: tuple[int, int | None]) -> None:
    found = compiled(schema)
    assert found.report.enforcement is Enforcement.ENFORCED, why(found)
    assert lengths_at(found, "") == bounds


@pytest.mark.parametrize(
    ("keywords", "bounds"),
    [
        ({"format": "email"}, (3, 65)),
        ({"format": "email", "maxLength": 255}, (3, 65)),
        ({"format": "email", "maxLength": 20}, (3, 20)),
        ({"format": "hostname"}, (1, 63)),
        ({"format": "hostname", "pattern": "^a"}, (1, 63)),
    ],
)
def test_formats_that_count_are_left_to_the_decoder(keywords: Any, bounds: tuple[int, int]) -> None:
    found = compiled({"type": "string", **keywords})
    assert found.report.enforcement is Enforcement.ENFORCED, why(found)
    assert lengths_at(found, "") == bounds
    counted = compiled({"type": "string", **keywords}, lengths_beside=False)
    assert len(found.grammar) < len(counted.grammar) / 5


def test_several_formats_that_count_are_enforced() -> None:
    formats = {name: {"type": "string", "format": name} for name in ("email", "hostname")}
    assert compiled(closed(**formats)).report.enforcement is Enforcement.ENFORCED
    assert compiled(closed(**formats), lengths_beside=False).report.checked


def test_a_format_beside_another_string_is_counted_by_the_grammar() -> None:
    """Behind the second ``maxLength``, the first two are found not to be kept one after the other."""
    address = {"type": "string", "format": "email"}
    found = compiled(closed(a={"anyOf": [address, text(0, 100)]}, b=text(0, 200)))
    assert why(found) == {"/properties/a/anyOf/1/maxLength": TOO_LONG}
    assert lengths_at(found, '{"a": "", "b": ') == (0, 200)


@pytest.mark.parametrize(
    "schema",
    [
        pattern("^(?:[a-z][a-z])+$", minLength=71),  # a text of 70 cannot grow by one character
        pattern("^[a-z]{1,100}[0-9]*$"),  # which part is long is not known from the whole
        pattern("[a-z]{1,100}x"),
        {"anyOf": [pattern("^[a-z]+:[a-z]+$", maxLength=70), pattern("^[A-Z]+$", maxLength=70)]},
        {"propertyNames": {"maxLength": 70}, "properties": {"x" * 80: {}}},
    ],
)
def test_lengths_that_the_decoder_cannot_count(schema: Any) -> None:
    found = compiled(schema)
    if "propertyNames" not in schema:
        assert found.report.enforcement is Enforcement.CHECKED
    assert found.lengths == b"" or "propertyNames" in schema


def test_a_text_keeps_room_for_its_end() -> None:
    found = compiled(pattern("^[a-zé]+:[a-z]+:[a-z]+$", maxLength=70))
    follower = Follower(Table(found.lengths))
    assert follower.feed(b'"' + b"a" * 65)
    assert follower.fits("é".encode())
    assert not follower.fits(b"aa")  # four more are needed, and two are left
    assert follower.feed(b"a:a")
    assert not follower.fits(b"a")
    assert follower.feed(b":a")
    assert follower.fits(b'"')
    assert not follower.fits(b"a")


def test_texts_that_take_too_much_room_together_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from service.schema_compiler.emit import length_plan

    one = pattern("^\\p{Lu}+@\\p{L}+$", maxLength=70)
    others = [pattern(f"^\\p{{Lu}}+{i}@\\p{{L}}+$", maxLength=70) for i in range(3)]
    alone = compiled(closed(a=one))
    assert alone.report.enforcement is Enforcement.ENFORCED, why(alone)
    monkeypatch.setattr(length_plan, "MAX_EDGES", len(alone.lengths) // 4)
    found = compiled(closed(a=one, **{f"b{i}": other for i, other in enumerate(others)}))
    checked = why(found)
    assert 0 < len(checked) < 4
    assert all(one.endswith("/maxLength") for one in checked)
    assert lengths_at(found, '{"a": ') == (0, 70)


def test_large_automata_do_not_cost_a_schema_its_grammar() -> None:
    """Patterns that are written as they stand, whose automata are made for their lengths alone."""
    several = [pattern(f"^{i}(?:[0-9]{{30}}-){{60}}[a-z]+$", maxLength=5000 + i) for i in range(20)]
    found = compiled(closed(**{f"p{i}": one for i, one in enumerate(several)}))
    assert lengths_at(found, '{"p0": ') == (0, 5000)
    checked = why(found)
    assert 0 < len(checked) < 20
    assert checked["/properties/p19/maxLength"] == TOO_LONG
    assert all(one.endswith("/maxLength") for one in checked)


def test_the_bytes_of_a_text_are_those_of_its_characters() -> None:
    """Of all lengths in UTF-8, at the edges of blocks and within them."""
    edges = (0x7F, 0x80, 0xBF, 0xC0, 0x7FF, 0x800, 0x823, 0xFFF, 0x1000, 0xD7FF, 0xE000, 0xFFFF)
    pieces = [edges[i : i + 2] for i in range(0, len(edges), 2)] + [(0x10000, 0x1F63F)]
    inside = "".join(f"\\u{{{first:X}}}-\\u{{{last:X}}}" for first, last in pieces)
    found = compiled(pattern(f"^[a-z{inside}]+!$", maxLength=70))
    assert found.report.enforcement is Enforcement.ENFORCED, why(found)
    limits = Table(found.lengths)
    around = {code + d for piece in pieces for code in piece for d in (-1, 0, 1)} | {0x10FFFF}
    for code in sorted(around - set(range(0xD800, 0xE000))):
        follower = Follower(limits)
        assert follower.feed(b'"' + chr(code).encode())
        is_known = any(first <= code <= last for first, last in pieces)
        assert (follower.node != -1) is is_known, hex(code)


def test_the_tightest_of_several_lengths_counts() -> None:
    """A grammar counts to the tightest, so that none of them is left to the decoder."""
    bounds = [{"maxLength": 100}, {"maxLength": 50}]
    names = compiled({"type": "object", "propertyNames": {"allOf": bounds}})
    assert names.report.enforcement is Enforcement.ENFORCED, why(names)
    assert names.lengths == b""
    assert names.grammar == compiled({"propertyNames": bounds[1], "type": "object"}).grammar
    # A text of 50 characters without @ could not come to an end.
    schema = {**pattern("^[^@]{1,60}@[^@]{1,45}$"), "allOf": bounds}
    texts = compiled(schema)
    assert texts.lengths == b""
    assert set(why(texts)) == {"/allOf/0/maxLength", "/allOf/1/maxLength"}


def test_a_length_that_the_grammar_counts_for_some_names_is_not_left_for_others() -> None:
    """Behind the declared name only x can follow, which a grammar counts; elsewhere letters can."""
    found = compiled(
        {
            "type": "object",
            "properties": {"abc": {}},
            "patternProperties": {"^[a-z]{1,3}x*$": {}},
            "additionalProperties": False,
            "propertyNames": {"maxLength": 100},
        }
    )
    assert why(found) == {"/propertyNames/maxLength": TOO_LONG}
    assert found.lengths == b""


def test_an_excluded_name_at_its_full_length_is_not_begun_to_the_end() -> None:
    from tests.service.engines.common.test_lengths import Walker

    declared = "a" * 69
    names = {"maxLength": 70, "not": {"enum": [declared + "x"]}}
    found = compiled({"type": "object", "properties": {declared: {}}, "propertyNames": names})
    assert found.report.enforcement is Enforcement.ENFORCED, why(found)
    walker = Walker(found)
    begun = f'{{"{declared}'.encode()
    assert walker.allows(begun + b'": 1}')
    assert walker.allows(begun + b'y": 1}')
    assert not walker.allows(begun + b"x")


def test_names_have_lengths() -> None:
    closed_names = {"patternProperties": {"^[a-z]{1,70}$": {}}, "additionalProperties": False}
    for schema in (closed_names, {"propertyNames": {"maxLength": 70}}):
        found = compiled({"type": "object", **schema})
        assert found.report.enforcement is Enforcement.ENFORCED, why(found)
        follower = Follower(Table(found.lengths))
        assert follower.feed(b'{"a": {"' + b"x" * 80 + b'": 1}, "' + b"a" * 70)
        assert not follower.fits(b"a")
        assert follower.fits(b'": 1}')


def test_states_that_need_as_much_are_one_node() -> None:
    """The states that count the characters of a host name are not told apart, because the grammar has
    them. Behind each text, what it still needs stays the same."""
    schema = {"type": "string", "pattern": "^a*@(?=.{1,40}$)(?:x-?)*x$", "maxLength": 99}
    options = Options(lengths_beside=True)
    table = Table(compile_schema(json.dumps(schema), DEFAULT_LIMITS, options).lengths)
    assert len(table.distances) < 10
    for text, needed in (
        ("", 2),
        ("aa", 2),
        ("aa@", 1),
        ("@x", 0),
        ("@x-", 1),
        ("@x-x" + 17 * "-x", 0),
    ):
        node = table.states[table.root].text
        for byte in text.encode():
            node = table.next_node(node, byte)
        assert table.distances[node] == needed, text


@pytest.mark.parametrize(("begun", "loop"), [("\n", "\\"), ("é", "è"), ("漢", "漣"), ("😀", "😁")])
def test_characters_that_begin_with_the_same_byte_keep_states_apart(begun: str, loop: str) -> None:
    """Behind b, only the characters that begin a group may follow. Their first byte may not be written where
    only the other character would come to an end in time: nothing could follow it."""
    pattern = f"^(?:{begun}{{3}}x{re.escape(loop)}*b*)+$"
    schema = {"type": "string", "pattern": pattern, "maxLength": 9_999}
    options = Options(lengths_beside=True)
    table = Table(compile_schema(json.dumps(schema), DEFAULT_LIMITS, options).lengths)

    def needed(text: str, first: str) -> int:
        node = table.states[table.root].text
        written = json.dumps(text, ensure_ascii=False).encode()[1:-1]
        for byte in written + json.dumps(first, ensure_ascii=False).encode()[1:2]:
            node = table.next_node(node, byte)
        return table.distances[node]

    group = f"{begun * 3}x"
    assert needed(group, loop) == 0
    assert needed(f"{group}{loop}b", begun) == 3
    assert needed("", begun) == 3
