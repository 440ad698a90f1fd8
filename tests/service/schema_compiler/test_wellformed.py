"""What is plainly valid is valid by the metaschema; what is common is plainly valid."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from service.schema_compiler.budget import Budget, bounded
from service.schema_compiler.frontend import metaschema as wellformed
from service.schema_compiler.frontend.drafts import DEFAULT_DRAFT, DRAFTS, Draft
from service.schema_compiler.frontend.metaschema import plainly_valid

BY_NAME = {draft.name: draft for draft in DRAFTS.values()}
UNNAMED = "none"
BY_NAME[UNNAMED] = DEFAULT_DRAFT
KEYWORDS = sorted(
    {*wellformed._PLAIN, *wellformed._ONE, *wellformed._MANY, *wellformed._MAPS}
    | {*wellformed._UNUSUAL, "items", "enum", "dependencies", "exclusiveMinimum", "unknown"}
    | {"exclusiveMaximum"}
)
LEAVES = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        1.0,
        0.5,
        2,
        "",
        "a",
        "string",
        "integer",
        "#",
        "a#",
        "#a",
        "9",
        "a-b",
    ]
)
VALUES = st.recursive(
    LEAVES | st.lists(LEAVES, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
    ),
    max_leaves=6,
)


def plain(document: Any, name: str) -> bool:
    draft = BY_NAME[name]
    return plainly_valid(document, draft.name, older_forms=draft.older_forms)


def valid(document: Any, draft: Draft) -> bool:
    with bounded(Budget()):
        return bool(draft.metaschema.is_valid(document))


@settings(deadline=None)
@given(
    st.sampled_from(sorted(BY_NAME)), st.dictionaries(st.sampled_from(KEYWORDS), VALUES, max_size=3)
)
@pytest.mark.slow
def test_plainly_valid_is_valid(name: str, document: dict[str, Any]) -> None:
    if plain(document, name):
        event("plainly valid")
        assert valid(document, BY_NAME[name])


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("keyword", KEYWORDS)
def test_each_keyword_of_each_draft(keyword: str, name: str) -> None:
    draft = BY_NAME[name]
    found = 0
    for value in (
        True, False, None, 0, 1, -1, 1.5, "", "a", "#", "a#b", "string", [], ["a"], ["a", "a"], [1, 1], [{}],
        ["string", "null"], {}, {"a": {}}, {"a": True}, {"a": []}, {"a": ["b"]}, {"a": ["b", "b"]},
        {"type": 1}, {"a": {"type": 1}}, [{"type": 1}], [True], {"minLength": -1}, {"a": 1},
    ):  # fmt: skip
        document = {keyword: value}
        if plain(document, name):
            found += 1
            assert valid(document, draft), document
    boolean = name == "draft-04" and keyword.startswith("exclusive")  # only beside another keyword
    assert found or boolean or keyword in wellformed._UNUSUAL


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_common_needs_no_validator(name: str) -> None:
    document = {
        "$schema": "http://json-schema.org/schema#",
        "title": "a",
        "type": ["object", "null"],
        "required": ["a"],
        "properties": {"a": {"enum": ["x", "y"], "default": {}}, "b": {"$ref": "#/definitions/c"}},
        "definitions": {"c": {"items": {"minimum": 1.5, "multipleOf": 2}, "uniqueItems": True}},
        "additionalProperties": False,
        "dependencies": {"a": ["b"], "b": {"minLength": 3}},
        "allOf": [{"not": {"anyOf": [{"format": "date"}]}}],
    }
    assert plain(document, name)
    assert valid(document, BY_NAME[name])


def test_booleans_are_no_schemas_of_draft_04() -> None:
    assert not plainly_valid({"not": True}, "draft-04")
    assert plainly_valid({"additionalItems": True}, "draft-04")
    assert plainly_valid({"not": True}, "draft-06")


def test_older_forms_are_plain_where_they_are_allowed() -> None:
    document = {"items": [{"minimum": 1, "exclusiveMinimum": True}, True], "additionalItems": False}
    assert plain(document, UNNAMED)
    assert valid(document, DEFAULT_DRAFT)
    assert not plain(document, "2020-12")
    assert not valid(document, BY_NAME["2020-12"])
    assert not plain({"items": [{"type": 3}]}, UNNAMED)
