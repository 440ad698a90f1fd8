"""Answers of other servers through our real server: complete and valid, or an error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest

from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.engines.remote.scripted import (
    MODEL,
    USAGE_CHUNK,
    Asked,
    Script,
    completion,
    delta,
    saying,
)
from tests.service.engines.remote.serving import GOOD, OBJECT, pair, question
from tests.service.harness import failure, stream_failure

pytestmark = pytest.mark.slow

STREAMED = [pytest.param(True, id="streamed"), pytest.param(False, id="whole")]


@pytest.mark.parametrize("streamed", STREAMED)
async def test_a_valid_answer(streamed: bool) -> None:
    async with pair(saying(GOOD), remote_stream=streamed) as (front, back):
        result = (await front.stub.RunTask(question(), timeout=60)).result
        model = await front.stub.GetModel(pb.GetModelRequest(), timeout=60)
    assert result.json == GOOD
    assert result.model == model.name == MODEL
    assert result.usage == pb.Usage(prompt_tokens=7, output_tokens=3)
    assert 0 < result.timings.first_token_seconds <= result.timings.total_seconds
    assert model.engine == "remote"
    (asked,) = back.asked
    body = asked.json
    assert body["messages"] == [{"role": "user", "content": "How many?"}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == (MODEL, 0.0, 1024)
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": json.loads(OBJECT)},
    }
    assert "authorization" not in asked.headers


async def test_the_caller_gets_text_while_it_is_generated() -> None:
    arrived = asyncio.Event()

    async def script(asked: Asked) -> None:
        await asked.begin_stream()
        await asked.event(delta(GOOD[:4]))
        await asyncio.wait_for(arrived.wait(), 60)
        await asked.event(delta(GOOD[4:], "stop"))
        await asked.event(b"[DONE]")
        await asked.end_stream()

    async with pair(script) as (front, _):
        request = pb.StreamTaskRequest(task=question().task)
        events = []
        async for event in front.stub.StreamTask(request, timeout=60):
            events.append(event)
            arrived.set()
    assert [event.delta for event in events[:-1]] == [GOOD[:4], GOOD[4:]]
    assert events[-1].result.json == GOOD


async def test_nothing_is_enforced_and_strict_is_refused() -> None:
    async with pair(saying(GOOD)) as (front, back):
        result = (await front.stub.RunTask(question(), timeout=60)).result
        error = await failure(front.stub.RunTask(question(strict=True), timeout=60))
    assert result.enforcement == pb.ENFORCEMENT_CHECKED
    assert "another server" in result.checked[0].reason
    assert error.reason == "SCHEMA_NOT_ENFORCED"
    assert "another server" in error.message
    assert len(back.asked) == 1


FIELD = "field"


def streaming(*events: Any, end: bool = True) -> Script:
    async def script(asked: Asked) -> None:
        await asked.begin_stream()
        for event in events:
            await asked.event(event)
        if end:
            await asked.end_stream()
        else:
            asked.reset()

    return script


def whole(value: Any, **options: Any) -> Script:
    async def script(asked: Asked) -> None:
        await asked.answer(value, **options)

    return script


async def reset_at_once(asked: Asked) -> None:
    asked.reset()


async def half_a_body(asked: Asked) -> None:
    await asked.raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{"
    )
    asked.reset()


async def no_http(asked: Asked) -> None:
    await asked.raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


TWO = {**completion(GOOD), "choices": [*completion(GOOD)["choices"], *completion(GOOD)["choices"]]}
TWO_DELTAS = {**delta(GOOD), "choices": [delta(GOOD)["choices"][0] for _ in range(2)]}
FAULTS: dict[str, tuple[Script, str, str]] = {
    "a stream without finish": (streaming(delta(GOOD), b"[DONE]"), "BACKEND_ANSWER_INVALID", "incomplete"),
    "finish without [DONE]": (streaming(delta(GOOD, "stop")), "BACKEND_ANSWER_INVALID", "incomplete"),
    "a stream that breaks": (streaming(delta(GOOD), end=False), "BACKEND_UNREACHABLE", ""),
    "text after the finish": (
        streaming(delta(GOOD, "stop"), delta("}"), b"[DONE]"), "BACKEND_ANSWER_INVALID", "finish_reason",
    ),
    "an unknown finish reason": (
        streaming(delta(GOOD, "content_filter"), b"[DONE]"), "BACKEND_ANSWER_INVALID", "finish_reason",
    ),
    "JSON in the reasoning channel, streamed": (
        streaming(delta(None, reasoning_content=GOOD), delta(None, "stop"), b"[DONE]"),
        "BACKEND_ANSWER_INVALID", "reasoning",
    ),
    "JSON in the reasoning channel, whole": (
        whole(completion(None, reasoning_content=GOOD)), "BACKEND_ANSWER_INVALID", "reasoning",
    ),
    "content: null": (whole(completion(None)), "BACKEND_ANSWER_INVALID", "content"),
    "content that is a list": (
        whole(completion([{"type": "text", "text": GOOD}])),  # type: ignore[arg-type]
        "BACKEND_ANSWER_INVALID", "content",
    ),
    "no choice": (whole({"choices": []}), "BACKEND_ANSWER_INVALID", "choices"),
    "two choices, whole": (whole(TWO), "BACKEND_ANSWER_INVALID", "choices"),
    "two choices, streamed": (streaming(TWO_DELTAS, b"[DONE]"), "BACKEND_ANSWER_INVALID", "choices"),
    "a tool call": (
        whole(completion(None, finish_reason="tool_calls", tool_calls=[{"id": "1"}])),
        "BACKEND_ANSWER_INVALID", "tool_calls",
    ),
    "HTML for JSON": (
        whole(b"<html>Welcome</html>", content_type="text/html"), "BACKEND_ANSWER_INVALID", "not_json",
    ),
    "broken JSON": (whole(b'{"choices": ['), "BACKEND_ANSWER_INVALID", "not_json"),
    "a list for an object": (whole([1]), "BACKEND_ANSWER_INVALID", "not_json"),
    "an error inside a stream": (
        streaming(delta("{"), {"error": {"message": "CUDA out of memory at /secret"}}), "BACKEND_FAILED", "",
    ),
    "another model": (whole(completion(GOOD, model="other")), "BACKEND_ANSWER_INVALID", "model"),
    "a compressed answer": (
        whole(b"\x1f\x8b", content_encoding="gzip"), "BACKEND_UNREACHABLE", "",
    ),
    "a reset before the answer": (reset_at_once, "BACKEND_UNREACHABLE", ""),
    "a reset within the answer": (half_a_body, "BACKEND_UNREACHABLE", ""),
    "no HTTP": (no_http, "BACKEND_UNREACHABLE", ""),
    "401": (whole({"error": "key sk-secret is wrong"}, status=401), "BACKEND_FAILED", ""),
    "404": (whole({"error": "no such model"}, status=404), "BACKEND_FAILED", ""),
    "500": (whole(b"Traceback /secret", status=500), "BACKEND_FAILED", ""),
    "204": (whole(b"", status=204), "BACKEND_FAILED", ""),
    "a redirect": (whole(b"", status=307, location="http://127.0.0.1:1/x"), "BACKEND_FAILED", ""),
    "an answer cut by max_tokens": (
        streaming(delta('{"count": ', "length"), b"[DONE]"), "OUTPUT_TRUNCATED", "",
    ),
    "prose in place of JSON": (saying("There are three."), "OUTPUT_INVALID", ""),
    "JSON with something behind it": (saying(GOOD + " Anything else?"), "OUTPUT_INVALID", ""),
    "another type in the last member of a name": (
        saying('{"count": 3, "count": "4"}'), "OUTPUT_INVALID", "",
    ),
    "another type": (saying('{"count": "3"}'), "OUTPUT_INVALID", ""),
    "an empty answer": (saying(""), "OUTPUT_INVALID", ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_an_error(fault: str) -> None:
    script, reason, named = FAULTS[fault]
    async with pair(script) as (front, back):
        error = await failure(front.stub.RunTask(question(), timeout=60))
        assert error.reason == reason
        assert error.metadata.get("fault", "") == named
        # A whole answer that does not fit gets a second, sampled attempt, like that of any engine.
        # Nothing else is tried again: something may have been generated.
        assert len(back.asked) == (2 if reason == "OUTPUT_INVALID" else 1)
        for secret in ("secret", "127.0.0.1", "Traceback", str(back.port)):
            assert secret not in str(error)
        request = pb.StreamTaskRequest(task=question().task)
        events, streamed = await stream_failure(front.stub.StreamTask(request, timeout=60))
        assert streamed.reason in (reason, "BACKEND_FAILED", "BACKEND_UNREACHABLE")
        assert not any(event.HasField("result") for event in events)


async def test_a_missing_usage_is_no_fault() -> None:
    async with pair(streaming(delta("{"), delta('"count": 3}', "stop"), b"[DONE]")) as (
        front,
        back,
    ):
        streamed = (await front.stub.RunTask(question(), timeout=60)).result
        back.chat = whole(completion(GOOD, usage=None))
        result = (await front.stub.RunTask(question(), timeout=60)).result
    assert streamed.usage == pb.Usage(output_tokens=2), "deltas are counted"
    assert result.usage.prompt_tokens == 0
    assert result.json == GOOD


async def test_usage_in_every_chunk() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    script = streaming({**delta(GOOD), "usage": usage}, delta(None, "stop"), USAGE_CHUNK, b"[DONE]")
    async with pair(script) as (front, _):
        result = (await front.stub.RunTask(question(), timeout=60)).result
    assert result.usage.prompt_tokens == 7


async def test_comments_and_crlf_in_a_stream() -> None:
    async def script(asked: Asked) -> None:
        await asked.begin_stream()
        event = json.dumps(delta(GOOD, "stop"), ensure_ascii=False).encode()
        await asked.piece(b": ping\r\n\r\n")
        for begin in range(0, len(event), 3):  # an event in many pieces
            await asked.piece((b"data:" if not begin else b"") + event[begin : begin + 3])
        await asked.piece(b"\r\n\r\nevent: end\r\ndata: [DONE]\r\n\r\n")
        await asked.end_stream()

    async with pair(script) as (front, _):
        assert (await front.stub.RunTask(question(), timeout=60)).result.json == GOOD


async def test_free_text_is_returned_as_it_came() -> None:
    async with pair(saying("There are three. 日本語 😀")) as (front, back):
        result = (await front.stub.RunTask(question(schema=None), timeout=60)).result
    assert result.text == "There are three. 日本語 😀"
    assert "response_format" not in back.asked[0].json


async def test_the_status_of_each_reason() -> None:
    for script, code in (
        (whole(b"", status=500), grpc.StatusCode.INTERNAL),
        (reset_at_once, grpc.StatusCode.UNAVAILABLE),
        (whole({"error": "too many images"}, status=400), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        async with pair(script) as (front, _):
            assert (
                await failure(front.stub.RunTask(question(schema=None), timeout=60))
            ).code is code


# Ollama's own API


def lines(*values: Any) -> Script:
    async def script(asked: Asked) -> None:
        data = b"".join(json.dumps(value).encode() + b"\n" for value in values)
        await asked.answer(data, content_type="application/x-ndjson")

    return script


def told(text: str = "", **more: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "message": {"role": "assistant", "content": text},
        "done": False,
        **more,
    }


TAGS = {"/api/tags": whole({"models": [{"model": MODEL, "name": MODEL}]})}
END = told(done=True, done_reason="stop", prompt_eval_count=7, eval_count=3)
NATIVE = {
    "a line without an end": (lines(told(GOOD)), "incomplete"),
    "an unknown reason": (lines(told(GOOD), {**END, "done_reason": "load"}), "finish_reason"),
    "thoughts alone": (
        lines({**told(), "message": {"content": "", "thinking": GOOD}}, END), "reasoning",
    ),
    "no JSON": (lines("text"), "not_json"),
}  # fmt: skip


async def test_ollama_is_asked_in_its_own_api() -> None:
    script = lines(told(GOOD[:5]), told(GOOD[5:]), END)
    async with pair(script, remote_kind="ollama", others=TAGS) as (front, back):
        sampling = pb.SamplingOptions(
            temperature=0.5, seed=2**63, repetition_penalty=1.5, max_tokens=9
        )
        result = (await front.stub.RunTask(question(sampling=sampling), timeout=60)).result
        asked = back.asked[0]
    assert result.json == GOOD
    assert result.usage == pb.Usage(prompt_tokens=7, output_tokens=3)
    body = asked.json
    assert asked.path == "/api/chat"
    assert body["format"] == json.loads(OBJECT)
    assert body["truncate"] is False
    options = body["options"]
    assert (options["temperature"], options["repeat_penalty"], options["num_predict"]) == (
        0.5,
        1.5,
        9,
    )
    assert 0 <= options["seed"] < 2**31


@pytest.mark.parametrize("fault", NATIVE)
async def test_a_fault_of_ollama_is_an_error(fault: str) -> None:
    script, named = NATIVE[fault]
    async with pair(script, remote_kind="ollama", others=TAGS) as (front, _):
        error = await failure(front.stub.RunTask(question(), timeout=60))
    assert (error.reason, error.metadata["fault"]) == ("BACKEND_ANSWER_INVALID", named)
