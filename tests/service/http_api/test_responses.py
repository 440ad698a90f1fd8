"""POST /v1/responses: the openai package against the real server, and every field."""

from __future__ import annotations

import inspect
import json
from typing import Any

import jsonschema
import openai
import pytest
from openai.resources.responses import AsyncResponses
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from service.engines.fake import FakeEngine
from service.http_api.responses_models import ResponsesRequest
from tests.service.harness import ROOT, image_bytes
from tests.service.http_api.harness import Reply, Serving, data_url, serving
from tests.service.http_api.test_chat import POINT, Recorder
from tests.service.http_api.test_openai import OF_THE_SDK, Point, client_of

pytestmark = pytest.mark.slow

RESPONSES = "/v1/responses"
VALUES: dict[str, tuple[Any, Any]] = {
    "access_programs": (None, {"cyber": "standard"}),
    "background": (False, True),
    "context_management": (None, [{"type": "compaction"}]),
    "conversation": (None, "conv_1"),
    "image": (None, {"context_compression": "enabled"}),
    "include": (["reasoning.encrypted_content"], ["message.output_text.logprobs"]),
    "input": ("Hello", []),
    "instructions": ("Be short.", 5),
    "max_output_tokens": (5, 0),
    "max_tool_calls": (3, "3"),
    "metadata": ({"a": "b"}, {"a": 5}),
    "model": ("fake", "other"),
    "moderation": (None, {"model": "a"}),
    "parallel_tool_calls": (True, "yes"),
    "previous_response_id": (None, "resp_1"),
    "prompt": (None, {"id": "a"}),
    "prompt_cache_key": ("a", 5),
    "prompt_cache_options": (None, {"mode": "explicit"}),
    "prompt_cache_retention": ("24h", 5),
    "reasoning": ({"effort": "none"}, {"effort": "high"}),
    "safety_identifier": ("a", 5),
    "service_tier": ("auto", "priority"),
    "store": (False, True),
    "stream": (False, "yes"),
    "stream_options": (None, {"include_obfuscation": False}),
    "temperature": (0.5, 3),
    "text": ({"format": {"type": "text"}}, {"format": {"type": "xml"}}),
    "tool_choice": ("none", "required"),
    "tools": ([], [{"type": "function", "name": "a"}]),
    "top_logprobs": (0, 3),
    "top_p": (0.5, 0),
    "truncation": ("disabled", "auto"),
    "user": ("a", 5),
}
"""Parameter -> a value that is accepted, and one that is refused by its name."""
NAMED_FURTHER_IN = {"metadata": "metadata.a", "tools": "tool_choice", "text": "text.format"}
"""Parameter -> the field that the error names, where it is not the parameter itself."""
SCHEMA: Any = {"format": {"type": "json_schema", "name": "point", "schema": POINT, "strict": True}}
TOOL: Any = {"type": "function", "name": "locate", "parameters": POINT, "strict": True}
NAMED: Any = {"type": "function", "name": "locate"}
ANY_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


async def ask(server: Serving, **fields: Any) -> Reply:
    """POST /v1/responses with fields over sensible ones; None leaves a field out."""
    document = {"model": "fake", "input": "Hello", **fields}
    body = json.dumps({key: value for key, value in document.items() if value is not None})
    return await server.request("POST", RESPONSES, body.encode())


def typed(body: bytes) -> list[dict[str, Any]]:
    """The data of server-sent events, whose names are their types and whose numbers go up."""
    found = []
    for number, block in enumerate(body.decode().removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        found.append(event)
    return found


def message(*parts: Any) -> dict[str, Any]:
    """An item of the user: texts, and images as the bytes of files."""
    content = [
        {"type": "input_text", "text": part}
        if isinstance(part, str)
        else {"type": "input_image", "image_url": data_url(part), "detail": "auto"}
        for part in parts
    ]
    return {"role": "user", "content": content}


# Every parameter


def test_every_parameter_of_the_package_has_a_treatment() -> None:
    parameters = set(inspect.signature(AsyncResponses.create).parameters) - OF_THE_SDK
    assert parameters == set(VALUES)
    assert parameters <= set(ResponsesRequest.model_fields)
    for name, field in ResponsesRequest.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), name
        assert extra["x-treatment"] in ("honoured", "neutral", "no effect", "refused"), name


async def test_no_parameter_is_ignored_silently() -> None:
    """A value that cannot be honoured is an error which names the parameter."""
    found: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    async with serving(FakeEngine("ok")) as server:
        for name, (accepted, refused) in VALUES.items():
            right = await ask(server, **{name: accepted})
            wrong = await ask(server, **{name: refused})
            error = (400, NAMED_FURTHER_IN.get(name, name))
            expected[name] = (200, *((404, None) if name == "model" else error))
            found[name] = (right.status, wrong.status, wrong.error["param"])
    assert found == expected


def test_the_page_lists_every_field() -> None:
    page = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
    _, _, section = page.partition("\n## The Responses API\n")
    section, _, _ = section.partition("\n## ")
    assert [name for name in ResponsesRequest.model_fields if f"`{name}`" not in section] == []


WRONG = [
    ("unknown field", {"temprature": 1}, "temprature", "did you mean temperature"),
    ("option of gRPC", {"strict": True}, "strict", "use require_enforced"),
    ("field of chat", {"messages": []}, "messages", "use input"),
    ("stop", {"stop": "a"}, "stop", "/v1/chat/completions"),
    ("no input", {"input": None}, "input", "required"),
    (
        "reference",
        {"input": [{"type": "item_reference", "id": "a"}]},
        "input[0]",
        "function_call_output",
    ),
    (
        "file",
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "a"}]}]},
        "input[0].content[0]",
        "input_image",
    ),
    (
        "file of an image",
        {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "file_id": "a"}]},
            ]
        },
        "input[0].content[0].image_url",
        "required",
    ),
    (
        "URL",
        {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "https://example.org/a.png"}],
                }
            ]
        },
        "input[0].content[0].image_url",
        "data: URL",
    ),
    ("role", {"input": [{"role": "tool", "content": "a"}]}, "input[0]", "assistant"),
    (
        "two systems",
        {"instructions": "a", "input": [{"role": "system", "content": "b"}]},
        "input[0].role",
        "beside instructions",
    ),
    (
        "late system",
        {"input": [message("a"), {"role": "developer", "content": "b"}, message("c")]},
        "input[1].role",
        "first message",
    ),
    (
        "ends with the assistant",
        {"input": [message("a"), {"role": "assistant", "content": "b"}]},
        "input[1].role",
        "last message",
    ),
    (
        "ends with a call",
        {
            "input": [
                message("a"),
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            ]
        },
        "input[1].type",
        "last message",
    ),
    (
        "arguments",
        {
            "input": [
                message("a"),
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"},
            ]
        },
        "input[1].arguments",
        "not JSON",
    ),
    (
        "call that is not there",
        {
            "input": [
                message("a"),
                {"type": "function_call_output", "call_id": "c", "output": "b"},
            ]
        },
        "input[1].call_id",
        "not the id",
    ),
    ("auto with tools", {"tools": [TOOL]}, "tool_choice", "auto"),
    ("a tool twice", {"tools": [TOOL, TOOL]}, "tools[1].name", "twice"),
    ("a tool of the server", {"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    (
        "a choice that is not there",
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}},
        "tool_choice.name",
        "one of the tools",
    ),
    (
        "two constraints",
        {"text": SCHEMA, "tools": [TOOL], "tool_choice": "required"},
        "tool_choice",
        "text.format",
    ),
    (
        "wrong schema",
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "strin"}}}},
        "text.format.schema",
        "",
    ),
    (
        "nested schema",
        {"text": {"format": {"type": "json_schema", "json_schema": {"schema": POINT}}}},
        "text.format.schema",
        "required",
    ),
    (
        "stream_options",
        {"stream_options": {"include_obfuscation": False}},
        "stream_options",
        "stream",
    ),
    (
        "obfuscation",
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "false",
    ),
    ("sampling", {"max_output_tokens": 10**6}, "max_output_tokens", ""),
]


async def test_wrong_fields_are_named() -> None:
    found, expected = {}, {}
    async with serving() as server:
        for name, fields, param, says in WRONG:
            reply = await ask(server, **fields)
            text = json.dumps(reply.error, ensure_ascii=False)
            expected[name] = (400, True, True)
            named = param in [reply.error["param"], *_params(reply.error)]
            found[name] = (reply.status, named or reply.error["param"], says in text or text)
    assert found == expected


def _params(error: dict[str, Any]) -> list[str]:
    return [one["param"] for one in error.get("violations", ())]


# The same as a chat completion


async def test_a_conversation_reaches_the_engine_as_that_of_a_chat_completion() -> None:
    engine = Recorder("ok")
    one, two = image_bytes(64, 64), image_bytes(32, 32)
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"x":1}'}}
    images = [{"type": "image_url", "image_url": {"url": data_url(data)}} for data in (one, two)]
    chat = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}, images[0]]},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [images[1]]},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "Sure?"},
    ]
    responses = [
        message("Where?", one),
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"x":1}'},
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_image", "image_url": data_url(two), "detail": "auto"}],
        },
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "Sure?"},
    ]
    async with serving(engine) as server:
        first = await server.chat(messages=chat, temperature=0.5, seed=3, max_tokens=7)
        second = await ask(
            server,
            instructions="Be short.",
            input=responses,
            temperature=0.5,
            seed=3,
            max_output_tokens=7,
        )
    assert (first.status, second.status) == (200, 200), second.body
    by_chat, by_responses = engine.requests[-2:]
    assert _shape(by_chat) == _shape(by_responses)
    assert by_chat.sampling == by_responses.sampling
    assert first.json["usage"]["prompt_tokens"] == second.json["usage"]["input_tokens"]


def _shape(given: Any) -> list[Any]:
    return [
        (
            one.role,
            one.tool_calls,
            [
                getattr(part, "text", None) or (part.image.width, part.image.height)
                for part in one.parts
            ],
        )
        for one in given.messages
    ]


async def test_a_text_is_answered_as_a_response() -> None:
    async with serving(FakeEngine("One two.")) as server:
        reply = await ask(server, metadata={"a": "b"}, instructions="Be short.")
    assert reply.status == 200
    found = reply.json
    Response.model_validate(found, strict=True)
    assert (found["object"], found["status"], found["store"]) == ("response", "completed", False)
    assert found["id"].startswith("resp_")
    assert (found["metadata"], found["instructions"]) == ({"a": "b"}, "Be short.")
    (item,) = found["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": "One two.", "annotations": [], "logprobs": []}
    ]
    usage = found["usage"]
    assert usage["output_tokens"] == 2
    assert usage["total_tokens"] == usage["input_tokens"] + 2
    assert set(found["timings"]) == {"queue_seconds", "first_token_seconds", "total_seconds"}


async def test_the_schema_comes_back_as_it_was_sent() -> None:
    schema = '{"type": "number", "multipleOf": 0.010000000000000000000001}'
    document = {"model": "fake", "input": "Hello", "text": SCHEMA}
    body = json.dumps(document).replace(json.dumps(POINT), schema)
    async with serving(FakeEngine("0.010000000000000000000001")) as server:
        reply = await server.request("POST", RESPONSES, body.encode())
    assert reply.status == 200, reply.body
    assert schema.encode() in reply.body
    assert reply.json["structured_output"]["attempts"] == 1


async def test_low_detail_bounds_the_pixels() -> None:
    engine = Recorder("ok")
    item = message(image_bytes())
    item["content"][0]["detail"] = "low"
    async with serving(engine) as server:
        assert (await ask(server, input=[item])).status == 200
    assert engine.requests[-1].all_images[0].max_pixels == 512 * 512


# Cut answers


async def test_cut_free_text_is_incomplete() -> None:
    async with serving(FakeEngine("one two three four")) as server:
        reply = await ask(server, max_output_tokens=2)
        stream = await ask(server, max_output_tokens=2, stream=True)
    for found in (reply.json, typed(stream.body)[-1]["response"]):
        assert found["status"] == found["output"][0]["status"] == "incomplete"
        assert found["incomplete_details"] == {"reason": "max_output_tokens"}
        assert found["output"][0]["content"][0]["text"] == "one two"
    assert typed(stream.body)[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize(
    "form", [{"text": SCHEMA}, {"tools": [TOOL], "tool_choice": "required"}], ids=["schema", "tool"]
)
async def test_a_cut_answer_under_a_grammar_is_an_error(form: dict[str, Any]) -> None:
    async with serving(FakeEngine('{"x": 1, "name": "a b c d e"}')) as server:
        reply = await ask(server, **form, max_output_tokens=2)
        stream = await ask(server, **form, max_output_tokens=2, stream=True)
    assert (reply.status, reply.error["code"]) == (422, "OUTPUT_TRUNCATED")
    assert "raise max_output_tokens" in reply.error["message"]
    *_, failed, last = typed(stream.body)
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "OUTPUT_TRUNCATED"
    assert (last["type"], last["code"]) == ("error", "OUTPUT_TRUNCATED")


# Streams


@pytest.mark.parametrize("kind", ["text", "schema", "tool"])
async def test_every_event_of_a_stream_is_one_of_the_package(kind: str) -> None:
    forms: dict[str, dict[str, Any]] = {
        "text": {},
        "schema": {"text": SCHEMA},
        "tool": {"tools": [TOOL], "tool_choice": NAMED},
    }
    answer = "één 😀 \n\ndata: x" if kind == "text" else None
    async with serving(FakeEngine(answer)) as server:
        reply = await ask(server, stream=True, **forms[kind])
        whole = await ask(server, **forms[kind])
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = typed(reply.body)
    for event in found:
        ANY_EVENT.validate_python(event, strict=True)
    kinds = [event["type"].removeprefix("response.") for event in found]
    delta = "function_call_arguments" if kind == "tool" else "output_text"
    part = [] if kind == "tool" else ["content_part.added"]
    done = [] if kind == "tool" else ["content_part.done"]
    begin = ["created", "in_progress", "output_item.added", *part]
    end = [f"{delta}.done", *done, "output_item.done", "completed"]
    assert kinds[: len(begin)] == begin
    assert kinds[-len(end) :] == end
    assert set(kinds[len(begin) : -len(end)]) == {f"{delta}.delta"}
    text = "".join(event["delta"] for event in found if event["type"].endswith(".delta"))
    (item,) = found[-1]["response"]["output"]
    assert text == (item["arguments"] if kind == "tool" else item["content"][0]["text"])
    (other,) = whole.json["output"]
    assert _without_names(item) == _without_names(other)
    assert len({json.dumps(event.get("item_id", item["id"])) for event in found}) == 1


def _without_names(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


async def test_an_error_before_the_first_piece_has_a_status() -> None:
    async with serving(FakeEngine(context_length=10)) as server:
        reply = await ask(server, stream=True, max_output_tokens=100)
    assert (reply.status, reply.error["code"]) == (400, "CONTEXT_TOO_LONG")
    assert reply.error["param"] == "max_output_tokens"


# The openai package


async def test_create_stream_and_parse() -> None:
    async with serving() as server, client_of(server) as client:
        text = await client.responses.create(model="fake", input="Hello", store=False)
        parsed = await client.responses.parse(model="fake", input="Hello", text_format=Point)
        async with client.responses.stream(
            model="fake", input="Hello", text_format=Point
        ) as stream:
            deltas = [one.delta async for one in stream if one.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        tool = await client.responses.parse(
            model="fake",
            input="Hello",
            tools=[TOOL],
            tool_choice={"type": "function", "name": "locate"},
        )
    assert text.output_text == "This is the fake engine."
    assert text._request_id
    assert parsed.output_parsed == final.output_parsed == Point(x=0, kind="near")
    assert "".join(deltas) == final.output_text
    (call,) = tool.output
    assert call.type == "function_call"
    assert call.parsed_arguments == {"x": 0, "name": "name"}


async def test_the_answer_can_be_part_of_the_next_request() -> None:
    engine = Recorder()
    async with serving(engine) as server, client_of(server) as client:
        first = await client.responses.create(model="fake", input="Hello")
        called: Any = await client.responses.create(
            model="fake",
            input="Hello",
            tools=[TOOL],
            tool_choice=NAMED,
        )
        result = {
            "type": "function_call_output", "call_id": called.output[0].call_id, "output": "ok"
        }  # fmt: skip
        items: Any = [message("a"), *first.output, message("b"), *called.output, result]
        again = await client.responses.create(model="fake", input=items)
    assert again.status == "completed"
    roles = [one.role.value for one in engine.requests[-1].messages]
    assert roles == ["user", "assistant", "user", "assistant", "tool"]


@pytest.mark.parametrize("kind", ["cut", "crash"])
async def test_a_stream_that_fails_raises_and_delivers_no_whole_answer(kind: str) -> None:
    engine = FakeEngine('{"x": 1, "name": "near"}')
    async with serving(engine) as server, client_of(server) as client:
        if kind == "crash":
            engine.crash_after = 2
        stream: Any = await client.responses.create(
            model="fake",
            input="Hello",
            stream=True,
            max_output_tokens=2 if kind == "cut" else None,
            text=SCHEMA,
        )
        seen = []

        async def read() -> None:
            async for event in stream:
                seen.append(event)

        with pytest.raises(openai.APIError) as raised:
            await read()
    code = "OUTPUT_TRUNCATED" if kind == "cut" else "INTERNAL"
    assert raised.value.code == code
    assert seen[-1].type == "response.failed"
    assert seen[-1].response.error.code == code
    assert "secret" not in str(seen)


async def test_nothing_is_stored() -> None:
    async with serving() as server, client_of(server) as client:
        first = await client.responses.create(model="fake", input="Hello")
        with pytest.raises(openai.BadRequestError) as stored:
            await client.responses.create(model="fake", input="Hello", store=True)
        with pytest.raises(openai.NotFoundError) as missing:
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as previous:
            await client.responses.create(
                model="fake", input="Hello", previous_response_id=first.id
            )
    assert (stored.value.code, stored.value.param) == ("INVALID_FIELD", "store")
    assert "not stored" in missing.value.message
    assert previous.value.param == "previous_response_id"
    assert "whole conversation" in previous.value.message


@pytest.mark.parametrize("form", [{}, {"text": SCHEMA}, {"tools": [TOOL], "tool_choice": NAMED}])
async def test_answers_fit_the_openapi_document(form: dict[str, Any]) -> None:
    async with serving() as server:
        document = (await server.request("GET", "/openapi.json")).json
        reply = await ask(server, **form)
    assert "/v1/responses" in document["paths"]
    schema = {"$ref": "#/components/schemas/Response", "components": document["components"]}
    jsonschema.validate(reply.json, schema)
