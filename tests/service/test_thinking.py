"""The option ``thinking`` on its way from callers to the engine, and where it is refused."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from service.engines.fake import SAMPLING_OPTIONS, FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.types import GenerateRequest
from tests.service.harness import failure, inline, running
from tests.service.http_api.harness import Reply, Serving, serving

Ask = Callable[..., Awaitable[Reply]]
THINK = pb.SamplingOptions(thinking=True)


class Thinker(FakeEngine):
    """An engine whose callers choose; remembers what they chose."""

    def __init__(self, *options: str) -> None:
        self.seen: list[bool] = []
        super().__init__(self._remember, sampling_options={*SAMPLING_OPTIONS, *options})

    def _remember(self, request: GenerateRequest) -> str:
        if request.request_id != "warm-up":
            self.seen.append(request.sampling.thinking)
        return "fine" if request.grammar is None else "yes"


@pytest.mark.parametrize("asked", [True, False, None])
async def test_the_choice_of_a_caller_reaches_the_engine(asked: bool | None) -> None:
    engine = Thinker("thinking")
    options = pb.SamplingOptions() if asked is None else pb.SamplingOptions(thinking=asked)
    async with running(engine) as started:
        assert "thinking" in (
            (await started.stub.GetModel(pb.GetModelRequest())).capabilities.sampling_options
        )
        engine.seen.clear()
        answer = await started.stub.RunTask(
            pb.RunTaskRequest(task=inline(), sampling=options), timeout=60
        )
    assert answer.result.text == "fine"
    assert engine.seen == [bool(asked)]


async def test_thinking_under_a_grammar_is_refused() -> None:
    task = inline(choice=["yes", "no"])
    async with running(Thinker("thinking")) as started:
        call = started.stub.RunTask(pb.RunTaskRequest(task=task, sampling=THINK), timeout=60)
        error = await failure(call)
    assert error.reason == "SAMPLING_OPTION_INVALID"
    assert "sampling.thinking" in error.message
    assert "without a grammar" in error.message


async def test_an_engine_that_cannot_think_refuses_it() -> None:
    async with running(Thinker()) as started:
        call = started.stub.RunTask(pb.RunTaskRequest(task=inline(), sampling=THINK), timeout=60)
        error = await failure(call)
        silent = pb.SamplingOptions(thinking=False)
        await started.stub.RunTask(pb.RunTaskRequest(task=inline(), sampling=silent), timeout=60)
    assert error.reason == "SAMPLING_OPTION_INVALID"
    assert "sampling.thinking" in error.message


@pytest.fixture(params=["chat", "responses"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """POST to one of the two APIs, with fields over sensible ones."""

    async def chat(server: Serving, **fields: Any) -> Reply:
        return await server.chat(**fields)

    async def responses(server: Serving, **fields: Any) -> Reply:
        body = json.dumps({"model": "fake", "input": "Hello", **fields})
        return await server.request("POST", "/v1/responses", body.encode())

    return chat if request.param == "chat" else responses


@pytest.mark.parametrize(("kwargs", "chosen"), [({"enable_thinking": True}, True),
                                                ({"enable_thinking": False}, False), ({}, False)])  # fmt: skip
async def test_over_http_the_choice_is_an_option_of_the_template(
    ask: Ask, kwargs: dict[str, Any], chosen: bool
) -> None:
    engine = Thinker("thinking")
    async with serving(engine) as server:
        engine.seen.clear()
        reply = await ask(server, chat_template_kwargs=kwargs)
    assert reply.status == 200
    assert engine.seen == [chosen]


@pytest.mark.parametrize(
    ("options", "fields", "says"),
    [
        ([], {}, "is not supported by this engine"),
        (
            ["thinking"],
            {"structured_outputs": {"choice": ["yes", "no"]}},
            "is for answers without a grammar",
        ),
    ],
)
async def test_over_http_the_refusal_names_that_option(
    ask: Ask, options: list[str], fields: dict[str, Any], says: str
) -> None:
    async with serving(Thinker(*options)) as server:
        reply = await ask(server, chat_template_kwargs={"enable_thinking": True}, **fields)
        unknown = await ask(server, chat_template_kwargs={"thinking": True})
    assert reply.status == 400
    assert reply.json["error"]["param"] == "chat_template_kwargs.enable_thinking"
    assert says in reply.json["error"]["message"]
    assert unknown.status == 400
    assert unknown.json["error"]["param"] == "chat_template_kwargs.thinking"
