"""The report on keywords, where what is checked somewhere decides about others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.report import Enforcement
from service.types import Grammar, GrammarKind


def checked(schema: Any) -> dict[str, str]:
    """Pointers of what is only checked, and why."""
    found = analyse(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), DEFAULT_LIMITS)
    return {
        one.pointer: one.why
        for one in found.report.keywords
        if one.enforcement is Enforcement.CHECKED
    }


OPEN = {"uniqueItems": True}
"""A condition that no grammar knows to be met."""


@pytest.mark.parametrize("condition", [OPEN, {"$ref": "#/$defs/open"}, {"allOf": [OPEN]}])
def test_what_an_open_condition_decides_about_is_checked(condition: Any) -> None:
    found = checked(
        {
            "type": "array",
            "items": {"type": "string", "maxLength": 3},
            "maxItems": 9,
            "if": condition,
            "then": {"minItems": 2},
            "else": {"$ref": "#/$defs/few"},
            "$defs": {"few": {"maxItems": 5}, "open": OPEN},
        }
    )
    assert {"/then/minItems", "/else/$ref", "/$defs/few/maxItems"} < found.keys()
    assert found["/then/minItems"] == "applies by /if, of which something is only checked"
    assert found.keys().isdisjoint({"/maxItems", "/items/maxLength"})


def test_a_condition_that_is_enforced_decides() -> None:
    assert not checked(
        {"type": "integer", "if": {"minimum": 3}, "then": {"multipleOf": 2}, "else": {"minimum": 0}}
    )


@pytest.mark.parametrize("value", [{}, "3", None, [1]])
def test_what_is_no_keyword_of_the_draft_and_never_used_is_left_alone(value: Any) -> None:
    """Draft-07 has no ``$defs``, so nothing has looked at what is below."""
    found = checked(
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "if": OPEN,
            "then": {"minItems": 2},
            "$defs": {"a": {"maxLength": value, "minItems": value}},
        }
    )
    assert "/then/minItems" in found
