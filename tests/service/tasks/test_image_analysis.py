"""The ImageAnalysis task: rule by rule."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from service.errors import OutputInvalid, ServiceError
from service.tasks.image_analysis import (
    FIELDS,
    IMAGE_ANALYSIS,
    PROMPT,
    STRING_FIELDS,
    ImageAnalysis,
    document,
    parse,
    schema,
    usable,
)
from service.types import GrammarKind

FULL: dict[str, Any] = {
    "scene": "street",
    "description": "A man walks.",
    "subjects": ["man"],
    "objects": ["car", "lamp"],
    "actions": ["walking"],
    "mood": ["calm"],
    "shot_type": "wide shot",
    "lighting": ["daylight"],
    "tags": ["street", "man"],
}


def answer(**changes: Any) -> str:
    return json.dumps({**FULL, **changes})


def refused(text: str) -> OutputInvalid:
    with pytest.raises(OutputInvalid) as caught:
        parse(text)
    return caught.value


def test_a_full_answer() -> None:
    analysis = parse("\n " + answer() + " \n")
    assert document(analysis) == FULL
    assert analysis.objects == ("car", "lamp")


@pytest.mark.parametrize(
    "text",
    ["```json\n" + answer() + "\n```", "Here: " + answer(), answer() + " Done.", answer()[:-1], ""],
)
def test_text_around_the_json_is_an_error(text: str) -> None:
    assert refused(text).metadata["keyword"] == "json"


@pytest.mark.parametrize("text", ["[]", '"a"', "1", "null", "true", "[" + answer() + "]"])
def test_an_answer_that_is_not_an_object_is_an_error(text: str) -> None:
    assert refused(text).metadata["keyword"] == "type"


def test_the_last_member_of_a_name_counts() -> None:
    analysis = parse(answer()[:-1] + ', "scene": "other"}')
    assert analysis.scene == "other"
    assert analysis.mood == parse(answer()).mood


def test_all_missing_and_null_fields_are_named() -> None:
    value = {**FULL, "mood": None}
    del value["scene"], value["tags"]
    error = refused(json.dumps(value))
    assert error.metadata["fields"] == "scene, mood, tags"
    assert "scene, mood, tags" in error.message


def test_unknown_keys_are_an_error() -> None:
    error = refused(answer(colour="red", confidence=1))
    assert error.metadata["fields"] == "colour, confidence"
    assert len(refused(answer(**{"k" * 9999: 1})).message) < 200


@pytest.mark.parametrize("wrong", [1, 1.5, True, {}, [1], [["a"]], ["a", None]])
@pytest.mark.parametrize("name", FIELDS)
def test_wrong_types_are_an_error(name: str, wrong: Any) -> None:
    error = refused(answer(**{name: wrong}))
    assert error.metadata["pointer"] == f"/{name}"


@pytest.mark.parametrize("name", [n for n in STRING_FIELDS if n != "shot_type"])
def test_a_list_instead_of_a_string_is_an_error(name: str) -> None:
    refused(answer(**{name: ["one"]}))


def test_tags_in_one_string_split() -> None:
    assert parse(answer(tags="a, b;c\nd e,,")).tags == ("a", "b", "c", "d e")


@pytest.mark.parametrize("name", ["subjects", "objects", "actions", "mood", "lighting"])
def test_another_list_in_one_string_is_one_label(name: str) -> None:
    assert getattr(parse(answer(**{name: " a, b;c "})), name) == ("a, b;c",)


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in STRING_FIELDS])
def test_items_of_lists_are_never_split(name: str) -> None:
    assert getattr(parse(answer(**{name: ["a, b", "c;d\ne"]})), name) == ("a, b", "c;d\ne")


def test_shot_type_as_a_list() -> None:
    assert parse(answer(shot_type=[" close-up ", " "])).shot_type == "close-up"
    assert parse(answer(shot_type=[])).shot_type == ""
    assert refused(answer(shot_type=["a", "b"])).metadata["keyword"] == "maxItems"


def test_trim_drop_empties_and_exact_repeats_in_order() -> None:
    assert parse(answer(tags=[" b ", "a", "", "b", "B", "  "])).tags == ("b", "a", "B")
    assert parse(answer(scene="  street\n")).scene == "street"


@pytest.mark.parametrize(
    ("given_fields", "expected"),
    [
        ({}, False),
        ({"description": "x"}, False),
        ({"tags": ("x",)}, False),
        ({"description": "x", "tags": ("x",)}, True),
        ({"subjects": ("x",)}, True),
        ({"objects": ("x",)}, True),
        ({"actions": ("x",)}, True),
        ({"scene": "x", "mood": ("x",), "shot_type": "x", "lighting": ("x",)}, False),
    ],
)
def test_usable(given_fields: dict[str, Any], expected: bool) -> None:
    assert usable(ImageAnalysis(**given_fields)) is expected


def test_half_of_a_surrogate_pair_is_an_error() -> None:
    refused(answer(scene="x").replace('"x"', '"\\ud800"'))
    assert parse(answer(scene="😀")).scene == "😀"


def test_the_dataclass_the_schema_and_the_prompt_agree() -> None:
    assert [field.name for field in fields(ImageAnalysis)] == list(FIELDS)
    assert list(schema()["properties"]) == schema()["required"] == list(FIELDS)
    assert schema()["additionalProperties"] is False
    assert "enum" not in json.dumps(schema())


def test_the_prompt_has_one_line_for_each_field_and_no_examples() -> None:
    lines = PROMPT.splitlines()
    for name in FIELDS:
        assert sum(line.startswith(f"{name}: ") for line in lines) == 1
    assert len(lines) == len(FIELDS) + 2
    lower = PROMPT.lower()
    for word in ("e.g", "for example", "such as", "like ", "for instance", "“"):
        assert word not in lower
    assert not {'"', "'"} & set(PROMPT), "a quoted value would be an example"
    # Values that descriptions of such tasks like to give; none may pull answers toward it.
    for word in (
        "close-up",
        "wide",
        "indoor",
        "outdoor",
        "happy",
        "sunny",
        "backlit",
        "dog",
        "car",
    ):
        assert word not in lower


def test_the_task() -> None:
    assert IMAGE_ANALYSIS.name == "image-analysis"
    assert IMAGE_ANALYSIS.needs_image
    assert IMAGE_ANALYSIS.max_images is None
    assert IMAGE_ANALYSIS.grammar is not None
    assert IMAGE_ANALYSIS.grammar.kind is GrammarKind.JSON_SCHEMA
    assert list(json.loads(IMAGE_ANALYSIS.grammar.source)["properties"]) == list(FIELDS)


words = st.sampled_from(["", " ", "a", " a ", "a,b", "\n", "é"])
values = st.sampled_from([None, 1, True, {}]) | words | st.lists(words | st.none(), max_size=3)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from([*FIELDS, "extra"]), values))
def test_any_object_is_parsed_or_refused(value: dict[str, Any]) -> None:
    with contextlib.suppress(ServiceError):
        Draft202012Validator(schema()).validate(document(parse(json.dumps({**FULL, **value}))))


@given(st.text(alphabet='{}[]",:\\ abtrue0-9\ud7ff', max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with pytest.raises(OutputInvalid):
        parse(text)


clean = st.text(st.characters(exclude_categories=["Cs"]), max_size=10).map(str.strip)
lists = st.lists(clean.filter(bool), max_size=4, unique=True)


@pytest.mark.slow
@given(st.fixed_dictionaries({name: clean if name in STRING_FIELDS else lists for name in FIELDS}))
def test_tidy_answers_are_not_changed(value: dict[str, Any]) -> None:
    analysis = parse(json.dumps(value, ensure_ascii=False))
    assert document(analysis) == value
    assert parse(json.dumps(document(analysis))) == analysis
