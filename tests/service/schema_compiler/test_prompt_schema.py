"""The schema as a model reads it: shorter, and it says the same."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from service.schema_compiler.frontend.keywords import KEYWORDS
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.prompt_schema import prompt_schema


class Line(BaseModel):
    text: str = Field(description="as it is printed")
    unit_price: float = Field(ge=0.07)


class Receipt(BaseModel):
    """A receipt of a shop."""

    total_tax: float = Field(description="tax alone, not the total")
    lines: list[Line]
    title: str | None = Field(None, title="Heading")


def test_a_schema_of_pydantic() -> None:
    found = prompt_schema(json.dumps(Receipt.model_json_schema()))
    assert found == (
        '{"$defs":{"Line":{"properties":{"text":{"description":"as it is printed","type":"string"},'
        '"unit_price":{"minimum":0.07,"type":"number"}},"required":["text","unit_price"],'
        '"type":"object"}},"description":"A receipt of a shop.","properties":{"total_tax":'
        '{"description":"tax alone, not the total","type":"number"},"lines":{"items":'
        '{"$ref":"#/$defs/Line"},"type":"array"},"title":{"anyOf":[{"type":"string"},'
        '{"type":"null"}],"default":null,"title":"Heading"}},"required":["total_tax","lines"],'
        '"title":"Receipt","type":"object"}'
    )


def test_only_keywords_are_left_out() -> None:
    """Names of properties and values may be those of keywords."""
    told = {
        "properties": {
            "$comment": {"const": {"$comment": "x", "title": "t"}},
            "title": {"enum": [{"$schema": "s"}, {"title": "title"}]},
            "$schema": {"default": {"$comment": 1}, "examples": [{"title": ""}]},
        },
        "required": ["title", "$schema"],
    }
    noise = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": "no word of it"}
    found = prompt_schema(json.dumps(told | noise))
    assert json.loads(found) == told
    assert prompt_schema('{"properties": {"a_b": {"$comment": "", "title": "A B"}}}') == (
        '{"properties":{"a_b":{}}}'
    )


def test_digits_and_letters_stay() -> None:
    source = (
        '{"multipleOf": 0.10000000000000000001, "maximum": 1e300, "description": "Größe\\n≤ 1"}'
    )
    assert prompt_schema(source) == (
        '{"multipleOf":0.10000000000000000001,"maximum":1e+300,"description":"Größe\\n≤ 1"}'
    )
    assert prompt_schema("true") == "true"


def test_as_deep_as_the_operator_allows() -> None:
    deep: Any = True
    for _ in range(300):
        deep = {"not": deep}
    text = json.dumps(deep)
    assert prompt_schema(text, SchemaLimits(max_depth=400)) == text.replace(" ", "")


SCHEMAS = st.fixed_dictionaries(
    {},
    optional={
        "title": st.sampled_from(["A", "a b", "other"]),
        "$comment": st.text(max_size=3),
        "type": st.sampled_from(["object", "string", "array", "integer"]),
        "maxLength": st.sampled_from([0, 1, 3]),
        "required": st.sampled_from([["a"], ["a_b", "title"]]),
        "const": st.sampled_from([{"title": "A"}, ["$comment"], 0.5, "a"]),
    },
)
VALUES = (
    {},
    {"a": 1},
    {"a_b": "x", "title": "A"},
    {"title": "A"},
    ["$comment"],
    "a",
    "",
    "long",
    0.5,
)


@given(SCHEMAS, SCHEMAS, SCHEMAS)
@pytest.mark.slow
def test_it_allows_the_same_values(
    whole: dict[str, Any], part: dict[str, Any], other: dict[str, Any]
) -> None:
    whole = whole | {"properties": {"a": part, "a_b": other, "title": {"anyOf": [part, other]}}}
    found = json.loads(prompt_schema(json.dumps(whole)))
    for value in VALUES:
        both = (jsonschema.Draft202012Validator(one).is_valid(value) for one in (whole, found))
        assert len(set(both)) == 1, value
    assert not {name for name in found if name not in KEYWORDS}
