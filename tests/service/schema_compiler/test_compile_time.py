"""Patterns that an engine would compile for too long are checked in the finished answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.schema_compiler.api import compile_schema
from service.schema_compiler.ir.values import AnyText, String
from service.schema_compiler.lower.compile_time import MAX_MS, TOO_SLOW, compile_ms, document_ms
from service.schema_compiler.lower.strings import lower_regex
from service.schema_compiler.report import Enforcement

WORDS = r"^(\S+ ){0,%d}\S+$"
"""At most so many words and one more."""


def of_strings(*patterns: str) -> dict[str, object]:
    properties = {f"p{i}": {"type": "string", "pattern": one} for i, one in enumerate(patterns)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def checked(schema: object) -> dict[str, str]:
    keywords = compile_schema(json.dumps(schema)).report.keywords
    return {one.pointer: one.why for one in keywords if one.enforcement is Enforcement.CHECKED}


def test_a_pattern_over_the_budget_is_checked() -> None:
    assert checked(of_strings(WORDS % 20)) == {}
    found = checked(of_strings(WORDS % 190))
    assert list(found) == ["/properties/p0/pattern"]
    assert "too large" in found["/properties/p0/pattern"]


def test_patterns_share_the_budget_of_a_grammar() -> None:
    """Each of them fits; the first that do are enforced, and the others named."""
    patterns = [f"^.{{1,{n}}}x$" for n in (50, 51, 52, 53)]
    alone = [checked(of_strings(one)) for one in patterns]
    assert alone == [{}] * len(patterns)
    found = checked(of_strings(*patterns))
    assert 0 < len(found) < len(patterns)
    assert set(found.values()) == {TOO_SLOW}
    assert document_ms(compile_schema(json.dumps(of_strings(*patterns))).document) <= MAX_MS


def test_equal_patterns_count_once() -> None:
    assert checked(of_strings(*[WORDS % 60] * 5)) == {}


def test_overlaps_are_given_up_before_patterns() -> None:
    """An automaton of "exactly one of five words" takes the states of all five words for each of them."""
    words = ["customer", "maker", "operator", "admin", "designer"]
    schema: dict[str, Any] = {"type": "string", "oneOf": [{"pattern": word} for word in words]}
    assert set(checked(schema)) == {f"/oneOf/{i}/pattern" for i in range(5)}
    document = compile_schema(json.dumps(schema)).document
    assert document_ms(document) <= MAX_MS
    sets = [one.texts for one in document.values[document.root] if isinstance(one, String)]
    assert len(sets) == 5
    assert not any(isinstance(texts, AnyText) for texts in sets)
    assert checked({"type": "string", "oneOf": schema["oneOf"][:2]}) == {}


@pytest.mark.parametrize(
    ("least", "most"),
    [
        ("[0-9]{30}", "[a-z]{30}"),
        ("[a-z]{30}", r"\w{30}"),
        (r"\w{30}", "[ -~]{30}"),
        ("[ -~]{30}", ".{30}"),
        ("(?:.x)*", ".{3}"),
    ],
)
def test_states_cost_what_their_characters_do(least: str, most: str) -> None:
    assert compile_ms(lower_regex(least).found) < compile_ms(lower_regex(most).found)


@pytest.mark.parametrize("pattern", ["([a-z]{1,7} ){400}", r"(\w{1,12} ){1,190}"])
def test_a_repeated_group_is_a_rule_and_costs_once(pattern: str) -> None:
    assert lower_regex(pattern).found is not None
    assert checked(of_strings(f"^{pattern}$")) == {}
