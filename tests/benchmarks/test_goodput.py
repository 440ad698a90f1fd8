"""The grammars that `benchmarks.goodput` sends, and the lines that it makes of the results."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.goodput import Result, asks, choices, opened, regex, row
from examples.drawings.questions import QUESTIONS
from service.tasks.image_analysis import schema as analysis_schema

SCHEMAS = {one.name: one.schema for one in QUESTIONS if one.schema is not None}


@pytest.mark.slow
def test_every_right_answer_is_in_its_grammars() -> None:
    for one in asks(2):
        if one.schema is None:
            assert one.answer in one.choices
            continue
        assert re.fullmatch(regex(one.schema), one.answer), one.name
        listed = choices(one.schema)
        assert listed is None or one.answer in listed, one.name
        assert one.is_right(one.answer)
        assert not one.is_right(one.answer[:-1])


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_expression_of_an_answer_matches_nothing_else(name: str) -> None:
    schema = SCHEMAS[name]
    assert schema is not None
    expression = regex(schema)
    assert not re.fullmatch(expression, "{}")
    for text in choices(schema) or ():
        assert re.fullmatch(expression, text)
        assert not re.fullmatch(expression, text[:-1] + ', "more": 1}')


def test_lists_without_an_upper_bound() -> None:
    expression = regex(analysis_schema()["properties"]["tags"])
    for text in ("[]", '["a"]', '["a", "b", "c"]'):
        assert re.fullmatch(expression, text)
    assert not re.fullmatch(expression, '["a", ]')


def test_choices_are_left_out_where_they_are_many() -> None:
    assert choices(SCHEMAS["objects"] or {}) is None
    assert choices(SCHEMAS["count"] or {}) == tuple(json.dumps({"count": n}) for n in range(5))


def test_opened_schemas_say_nothing_of_additional_properties() -> None:
    assert "additionalProperties" not in json.dumps(opened(SCHEMAS["objects"]))


def test_the_tax_counts_the_same_questions() -> None:
    free = {0: True, 1: True, 2: False, 3: True}
    found = [Result(0, "OK", True), Result(1, "OUTPUT_INVALID", False), Result(2, "OK", False)]
    line = row("json_schema", found, free)
    assert line["calls"] == 3
    assert line["OK, %"] == pytest.approx(200 / 3)
    assert line["tax, points"] == pytest.approx(100 / 3)
    assert line["errors"] == "1 OUTPUT_INVALID"
