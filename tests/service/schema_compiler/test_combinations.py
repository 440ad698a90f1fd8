"""Every small subschema with the exclusion of every other one, on values of every kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from service.schema_compiler.report import Enforcement
from tests.service.schema_compiler import schemas
from tests.service.schema_compiler.agreement import analysed

pytestmark = pytest.mark.slow

PARTS: list[Any] = [
    {"type": "boolean"},
    {"type": ["string", "null"]},
    {"type": "integer"},
    {"const": False},
    {"const": None},
    {"const": 1},
    {"const": "ab"},
    {"const": []},
    {"const": {"a": True}},
    {"enum": [True, 0, "a", [1], {}]},
    {"minimum": 1},
    {"maxLength": 1},
    {"maxItems": 1, "items": {"type": "boolean"}},
    {"required": ["a"]},
    {"properties": {"a": {"const": True}}},
    {"minProperties": 1, "additionalProperties": {"type": "boolean"}},
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 0.5, "", "a", "ab", "abc"),
    *([], [1], [True], [False, True], {}, {"a": True}, {"a": False}, {"b": True}, {"b": 1}),
]


@pytest.mark.parametrize("part", PARTS, ids=json.dumps)
def test_what_is_enforced_is_exact(part: Any) -> None:
    enforced = 0
    for other in PARTS:
        schema = {"allOf": [part, {"not": other}]}
        validator = Draft202012Validator(schema)
        valid = [value for value in VALUES if validator.is_valid(value)]
        found = analysed(schema)
        if found is None:
            assert not valid, schema
        elif found.report.enforcement is Enforcement.ENFORCED:
            grammar = schemas.compiled(found.grammar.ebnf)
            accepted = [value for value in VALUES if schemas.accepts_value(grammar, value)]
            assert accepted == valid, schema
            enforced += 1
    assert enforced >= len(PARTS) / 2
