"""What is refused over HTTP, with the field, the reason and a status; nothing is ignored silently."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from typing import Any

import pytest
from pydantic import ValidationError

from service.engines.fake import FakeEngine
from service.errors import InvalidRequest
from service.http_api import reading
from service.http_api.models import ChatRequest
from tests.service.harness import image_bytes, until
from tests.service.http_api.harness import (
    CHAT,
    data_url,
    image_part,
    request,
    schema_format,
    serving,
    shown,
)

TOOL = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "b"}}
NAMED = {"type": "function", "function": {"name": "b"}}

NOT_ENFORCED = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}


def said(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more}]}


def with_url(url: Any) -> dict[str, Any]:
    return said([{"type": "image_url", "image_url": {"url": url}}])


URL_FIELD = "messages[0].content[0].image_url.url"
FIELDS: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("no model", {"model": None}, "model", "INVALID_FIELD"),
    ("no messages", {"messages": None}, "messages", "INVALID_FIELD"),
    ("empty messages", {"messages": []}, "messages", "INVALID_FIELD"),
    ("messages are a text", {"messages": "hi"}, "messages", "INVALID_FIELD"),
    ("unknown role", said("hi", "robot"), "messages[0]", "INVALID_FIELD"),
    ("no role", {"messages": [{"content": "hi"}]}, "messages[0]", "INVALID_FIELD"),
    ("no content", {"messages": [{"role": "user"}]}, "messages[0].content", "INVALID_FIELD"),
    ("content null", said(None), "messages[0].content", "INVALID_FIELD"),
    ("no parts", said([]), "messages[0].content", "INVALID_FIELD"),
    (
        "audio",
        said([{"type": "input_audio", "input_audio": {}}]),
        "messages[0].content[0]",
        "INVALID_FIELD",
    ),
    ("file", said([{"type": "file", "file": {}}]), "messages[0].content[0]", "INVALID_FIELD"),
    ("part without type", said([{"text": "a"}]), "messages[0].content[0]", "INVALID_FIELD"),
    (
        "unknown key of a part",
        said([{"type": "text", "text": "a", "x": 1}]),
        "messages[0].content[0].x",
        "UNKNOWN_FIELD",
    ),
    (
        "assistant last",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "messages[1].role",
        "INVALID_FIELD",
    ),
    (
        "system later",
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "system", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
        "messages[1].role",
        "INVALID_FIELD",
    ),
    (
        "image of the system",
        said([image_part(b"x")], "system"),
        "messages[0].content[0].type",
        "INVALID_FIELD",
    ),
    (
        "assistant says nothing",
        {"messages": [{"role": "assistant"}, {"role": "user", "content": "a"}]},
        "messages[0].content",
        "INVALID_FIELD",
    ),
    ("not base64", with_url("data:image/png;base64,@@@@"), URL_FIELD, "IMAGE_INVALID"),
    (
        "base64 of the other alphabet",
        with_url("data:image/png;base64,ab-_"),
        URL_FIELD,
        "IMAGE_INVALID",
    ),
    ("padding inside", with_url("data:image/png;base64,ab==ab=="), URL_FIELD, "IMAGE_INVALID"),
    ("not base64 by its head", with_url("data:image/png,abc"), URL_FIELD, "INVALID_FIELD"),
    ("no bytes", with_url("data:image/png;base64,"), URL_FIELD, "IMAGE_EMPTY"),
    (
        "not an image",
        with_url("data:image/png;base64,aGVsbG8gd29ybGQ="),
        URL_FIELD,
        "IMAGE_FORMAT_UNSUPPORTED",
    ),
    (
        "a video",
        with_url("data:video/mp4;base64,AAAAGGZ0eXBpc29t"),
        URL_FIELD,
        "IMAGE_FORMAT_UNSUPPORTED",
    ),
    ("http", with_url("http://169.254.169.254/latest/meta-data"), URL_FIELD, "IMAGE_URL_REFUSED"),
    ("https", with_url("https://example.org/a.png"), URL_FIELD, "IMAGE_URL_REFUSED"),
    ("file URL", with_url("file:///etc/passwd"), URL_FIELD, "IMAGE_URL_REFUSED"),
    ("a path", with_url("/etc/passwd"), URL_FIELD, "IMAGE_URL_REFUSED"),
    ("url of another type", with_url(7), URL_FIELD, "INVALID_FIELD"),
    (
        "detail",
        said([image_part(b"x", detail="tiny")]),
        "messages[0].content[0].image_url.detail",
        "INVALID_FIELD",
    ),
    (
        "different token limits",
        {"max_tokens": 5, "max_completion_tokens": 6},
        "max_tokens",
        "INVALID_FIELD",
    ),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens", "SAMPLING_OPTION_INVALID"),
    (
        "max_completion_tokens 0",
        {"max_completion_tokens": 0},
        "max_completion_tokens",
        "SAMPLING_OPTION_INVALID",
    ),
    ("max_tokens is a text", {"max_tokens": "5"}, "max_tokens", "INVALID_FIELD"),
    ("max_tokens is a switch", {"max_tokens": True}, "max_tokens", "INVALID_FIELD"),
    ("huge number", {"max_tokens": 10**30}, "max_tokens", "INVALID_FIELD"),
    ("temperature", {"temperature": 2.5}, "temperature", "SAMPLING_OPTION_INVALID"),
    ("temperature is a text", {"temperature": "0"}, "temperature", "INVALID_FIELD"),
    ("top_p", {"top_p": 0}, "top_p", "SAMPLING_OPTION_INVALID"),
    ("top_k", {"top_k": -2}, "top_k", "SAMPLING_OPTION_INVALID"),
    ("seed", {"seed": -1}, "seed", "SAMPLING_OPTION_INVALID"),
    ("stop is empty", {"stop": ""}, "stop", "INVALID_FIELD"),
    ("too many stops", {"stop": ["a"] * 17}, "stop", "INVALID_FIELD"),
    ("two answers", {"n": 2}, "n", "INVALID_FIELD"),
    ("log probabilities", {"logprobs": True}, "logprobs", "INVALID_FIELD"),
    ("penalty", {"frequency_penalty": 0.5}, "frequency_penalty", "INVALID_FIELD"),
    ("bias", {"logit_bias": {"1": 5}}, "logit_bias", "INVALID_FIELD"),
    ("store", {"store": True}, "store", "INVALID_FIELD"),
    ("functions", {"functions": []}, "functions", "INVALID_FIELD"),
    ("guided_json", {"guided_json": {}}, "guided_json", "UNKNOWN_FIELD"),
    ("misspelt", {"temprature": 1}, "temprature", "UNKNOWN_FIELD"),
    (
        "stream_options without a stream",
        {"stream_options": {"include_usage": True}},
        "stream_options",
        "INVALID_FIELD",
    ),
    ("auto with tools", {"tools": [TOOL]}, "tool_choice", "INVALID_FIELD"),
    (
        "auto by name with tools",
        {"tools": [TOOL], "tool_choice": "auto"},
        "tool_choice",
        "INVALID_FIELD",
    ),
    (
        "required with two tools",
        {"tools": [TOOL, OTHER], "tool_choice": "required"},
        "tool_choice",
        "INVALID_FIELD",
    ),
    ("required without tools", {"tool_choice": "required"}, "tool_choice", "INVALID_FIELD"),
    (
        "a tool that is not there",
        {"tools": [TOOL], "tool_choice": NAMED},
        "tool_choice.function.name",
        "INVALID_FIELD",
    ),
    (
        "a tool twice",
        {"tools": [TOOL, TOOL], "tool_choice": "none"},
        "tools[1].function.name",
        "INVALID_FIELD",
    ),
    (
        "a tool of another type",
        {"tools": [{"type": "custom", "custom": {}}]},
        "tools[0].type",
        "INVALID_FIELD",
    ),
    (
        "arguments that are a text",
        {
            "tools": [
                {"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}
            ],
            "tool_choice": "required",
        },
        "tools[0].function.parameters",
        "INVALID_FIELD",
    ),
    (
        "two constraints",
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "INVALID_FIELD",
    ),
    (
        "tool and format",
        {"response_format": {"type": "json_object"}, "tools": [TOOL], "tool_choice": "required"},
        "tool_choice",
        "INVALID_FIELD",
    ),
    (
        "nothing to close",
        {"response_format": {"type": "json_object"}, "close_objects": True},
        "close_objects",
        "INVALID_FIELD",
    ),
    (
        "nothing to order",
        {"response_format": {"type": "json_object"}, "property_order": "any"},
        "property_order",
        "INVALID_FIELD",
    ),
    ("empty constraint", {"structured_outputs": {}}, "structured_outputs", "INVALID_FIELD"),
    (
        "two kinds",
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs",
        "INVALID_FIELD",
    ),
    ("unknown format", {"response_format": {"type": "xml"}}, "response_format", "INVALID_FIELD"),
    (
        "no schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "INVALID_FIELD",
    ),
    (
        "flat schema",
        {"response_format": {"type": "json_schema", "name": "a", "schema": {}}},
        "response_format.json_schema",
        "INVALID_FIELD",
    ),
    (
        "wrong schema",
        {"response_format": schema_format({"type": "strin"})},
        "response_format.json_schema.schema",
        "SCHEMA_INVALID",
    ),
    (
        "wrong regex",
        {"structured_outputs": {"regex": "("}},
        "structured_outputs.regex",
        "GRAMMAR_INVALID",
    ),
    (
        "wrong choice",
        {"structured_outputs": {"choice": []}},
        "structured_outputs.choice",
        "GRAMMAR_INVALID",
    ),
    (
        "wrong parameters",
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "a", "parameters": {"type": "object", "properties": 3}},
                }
            ],
            "tool_choice": "required",
        },
        "tools[0].function.parameters",
        "SCHEMA_INVALID",
    ),
    ("empty task", {"task": ""}, "task", "INVALID_FIELD"),
]


async def test_wrong_fields_are_named() -> None:
    found, expected = {}, {}
    async with serving() as server:
        for name, fields, param, code in FIELDS:
            document = {key: value for key, value in request(**fields).items() if key in fields}
            absent = {key for key, value in fields.items() if value is None}
            whole = {key: value for key, value in request().items() if key not in absent}
            reply = await server.post({**whole, **document})
            expected[name] = (400, param, code, "invalid_request_error", True)
            named = str(param) in reply.error["message"]
            error = reply.error
            found[name] = (reply.status, error["param"], error["code"], error["type"], named)
    assert found == expected


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"guided_json": {}}, "response_format"),
        ({"guided_regex": "a"}, "structured_outputs.regex"),
        ({"temprature": 1}, "did you mean temperature"),
        ({"n": 2}, "send a request for each answer"),
        ({"strict": True}, "use require_enforced"),
        ({"close_objects": "yes"}, "close_objects: must be true or false"),
        ({"property_order": "random"}, "must be 'declared' or 'any'"),
        (
            {"response_format": schema_format(NOT_ENFORCED), "require_enforced": True},
            "which require_enforced requires",
        ),
        ({"functions": []}, "use tools"),
        ({"messages": shown("a", b""), "images": []}, "image_url"),
        (with_url("https://example.org/a.png"), "data: URL"),
    ],
)
async def test_an_error_says_what_to_send_in_place(fields: dict[str, Any], hint: str) -> None:
    async with serving() as server:
        reply = await server.chat(**fields)
    assert hint in json.dumps(reply.error)


async def test_every_wrong_field_is_listed() -> None:
    async with serving() as server:
        reply = await server.chat(temperature=3, top_p=2)
    assert [one["param"] for one in reply.error["violations"]] == ["temperature", "top_p"]


def errors_of(document: dict[str, Any]) -> int:
    """How many errors pydantic finds in a request. Each takes 700 bytes."""
    found: list[int] = []

    class Counted(ChatRequest):
        @classmethod
        def model_validate(cls, *arguments: Any, **options: Any) -> Any:
            try:
                return super().model_validate(*arguments, **options)
            except ValidationError as error:
                found.append(error.error_count())
                raise

    with pytest.raises(InvalidRequest):
        reading.read_model(Counted, document)
    return found[0]


def test_few_of_many_wrong_fields_are_looked_at() -> None:
    unknown = {f"field {number}": 1 for number in range(5000)}
    wrong_parts = {"role": "user", "content": [{}] * 1000}
    documents: list[dict[str, Any]] = [
        unknown,
        {"messages": [{**unknown, "role": "user", "content": "a"}]},
        {"messages": [wrong_parts]},
        {"messages": [{}] * 5000},
        {"messages": [dict(list(unknown.items())[:40], role="user", content="a")] * 1000},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}] * 100},
    ]
    for document in documents:
        assert errors_of({"model": "fake", **document}) < 32


async def test_a_known_field_among_many_unknown_ones_is_read() -> None:
    unknown = {f"field {number}": 1 for number in range(100)}
    form = {"type": "json_schema", "json_schema": {**unknown, "name": "a", "schema": {}}}
    async with serving() as server:
        reply = await server.chat(response_format=form)
    params = [one["param"] for one in reply.error["violations"]]
    assert params[0] == 'response_format.json_schema."field 0"'
    assert len(params) == 16
    assert not any("required" in one["message"] for one in reply.error["violations"])


BODIES = [
    (b"", "empty"),
    (b"{", "not JSON"),
    (b"[]", "JSON object"),
    (b'"text"', "JSON object"),
    (b'{"model": "fake", "model": "fake"}', "duplicate key"),
    (b'{"temperature": NaN}', "NaN"),
    (b'{"temperature": Infinity}', "Infinity"),
    (b'{"temperature": 1e999}', "too large"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
    (b"[" * 100_000, "nested"),
    (b"[" + b"1," * 200_000 + b"1]", "more than 131072 values"),
    (b'{"model": "\xff"}', "UTF-8"),
    (b'{"model": "\\ud800"}', "surrogate"),
    (b"\xef\xbb\xbf{}", "byte order mark"),
    ('{"model": "fake"}'.encode("utf-16"), "UTF-8"),
    (b'{"model": "fake"} {}', "not JSON"),
]


async def test_bodies_that_are_not_strict_json() -> None:
    async with serving() as server:
        for body, says in BODIES:
            reply = await server.post(body)
            error = reply.error
            assert (reply.status, error["code"], error["param"]) == (400, "MALFORMED_REQUEST", None)
            assert says in error["message"], body[:50]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_needs_its_content_type(kind: str) -> None:
    async with serving() as server:
        reply = await server.chat({"content-type": kind})
        packed = await server.chat({"content-encoding": "gzip"})
        spelt = await server.chat({"content-type": "Application/JSON; charset=utf-8"})
    for one in (reply, packed):
        assert (one.status, one.error["code"]) == (415, "CONTENT_TYPE_UNSUPPORTED")
    assert spelt.status == 200


async def test_paths_and_methods_that_are_not_served() -> None:
    async with serving() as server:
        path = await server.request("GET", "/v1/embeddings")
        slash = await server.request("GET", "/livez/")
        stored = await server.request("GET", "/v1/responses/resp_1")
        method = await server.request("GET", CHAT)
        options = await server.request("OPTIONS", CHAT)
    for one in (path, slash):
        assert (one.status, one.error["code"]) == (404, "UNKNOWN_PATH")
    assert stored.status == 404
    assert "not stored" in stored.error["message"]
    assert (method.status, method.error["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert method.headers["allow"] == "POST"
    assert options.status == 405
    assert all(one.headers["x-request-id"] for one in (path, slash, method, options))


@pytest.mark.parametrize("base", ["", "/v1/v1"])
@pytest.mark.parametrize("path", ["/chat/completions", "/responses", "/models"])
async def test_a_wrong_base_url_is_named(base: str, path: str) -> None:
    async with serving() as server:
        reply = await server.request("GET" if path == "/models" else "POST", f"{base}{path}")
    assert (reply.status, reply.error["code"]) == (404, "UNKNOWN_PATH")
    assert f"; /v1{path} is. The base URL of SDKs ends with /v1." in reply.error["message"]


@pytest.mark.parametrize(
    "data", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"\x16\x03\x01\x02"]
)
async def test_bytes_that_are_not_http(data: bytes) -> None:
    async with serving() as server:
        connection = await server.connect()
        await connection.write(data + b"\r\n\r\n")
        reply = await connection.reply()
        connection.close()
    assert (reply.status, reply.error["code"]) == (400, "MALFORMED_REQUEST")


async def test_more_bytes_than_content_length_are_another_request() -> None:
    async with serving() as server:
        connection = await server.connect()
        body = json.dumps(request()).encode()
        await connection.send(
            "POST", CHAT, body + b"  nonsense", {"content-length": str(len(body))}
        )
        first = await connection.reply()
        second = await connection.reply()
        connection.close()
    assert first.status == 200
    assert (second.status, second.error["code"]) == (400, "MALFORMED_REQUEST")


SMALL = {"max_message_bytes": 1024 * 1024 + 4096, "max_image_bytes": 4096}


async def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent() -> None:
    async with serving(**SMALL) as server:
        connection = await server.connect()
        head = {"content-type": "application/json", "content-length": "99999999999"}
        await connection.send("POST", CHAT, None, head)
        reply = await connection.reply()
        connection.close()
    assert (reply.status, reply.error["code"]) == (413, "REQUEST_TOO_LARGE")
    assert reply.error["metadata"] == {"limit": str(SMALL["max_message_bytes"])}


async def test_a_body_that_grows_too_large_is_refused_while_it_is_sent() -> None:
    async with serving(**SMALL) as server:
        connection = await server.connect()
        head = {"content-type": "application/json", "transfer-encoding": "chunked"}
        await connection.send("POST", CHAT, None, head)
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(20):
            await connection.write(piece)
        reply = await connection.reply()
        connection.close()
    assert (reply.status, reply.error["code"]) == (413, "REQUEST_TOO_LARGE")


async def test_a_body_that_does_not_come_is_not_waited_for_forever() -> None:
    async with serving(receive_timeout_s=0.2) as server:
        connection = await server.connect()
        await connection.send("POST", CHAT, b"{", {"content-length": "100"})
        reply = await connection.reply()
        connection.close()
    assert (reply.status, reply.error["code"]) == (504, "RECEIVE_TIMEOUT")
    assert reply.headers["x-should-retry"] == "false"


async def test_a_caller_who_leaves_before_the_body_is_complete() -> None:
    async with serving() as server:
        connection = await server.connect()
        await connection.send("POST", CHAT, b"{", {"content-length": "100"})
        await until(lambda: server.runtime.lifecycle.calls_in_flight == 1, 60)
        connection.close()
        await until(lambda: server.runtime.lifecycle.calls_in_flight == 0, 60)
        assert (await server.chat()).status == 200


# Images


async def test_base64_may_be_wrapped_and_without_padding() -> None:
    data = image_bytes()
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[begin : begin + 76] for begin in range(0, len(text), 76))
    async with serving() as server:
        for url in (f"data:image/jpeg;base64,{wrapped}", f"DATA:;BASE64,{text.rstrip('=')}"):
            assert (await server.chat(**with_url(url))).status == 200


async def test_no_socket_is_opened_for_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        connection = await server.connect()

        def fail(*_: Any, **__: Any) -> Any:
            raise AssertionError("a socket was opened")

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        monkeypatch.setattr(socket.socket, "connect", fail)
        monkeypatch.setattr(asyncio.BaseEventLoop, "sock_connect", fail)
        body = json.dumps(request(**with_url("https://localhost/a.png"))).encode()
        await connection.send("POST", CHAT, body)
        reply = await connection.reply()
        monkeypatch.undo()
        connection.close()
    assert (reply.status, reply.error["code"]) == (400, "IMAGE_URL_REFUSED")


async def test_too_many_images() -> None:
    async with serving(max_images=1) as server:
        reply = await server.chat(messages=shown(image_bytes(), image_bytes()))
    assert (reply.error["code"], reply.error["param"]) == ("TOO_MANY_IMAGES", "messages")


async def test_an_image_of_a_model_without_vision() -> None:
    async with serving(FakeEngine(vision=False)) as server:
        reply = await server.chat(messages=shown(image_bytes()))
        models = await server.request("GET", "/v1/models")
    assert (reply.status, reply.error["code"]) == (400, "VISION_DISABLED")
    assert models.json["data"][0]["input_modalities"] == ["text"]


@pytest.mark.slow
async def test_a_data_url_of_30_mb_does_not_stall_the_loop() -> None:
    """The loop goes on while a large body is decoded in another thread. An image of this size is
    refused by its bytes, which are known only when it is decoded."""
    body = json.dumps(request(**with_url(data_url(b"\x00" * (30 * 1024 * 1024))))).encode()
    async with serving() as server:
        pauses: list[float] = []

        async def tick() -> None:
            loop = asyncio.get_running_loop()
            last = loop.time()
            while True:
                await asyncio.sleep(0.001)
                pauses.append(loop.time() - last)
                last = loop.time()

        ticking = asyncio.create_task(tick())
        connection = await server.connect()
        await connection.send("POST", CHAT, body)
        reply = await connection.reply()
        ticking.cancel()
        connection.close()
    assert reply.error["code"] == "IMAGE_TOO_LARGE"
    assert len(pauses) > 20


async def test_a_body_with_two_lengths_is_refused_and_the_connection_closed() -> None:
    """Else what follows it could be a request of somebody else, smuggled through a proxy."""
    second = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
    async with serving() as server:
        connection = await server.connect()
        both = {"content-length": str(len(second)), "transfer-encoding": "chunked"}
        await connection.send("POST", CHAT, headers={**both, "content-type": "application/json"})
        await connection.write(b"0\r\n\r\n" + second)
        reply = await connection.reply()
        rest = await asyncio.wait_for(connection.reader.read(), 60)
        connection.close()
    assert (reply.status, reply.error["code"]) == (400, "MALFORMED_REQUEST")
    assert reply.headers["connection"] == "close"
    assert rest == b"", "the second request has no answer"
