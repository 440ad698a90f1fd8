"""The openai package against the real server: what an application written for OpenAI's API gets."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import httpx2
import openai
import pytest
from openai.resources.chat.completions import AsyncCompletions
from pydantic import BaseModel

from service.engines.fake import FakeEngine
from service.engines.reference import ReferenceEngine
from service.http_api.models import ChatRequest
from service.wiring import BUNDLED_MODEL
from tests.service.harness import ROOT, image_bytes, until
from tests.service.http_api.harness import Serving, serving, shown

pytestmark = pytest.mark.slow

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
OF_THE_SDK = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
"""Parameters of ``create`` that are not part of a request."""
VALUES: dict[str, tuple[Any, Any]] = {
    "audio": (None, {"voice": "a", "format": "wav"}),
    "frequency_penalty": (0, 0.5),
    "function_call": (None, "auto"),
    "functions": (None, [{"name": "a"}]),
    "logit_bias": ({}, {"5": 1}),
    "logprobs": (False, True),
    "max_completion_tokens": (5, -1),
    "max_tokens": (5, 0),
    "messages": (MESSAGES, []),
    "metadata": ({"a": "b"}, 5),
    "modalities": (["text"], ["text", "audio"]),
    "model": ("fake", "other"),
    "moderation": (None, {"model": "a"}),
    "n": (1, 2),
    "parallel_tool_calls": (False, "yes"),
    "prediction": (None, {"type": "content", "content": "a"}),
    "presence_penalty": (0, 1),
    "prompt_cache_key": ("a", 5),
    "prompt_cache_options": (None, {"mode": "explicit"}),
    "prompt_cache_retention": ("24h", 5),
    "reasoning_effort": ("none", "high"),
    "response_format": ({"type": "text"}, {"type": "xml"}),
    "safety_identifier": ("a", 5),
    "seed": (7, -1),
    "service_tier": ("auto", "priority"),
    "stop": (["x"], ""),
    "store": (False, True),
    "stream": (False, "yes"),
    "stream_options": (None, {"include_usage": True}),
    "temperature": (0.5, 3),
    "tool_choice": ("none", "required"),
    "tools": ([], [{"type": "function", "function": {"name": "a"}}]),
    "top_logprobs": (0, 3),
    "top_p": (0.5, 0),
    "user": ("a", 5),
    "verbosity": ("medium", "low"),
    "web_search_options": (None, {}),
}
"""Parameter -> a value that is accepted, and one that is refused by its name."""


@asynccontextmanager
async def client_of(server: Serving) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=server.base_url, api_key="-", http_client=httpx2.AsyncClient(trust_env=False)
    ) as client:
        yield client


async def in_thread(server: Serving, work: Any) -> Any:
    """``work`` with the client that is not asynchronous, in a thread of its own."""

    def run() -> Any:
        http = httpx2.Client(trust_env=False)
        with openai.OpenAI(base_url=server.base_url, api_key="-", http_client=http) as client:
            return work(client)

    return await asyncio.to_thread(run)


class Point(BaseModel):
    x: int
    kind: Literal["near", "far"]


# Every parameter


def parameters() -> set[str]:
    return set(inspect.signature(AsyncCompletions.create).parameters) - OF_THE_SDK


def test_every_parameter_of_the_package_has_a_treatment() -> None:
    assert parameters() <= set(ChatRequest.model_fields)
    assert parameters() == set(VALUES)
    for name, field in ChatRequest.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), name
        assert extra["x-treatment"] in ("honoured", "neutral", "no effect", "refused"), name


async def test_no_parameter_is_ignored_silently() -> None:
    """A value that cannot be honoured is an error which names the parameter."""
    found: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    async with serving(FakeEngine("ok")) as server:
        for name, (accepted, refused) in VALUES.items():
            right = await server.chat(**{name: accepted})
            wrong = await server.chat(**{name: refused})
            named = "tool_choice" if name == "tools" else name
            of_model = (404, None) if name == "model" else (400, named)
            expected[name] = (200, *of_model)
            found[name] = (right.status, wrong.status, wrong.error["param"])
    assert found == expected


def test_the_page_lists_every_field() -> None:
    page = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
    assert [name for name in ChatRequest.model_fields if f"`{name}`" not in page] == []


# Calls


async def test_create_and_stream() -> None:
    async with serving(FakeEngine("One two three.")) as server, client_of(server) as client:
        whole = await client.chat.completions.create(model="fake", messages=MESSAGES)
        stream = await client.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        models = [model.id async for model in await client.models.list()]
    assert whole.choices[0].message.content == "One two three."
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 3
    assert whole._request_id
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == "One two three."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert models == ["fake"]


async def test_the_program_of_the_readme(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"<!-- openai:begin -->\n```python\n(.*?)```", readme, re.S)
    assert "http://127.0.0.1:8000/v1" in program
    async with serving() as server:
        program = program.replace("http://127.0.0.1:8000/v1", server.base_url)
        await asyncio.to_thread(exec, program.replace('"drawings"', '"fake"'), {})
    assert "scene" in json.loads(capsys.readouterr().out)


async def test_the_client_that_is_not_asynchronous() -> None:
    def work(client: openai.OpenAI) -> tuple[Any, str]:
        whole = client.chat.completions.create(model="fake", messages=MESSAGES)
        stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        texts = [chunk.choices[0].delta.content or "" for chunk in stream]
        return whole.choices[0].message.content, "".join(texts)

    async with serving(FakeEngine("One two.")) as server:
        assert await in_thread(server, work) == ("One two.", "One two.")


async def test_parse() -> None:
    async with serving() as server, client_of(server) as client:
        found = await client.chat.completions.parse(
            model="fake", messages=MESSAGES, response_format=Point
        )
        async with client.chat.completions.stream(
            model="fake", messages=MESSAGES, response_format=Point
        ) as stream:
            final = await stream.get_final_completion()
        tool = await client.chat.completions.parse(
            model="fake",
            messages=MESSAGES,
            tools=[openai.pydantic_function_tool(Point)],
            tool_choice={"type": "function", "function": {"name": "Point"}},
        )
    assert found.choices[0].message.parsed == Point(x=0, kind="near")
    assert final.choices[0].message.parsed == Point(x=0, kind="near")
    (call,) = tool.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == Point(x=0, kind="near")


async def test_the_answer_can_be_part_of_the_next_request() -> None:
    async with serving(FakeEngine("ok")) as server, client_of(server) as client:
        first = await client.chat.completions.create(model="fake", messages=MESSAGES)
        messages: Any = [*MESSAGES, first.choices[0].message, *MESSAGES]
        again = await client.chat.completions.create(model="fake", messages=messages)
        dumped: Any = [*MESSAGES, first.choices[0].message.model_dump(), *MESSAGES]
        third = await client.chat.completions.create(model="fake", messages=dumped)
    assert [one.choices[0].message.content for one in (again, third)] == ["ok", "ok"]


async def test_a_registered_task_and_vllms_fields_by_extra_body() -> None:
    async with serving(FakeEngine("left")) as server, client_of(server) as client:
        found = await client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            extra_body={"structured_outputs": {"choice": ["left", "right"]}, "top_k": 3},
        )
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(
                model="fake",
                messages=shown(image_bytes()),  # type: ignore[arg-type]
                extra_body={"task": "image-analysis"},
            )
    assert found.choices[0].message.content == "left"
    assert raised.value.code == "OUTPUT_INVALID", "the task was run, and this is no analysis"


# Errors


class Counting(FakeEngine):
    """Counts the requests that reach it."""

    calls = 0

    def generate(self, request: Any) -> Any:
        self.calls += 1
        return super().generate(request)


async def test_errors_are_exceptions_with_a_code() -> None:
    async with serving() as server, client_of(server) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model="fake", messages=MESSAGES, n=2)
        with pytest.raises(openai.NotFoundError) as missing:
            await create(model="gpt-4o", messages=MESSAGES)
    assert (bad.value.code, bad.value.param) == ("INVALID_FIELD", "n")
    assert bad.value.request_id
    assert missing.value.code == "UNKNOWN_MODEL"


@pytest.mark.parametrize(
    "kind", ["invalid", "crash", pytest.param("timeout", marks=pytest.mark.slow)]
)
async def test_what_a_retry_cannot_help_is_asked_once(kind: str) -> None:
    engine = Counting("no json" if kind == "invalid" else "one two")
    limit_s = 3.0 if kind == "timeout" else 300
    async with serving(engine, inference_timeout_s=limit_s) as server, client_of(server) as client:
        before = engine.calls
        if kind == "crash":
            engine.crash_after = 1
        if kind == "timeout":
            engine.hang_after = 1
        form: Any = {"response_format": Point} if kind == "invalid" else {}
        call = client.chat.completions.parse if form else client.chat.completions.create
        with pytest.raises(openai.InternalServerError):
            await call(model="fake", messages=MESSAGES, **form)
        assert engine.calls == before + 1


async def test_a_server_that_is_busy_is_asked_again() -> None:
    engine = Counting("ok")
    async with (
        serving(engine, max_concurrent=1, max_queue=0) as server,
        client_of(server) as client,
    ):
        engine.hang_after = 0
        first = asyncio.create_task(server.chat())
        await until(lambda: engine.active_requests == 1, 60)
        second = asyncio.create_task(
            client.with_options(max_retries=20).chat.completions.create(
                model="fake", messages=MESSAGES
            )
        )
        await asyncio.sleep(0.05)
        engine.hang_after = None
        first.cancel()
        assert (await second).choices[0].message.content == "ok"


@pytest.mark.parametrize("kind", ["cut", "crash"])
async def test_a_stream_that_fails_raises_and_delivers_no_whole_answer(kind: str) -> None:
    engine = FakeEngine('{"x": 1, "kind": "near"}')
    async with serving(engine) as server, client_of(server) as client:
        if kind == "crash":
            engine.crash_after = 2
        stream = await client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            stream=True,
            max_tokens=2 if kind == "cut" else None,
            response_format={"type": "json_object"},
        )
        with pytest.raises(openai.APIError) as raised:
            _ = [chunk async for chunk in stream]
    assert raised.value.code == ("OUTPUT_TRUNCATED" if kind == "cut" else "INTERNAL")


# The bundled model

DRAWING = ROOT / "examples" / "drawings" / "samples" / "night-desert.png"


async def test_the_bundled_model_describes_a_drawing() -> None:
    schema = json.loads((ROOT / "examples" / "schemas" / "objects.json").read_text())
    url = "data:image/png;base64," + base64.b64encode(DRAWING.read_bytes()).decode()
    messages: Any = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {
                    "type": "text",
                    "text": "List every object with its position, shape, color and size.",
                },
            ],
        }
    ]
    engine = ReferenceEngine(BUNDLED_MODEL)
    async with serving(engine) as server, client_of(server) as client:
        (model,) = [one.id async for one in await client.models.list()]
        form: Any = {"type": "json_schema", "json_schema": {"name": "objects", "schema": schema}}
        found = await client.chat.completions.create(
            model=model, messages=messages, response_format=form, max_tokens=600
        )
        analysis = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": [messages[0]["content"][0]]}],
            extra_body={"task": "image-analysis"},
        )
    assert found.usage is not None
    assert json.loads(found.choices[0].message.content or "")
    assert found.choices[0].finish_reason == "stop"
    assert "desert" in json.loads(analysis.choices[0].message.content or "")["scene"]
