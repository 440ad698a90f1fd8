"""What counts as text, in every form in which LMDeploy's APIs take a conversation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_ext.vision_off.parts import find, find_in_body
from tests.lmdeploy_ext.vision_off.samples import PARTS, TEXT_BODIES

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
TEXT_PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text"]), "text": SCALARS}
)
TEXT = st.recursive(
    SCALARS | TEXT_PART,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.fixed_dictionaries({"role": st.text(), "content": inner})
        | st.fixed_dictionaries({"type": st.just("tool_result"), "content": inner})
    ),
    max_leaves=8,
)
MEDIA = st.sampled_from([part for _, part in sorted(PARTS.items())])


@given(TEXT)
@pytest.mark.slow
def test_text_passes(conversation: Any) -> None:
    assert find(conversation, "messages") is None


@pytest.mark.slow
@given(st.lists(TEXT, max_size=3), MEDIA, st.lists(TEXT, max_size=3), st.booleans())
def test_a_media_part_is_found_at_any_position(
    before: list[Any], part: Any, after: list[Any], nested: bool
) -> None:
    content = [*before, part, *after]
    if nested:
        content = [{"type": "tool_result", "tool_use_id": "t", "content": content}]
    found = find([{"role": "tool", "content": content}], "messages")
    place = f"messages[0].content[{0 if nested else len(before)}]"
    assert found is not None
    assert found.startswith(f"{place}.content[{len(before)}]" if nested else place)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("field", ["messages", "system", "input", "prompt"])
def test_a_part_in_a_body(part: Any, field: str) -> None:
    assert find_in_body({"model": "m", field: [{"role": "user", "content": [part]}]}) is not None


@pytest.mark.parametrize("body", TEXT_BODIES.values(), ids=TEXT_BODIES)
def test_text_bodies(body: Any) -> None:
    assert find_in_body(body) is None


@pytest.mark.parametrize(
    ("conversation", "report"),
    [
        ([{"role": "user", "content": {"type": "image_url"}}], "messages[0].content is of type 'image_url'"),
        ([{"role": "user", "content": "x", "images": ["a"]}], "messages[0].images is set"),
        ([{"role": "user", "content": [b"\xff\xd8"]}], "messages[0].content[0] is an object of class bytes"),
        ([["a", {"type": "Image"}]], "messages[0][1] is of type 'Image'"),
        ([{"type": ["text"]}], "messages[0] is of type \"['text']\""),
        ([{"type": "x" * 99}], f"messages[0] is of type {'x' * 40!r}"),
        ([{"type": "computer_call_output", "output": {"type": "computer_screenshot"}}],
         "messages[0].output is of type 'computer_screenshot'"),
        ([{"type": "image_generation_call"}], "messages[0] is of type 'image_generation_call'"),
    ],
)  # fmt: skip
def test_the_report_names_place_and_kind(conversation: Any, report: str) -> None:
    assert find(conversation, "messages") == report


def test_the_first_one_is_reported() -> None:
    messages = [{"role": "user", "content": [{"type": "text"}, {"type": "b"}]}, {"type": "c"}]
    assert find(messages, "m") == "m[0].content[1] is of type 'b'"


@pytest.mark.slow
def test_nesting_of_any_depth() -> None:
    conversation: Any = {"type": "video"}
    for _ in range(100_000):
        conversation = [conversation]
    assert find(conversation, "") is not None
    while isinstance(conversation, list):  # or its release nests as deep
        (conversation,) = conversation
