"""Chat completions through the real server: what is answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.engines.fake import FakeEngine
from service.types import GenerateRequest, GrammarKind, ImagePart, Role, TextPart
from tests.service.harness import image_bytes
from tests.service.http_api.harness import (
    data_url,
    events,
    image_part,
    request,
    schema_format,
    serving,
    shown,
    streamed,
)

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "name": {"type": "string", "maxLength": 9}},
    "required": ["x", "name"],
    "additionalProperties": False,
}


class Recorder(FakeEngine):
    """Keeps the requests that it gets."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.requests: list[GenerateRequest] = []

    def generate(self, request: GenerateRequest) -> Any:
        self.requests.append(request)
        return super().generate(request)


async def test_a_text_is_answered_in_openais_form() -> None:
    async with serving(FakeEngine("One two.")) as server:
        reply = await server.chat()
    assert reply.status == 200
    found = reply.json
    assert found["object"] == "chat.completion"
    assert found["model"] == "fake"
    assert found["id"].startswith("chatcmpl-")
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "One two.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = found["usage"]
    assert usage["completion_tokens"] == 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + 2
    assert usage["prompt_tokens_details"] == {"image_tokens": 0}


async def test_images_stand_where_the_caller_put_them() -> None:
    engine = Recorder("ok")
    messages = [
        {"role": "developer", "content": "Be short."},
        *shown("before", image_bytes(64, 64), "between", image_bytes(32, 32), "after"),
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": [image_part(image_bytes()), {"type": "text", "text": "Last?"}]},
    ]
    async with serving(engine) as server:
        reply = await server.chat(messages=messages)
    assert reply.status == 200
    assert reply.json["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    found = engine.requests[-1].messages
    assert [message.role for message in found] == [
        Role.SYSTEM,
        Role.USER,
        Role.ASSISTANT,
        Role.USER,
    ]
    kinds = [part.text if isinstance(part, TextPart) else "image" for part in found[1].parts]
    assert kinds == ["before", "image", "between", "image", "after"]
    sizes = [
        (part.image.width, part.image.height)
        for message in found
        for part in message.parts
        if isinstance(part, ImagePart) and part.image
    ]
    assert sizes == [(64, 64), (32, 32), (64, 48)]


async def test_an_image_url_may_be_a_bare_string() -> None:
    engine = Recorder("ok")
    part = {"type": "image_url", "image_url": data_url(image_bytes())}
    async with serving(engine) as server:
        assert (await server.chat(messages=[{"role": "user", "content": [part]}])).status == 200
    assert len(engine.requests[-1].all_images) == 1


@pytest.mark.parametrize(("detail", "most"), [("low", 512 * 512), ("high", None), (None, None)])
async def test_low_detail_bounds_the_pixels(detail: str | None, most: int | None) -> None:
    engine = Recorder("ok")
    message = {"role": "user", "content": [image_part(image_bytes(), detail=detail)]}
    async with serving(engine) as server:
        assert (await server.chat(messages=[message])).status == 200
    assert engine.requests[-1].all_images[0].max_pixels == most


async def test_sampling_reaches_the_engine_and_is_greedy_by_default() -> None:
    engine = Recorder("ok")
    options = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 4, "repetition_penalty": 1.25, "seed": 7,
        "max_completion_tokens": 5,
    }  # fmt: skip
    async with serving(engine) as server:
        assert (await server.chat(**options, max_tokens=5)).status == 200
        assert (await server.chat(top_k=-1)).status == 200
    first, second = (one.sampling for one in engine.requests[-2:])
    assert (first.temperature, first.top_p, first.top_k) == (0.5, 0.9, 4)
    assert (first.repetition_penalty, first.seed, first.max_tokens) == (1.25, 7, 5)
    assert (second.temperature, second.top_k, second.max_tokens) == (0.0, 0, None)


async def test_a_schema_is_enforced_and_reported() -> None:
    engine = Recorder()
    async with serving(engine) as server:
        reply = await server.chat(response_format=schema_format(POINT, strict=True))
    assert reply.status == 200
    assert json.loads(reply.text) == {"x": 0, "name": "name"}
    grammar = engine.requests[-1].grammar
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    report = reply.json["structured_output"]
    assert (report["enforcement"], report["checked"], report["attempts"]) == ("enforced", [], 1)


async def test_numbers_of_a_schema_are_the_decimals_that_were_sent() -> None:
    body = json.dumps(
        request(response_format=schema_format({"type": "number", "multipleOf": "STEP"}))
    ).replace('"STEP"', "0.010000000000000000000001")
    engine = Recorder("0.010000000000000000000001")
    async with serving(engine) as server:
        reply = await server.post(body.encode())
    assert reply.status == 200, reply.body
    assert engine.requests[-1].grammar is not None
    assert "0.010000000000000000000001" in engine.requests[-1].grammar.source


async def test_openais_strict_is_not_a_demand_for_enforcement() -> None:
    schema = {"type": "string", "minLength": 100, "maxLength": 2000}
    async with serving(FakeEngine(json.dumps("x" * 200))) as server:
        reply = await server.chat(response_format=schema_format(schema, strict=True))
        assert reply.status == 200, reply.body
        assert reply.json["structured_output"]["enforcement"] == "checked"
        assert reply.json["structured_output"]["checked"]
        refused = await server.chat(
            response_format=schema_format(schema, strict=True), require_enforced=True
        )
    assert (refused.status, refused.error["code"]) == (400, "SCHEMA_NOT_ENFORCED")
    assert refused.error["param"] == "response_format.json_schema.schema"


async def test_any_json_object() -> None:
    async with serving(FakeEngine('{"a": [1]}')) as server:
        reply = await server.chat(response_format={"type": "json_object"})
        assert reply.text == '{"a": [1]}'
    async with serving(FakeEngine("[1]")) as server:
        reply = await server.chat(response_format={"type": "json_object"})
    assert (reply.status, reply.error["code"]) == (500, "OUTPUT_INVALID")


@pytest.mark.parametrize(
    ("constraint", "kind", "source"),
    [
        ({"json": POINT}, GrammarKind.JSON_SCHEMA, json.dumps(POINT)),
        ({"json": json.dumps(POINT)}, GrammarKind.JSON_SCHEMA, json.dumps(POINT)),
        ({"regex": "fa[jk]e"}, GrammarKind.REGEX, "fa[jk]e"),
        ({"choice": ["left", "right"]}, GrammarKind.CHOICE, '["left", "right"]'),
        ({"grammar": 'root ::= "fake"'}, GrammarKind.EBNF, 'root ::= "fake"'),
    ],
)
async def test_vllms_structured_outputs(
    constraint: dict[str, Any], kind: GrammarKind, source: str
) -> None:
    engine = Recorder()
    async with serving(engine) as server:
        reply = await server.chat(structured_outputs=constraint)
    assert reply.status == 200, reply.body
    grammar = engine.requests[-1].grammar
    assert grammar is not None
    assert (grammar.kind, grammar.source) == (kind, source)


TOOL = {"type": "function", "function": {"name": "locate", "parameters": POINT, "strict": True}}
NAMED = {"type": "function", "function": {"name": "locate"}}


@pytest.mark.parametrize("choice", [NAMED, "required"])
async def test_a_forced_tool_is_structured_output(choice: Any) -> None:
    engine = Recorder()
    async with serving(engine) as server:
        reply = await server.chat(tools=[TOOL], tool_choice=choice)
        stream = await server.chat(tools=[TOOL], tool_choice=choice, stream=True)
    assert reply.status == 200, reply.body
    (choice_found,) = reply.json["choices"]
    assert choice_found["finish_reason"] == "tool_calls"
    message = choice_found["message"]
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "locate")
    assert json.loads(call["function"]["arguments"]) == {"x": 0, "name": "name"}
    chunks = events(stream.body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0]["tool_calls"][0]["function"] == {"name": "locate", "arguments": ""}
    assert deltas[0]["tool_calls"][0]["id"]
    arguments = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas[1:-1]]
    assert json.loads("".join(arguments)) == {"x": 0, "name": "name"}
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_tool_without_parameters_takes_none() -> None:
    tool = {"type": "function", "function": {"name": "go"}}
    async with serving() as server:
        reply = await server.chat(tools=[tool], tool_choice="required")
    (call,) = reply.json["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == "{}"


async def test_no_tool_is_called_with_the_choice_none() -> None:
    engine = Recorder("Just text.")
    async with serving(engine) as server:
        reply = await server.chat(tools=[TOOL], tool_choice="none")
    assert reply.text == "Just text."
    assert engine.requests[-1].tools == ()


async def test_earlier_tool_calls_are_part_of_the_conversation() -> None:
    engine = Recorder("ok")
    call = {"id": "c1", "type": "function", "function": {"name": "locate", "arguments": '{"x":1}'}}
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "at 1"},
    ]
    async with serving(engine) as server:
        assert (await server.chat(messages=messages)).status == 200
        messages[-1]["tool_call_id"] = "c2"
        refused = await server.chat(messages=messages)
    found = engine.requests[-1].messages
    assert [one.name for one in found[1].tool_calls] == ["locate"]
    assert found[2].role is Role.TOOL
    assert refused.error["param"] == "messages[2].tool_call_id"


# Cut text


async def test_cut_free_text_ends_with_length() -> None:
    async with serving(FakeEngine("one two three four")) as server:
        reply = await server.chat(max_tokens=2)
        stream = await server.chat(max_tokens=2, stream=True)
    assert reply.status == 200
    assert reply.text == "one two"
    assert reply.json["choices"][0]["finish_reason"] == "length"
    chunks = events(stream.body)
    assert streamed(chunks) == "one two"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "[a-z ]*"}},
        {"tools": [TOOL], "tool_choice": "required"},
    ],
)
async def test_a_cut_answer_under_a_grammar_is_an_error(form: dict[str, Any]) -> None:
    async with serving(FakeEngine('{"a": "b c d e f g h i j"}')) as server:
        reply = await server.chat(**form, max_tokens=2)
        newer = await server.chat(**form, max_completion_tokens=2)
        stream = await server.chat(**form, max_tokens=2, stream=True)
    assert (reply.status, reply.error["code"]) == (422, "OUTPUT_TRUNCATED")
    assert "raise max_tokens" in reply.error["message"]
    assert "raise max_completion_tokens" in newer.error["message"]
    assert reply.headers["x-should-retry"] == "false"
    *_, last, done = events(stream.body)
    assert last["error"]["code"] == "OUTPUT_TRUNCATED"
    assert done == "[DONE]"


async def test_stop_texts_end_free_text() -> None:
    async with serving(FakeEngine("one two three four")) as server:
        assert (await server.chat(stop="three")).text == "one two "
        assert (await server.chat(stop=["four", "wo"])).text == "one t"
        stream = await server.chat(stop=["wo thr"], stream=True)
    chunks = events(stream.body)
    assert streamed(chunks) == "one t"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


async def test_stop_texts_never_cut_json() -> None:
    async with serving() as server:
        reply = await server.chat(stop='"', response_format=schema_format(POINT))
    assert (reply.status, reply.error["param"]) == (400, "stop")


# Streams


async def test_a_stream_ends_with_the_reason_the_usage_and_done() -> None:
    async with serving(FakeEngine("één 日本語 😀 \n\n data: x")) as server:
        reply = await server.chat(stream=True, stream_options={"include_usage": True})
        plain = await server.chat(stream=True)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = events(reply.body)
    assert streamed(chunks) == "één 日本語 😀 \n\n data: x"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    *rest, last, usage, done = chunks
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    assert last["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in (*rest, last))
    assert len({chunk["id"] for chunk in (*rest, last, usage)}) == 1
    assert all("usage" not in chunk for chunk in events(plain.body)[:-1])


async def test_an_error_before_the_first_piece_has_a_status() -> None:
    async with serving(FakeEngine(context_length=10)) as server:
        reply = await server.chat(stream=True, max_tokens=100)
    assert (reply.status, reply.error["code"]) == (400, "CONTEXT_TOO_LONG")
    assert reply.error["param"] == "max_tokens"


async def test_an_invalid_answer_ends_a_stream_with_an_error() -> None:
    async with serving(FakeEngine('{"x": "no"}')) as server:
        reply = await server.chat(stream=True, response_format=schema_format(POINT))
    *_, last, done = events(reply.body)
    assert reply.status == 200
    assert last["error"]["code"] == "OUTPUT_INVALID"
    assert done == "[DONE]"


async def test_a_defect_in_a_stream_says_nothing_of_the_server() -> None:
    engine = FakeEngine("one two three")
    async with serving(engine) as server:
        engine.crash_after = 2
        reply = await server.chat(stream=True)
        whole = await server.chat()
    *_, last, done = events(reply.body)
    assert (last["error"]["code"], done) == ("INTERNAL", "[DONE]")
    assert b"secret" not in reply.body
    assert (whole.status, whole.headers["x-should-retry"]) == (500, "false")
    assert b"secret" not in whole.body


# Registered tasks


ANALYSIS = {
    "scene": "beach", "description": "Sand.", "subjects": [], "objects": ["ball", "ball"],
    "actions": [], "mood": [], "shot_type": "", "lighting": [], "tags": [],
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_a_registered_task_by_name(stream: bool) -> None:
    async with serving(FakeEngine(json.dumps(ANALYSIS))) as server:
        reply = await server.chat(
            task="image-analysis", messages=shown(image_bytes()), stream=stream
        )
    text = streamed(events(reply.body)) if stream else reply.text
    assert json.loads(text)["objects"] == ["ball"], "the task tidies the answer"


async def test_a_task_brings_its_own_prompt_and_grammar() -> None:
    async with serving() as server:
        text = await server.chat(task="image-analysis", messages=shown(image_bytes(), "and this"))
        form = await server.chat(
            task="image-analysis",
            messages=shown(image_bytes()),
            response_format={"type": "json_object"},
        )
        unknown = await server.chat(task="none-such", messages=shown(image_bytes()))
        empty = await server.chat(task="image-analysis", messages=[{"role": "user", "content": ""}])
    assert text.error["param"] == "messages[0].content[1]"
    assert form.error["param"] == "response_format"
    assert (unknown.status, unknown.error["code"]) == (404, "UNKNOWN_TASK")
    assert empty.error["code"] == "IMAGE_REQUIRED"


# Models


async def test_the_models_are_listed() -> None:
    async with serving() as server:
        listed = await server.request("GET", "/v1/models")
        one = await server.request("GET", "/v1/models/fake")
        unknown = await server.request("GET", "/v1/models/other")
        other = await server.chat(model="other")
    (model,) = listed.json["data"]
    assert model == one.json
    assert model["id"] == "fake"
    assert model["object"] == "model"
    assert model["max_model_len"] == 32_768
    assert model["input_modalities"] == ["text", "image"]
    for reply in (unknown, other):
        assert (reply.status, reply.error["code"]) == (404, "UNKNOWN_MODEL")
        assert "fake" in reply.error["message"]
