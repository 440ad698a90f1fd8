"""Answers with repeated names through real servers: ``json`` has the last one, ``text`` all of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.harness import failure, image_bytes, inline, run_request, running
from tests.service.http_api.harness import events as sse
from tests.service.http_api.harness import schema_format, serving, streamed

WRITTEN = '{"count": 1.50, "seen": [{"x": 0, "x": 1}], "count": 2.50}'
CUT = '{"seen": [{"x": 1}], "count": 2.50}'
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"count": {"type": "number", "minimum": 2}},
    "required": ["count"],
}


def asking(schema: Any = SCHEMA) -> pb.RunTaskRequest:
    return run_request(inline(json_schema=json.dumps(schema)))


async def test_json_has_the_last_member_of_a_name_and_text_is_as_written() -> None:
    async with running(FakeEngine(WRITTEN)) as started:
        result = (await started.stub.RunTask(asking(), timeout=60)).result
        request = pb.StreamTaskRequest(task=asking().task)
        events = [event async for event in started.stub.StreamTask(request, timeout=60)]
    assert (result.text, result.json) == (WRITTEN, CUT)
    assert "".join(event.delta for event in events) == WRITTEN
    assert (events[-1].result.text, events[-1].result.json) == (WRITTEN, CUT)
    assert result.enforcement == pb.ENFORCEMENT_ENFORCED, "an open object is enforced"


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"properties": {"count": {"maximum": 2}}}, "maximum"),  # the first one would fit
        ({"type": "object", "minProperties": 3}, "minProperties"),
        ({"properties": {"seen": {"items": {"minProperties": 2}}}}, "minProperties"),
    ],
)
async def test_the_document_that_is_given_out_is_validated(schema: Any, keyword: str) -> None:
    async with running(FakeEngine(WRITTEN)) as started:
        error = await failure(started.stub.RunTask(asking(schema), timeout=60))
    assert error.reason == "OUTPUT_INVALID"
    assert error.metadata["keyword"] == keyword


async def test_the_last_field_of_an_analysis_counts() -> None:
    fields = dict.fromkeys(("scene", "description", "shot_type"), "")
    lists = {name: [] for name in ("subjects", "objects", "actions", "mood", "lighting", "tags")}
    text = json.dumps({**fields, **lists, "objects": ["cup"]})[:-1] + ', "scene": "kitchen"}'
    task = pb.Task(name="image-analysis")
    async with running(FakeEngine(text)) as started:
        request = pb.RunTaskRequest(task=task, images=[pb.Image(data=image_bytes())])
        result = (await started.stub.RunTask(request, timeout=60)).result
    assert result.text == text
    assert json.loads(result.json)["scene"] == "kitchen"
    assert result.json.count('"scene"') == 1


TOOL = {"type": "function", "function": {"name": "count", "parameters": SCHEMA}}
RESPONSES = "/v1/responses"
RESPONSES_TOOL = {"type": "function", "name": "count", "parameters": SCHEMA}
FORMAT = {"format": {"type": "json_schema", "name": "count", "schema": SCHEMA}}


@pytest.mark.slow
async def test_over_http_answers_carry_json_and_streams_the_text() -> None:
    async with serving(FakeEngine(WRITTEN)) as server:
        whole = await server.chat(response_format=schema_format(SCHEMA))
        assert whole.text == CUT
        stream = await server.chat(response_format=schema_format(SCHEMA), stream=True)
        assert streamed(sse(stream.body)) == WRITTEN
        forced = await server.chat(tools=[TOOL], tool_choice="required")
        (call,) = forced.json["choices"][0]["message"]["tool_calls"]
        assert call["function"]["arguments"] == CUT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"text": FORMAT}, "response.output_text"),
        (
            {"tools": [RESPONSES_TOOL], "tool_choice": "required"},
            "response.function_call_arguments",
        ),
    ],
)
async def test_responses_carry_json_and_their_deltas_the_text(form: Any, kind: str) -> None:
    body = {"model": "fake", "input": "Count.", **form}
    async with serving(FakeEngine(WRITTEN)) as server:
        whole = await server.request("POST", RESPONSES, json.dumps(body).encode())
        assert whole.status == 200, whole.body
        (item,) = whole.json["output"]
        found = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert found == CUT
        body["stream"] = True
        stream = await server.request("POST", RESPONSES, json.dumps(body).encode())
    events = [
        json.loads(line.removeprefix("data: "))
        for line in stream.body.decode().splitlines()
        if line.startswith("data: ")
    ]
    deltas = [event["delta"] for event in events if event["type"] == f"{kind}.delta"]
    assert "".join(deltas) == WRITTEN
    (done,) = [event for event in events if event["type"] == f"{kind}.done"]
    assert done.get("text", done.get("arguments")) == CUT
