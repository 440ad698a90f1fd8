"""Which alternatives of a schema are found to exclude each other."""

import json
import re
from typing import Any

import pytest

from service.schema_compiler.api import Options, compile_schema
from service.schema_compiler.stages import STAGES

DISJOINT = "oneOf: branches are disjoint"
OVERLAPS = "oneOf: overlaps of its branches excluded"


def kind(value: object, *, required: bool = True) -> dict[str, Any]:
    return {"properties": {"kind": {"const": value}}, "required": ["kind"] if required else []}


BRANCHES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "values of a required property": (kind(1), kind(2), True),
    "the same value": (kind(1), {**kind(1), "required": ["kind", "a"]}, False),
    "values of a property that one requires": (kind(1), kind(2, required=False), True),
    "values of a property that none requires": (
        kind(1, required=False),
        kind(2, required=False),
        False,
    ),
    "types of a required property": (
        {"properties": {"a": {"type": "string"}}, "required": ["a"]},
        {"properties": {"a": {"type": "array"}}},
        True,
    ),
    "required and forbidden": ({"required": ["a"]}, {"not": {"required": ["a"]}}, True),
    "required and forbidden by false": ({"required": ["a"]}, {"properties": {"a": False}}, True),
    "required and no name of a closed object": (
        {"required": ["a"]},
        {"properties": {"b": True}, "additionalProperties": False},
        True,
    ),
    "required and a name of a closed object": (
        {"required": ["a"]},
        {"properties": {"a": True}, "additionalProperties": False},
        False,
    ),
    "required and the value of additional properties": (
        {"properties": {"a": {"type": "string"}}, "required": ["a"]},
        {"additionalProperties": {"type": "integer"}},
        True,
    ),
    "required and the value by a pattern": (
        {"properties": {"ab": {"type": "string"}}, "required": ["ab"]},
        {"patternProperties": {"^a": {"type": "integer"}}},
        True,
    ),
    "a subschema and its opposite": (
        {"properties": {"a": {"minimum": 3}}, "required": ["a"]},
        {"not": {"properties": {"a": {"minimum": 3}}}},
        False,  # these are two subschemas; it is not seen that they say the same
    ),
    "numbers of properties": ({"minProperties": 3}, {"maxProperties": 2}, True),
    "numbers of properties that meet": ({"minProperties": 2}, {"maxProperties": 2}, False),
}


@pytest.mark.parametrize("case", BRANCHES)
def test_disjoint_branches_are_found(case: str) -> None:
    first, second, disjoint = BRANCHES[case]
    schema = {"oneOf": [{"type": "object", **first}, {"type": "object", **second}]}
    for branches in (schema["oneOf"], schema["oneOf"][::-1]):
        report = compile_schema(json.dumps({"oneOf": branches})).report
        whats = [one.what for one in report.rewrites]
        assert (DISJOINT if disjoint else OVERLAPS) in whats


def test_what_excludes_each_other_only_with_a_third_part_is_left_out() -> None:
    """A product is compared with the next one by what is known of both of its parts."""
    parts = [
        [{"not": {"required": ["b"]}}, {"required": ["c"]}],
        [kind(1), kind(2)],
        [kind(1), {"required": ["b"]}],
        [kind(2), {"properties": {"c": False}, "required": ["d"]}],
    ]
    schema = {"type": "object", "allOf": [{"anyOf": part} for part in parts]}
    found = []
    for line in list(STAGES["normalized"](json.dumps(schema), Options()))[1:]:
        if not line.startswith("  object"):
            break
        found.append(sorted(set(re.findall(r"/allOf/(./anyOf/.)", line))))
    assert found == [
        ["0/anyOf/0", "1/anyOf/0", "2/anyOf/0", "3/anyOf/1"],
        ["0/anyOf/1", "1/anyOf/1", "2/anyOf/1", "3/anyOf/0"],
    ]
