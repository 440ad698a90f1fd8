"""Several models on one server: requests choose by name, over gRPC, Connect and the client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from service.client import AsyncClient
from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.types import Capabilities, Enforcer
from tests.service.harness import (
    Running,
    failure,
    image_bytes,
    inline,
    running,
    stream_failure,
    until,
)

pytestmark = pytest.mark.slow

SCHEMA = '{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"],"additionalProperties":false}'


class Named(FakeEngine):
    """A fake engine whose model has a name."""

    def __init__(self, name: str, answer: str, **options: Any) -> None:
        super().__init__(answer, **options)
        self.name = name

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, model=self.name)


@asynccontextmanager
async def two(**settings: Any) -> AsyncIterator[tuple[Running, Named, Named]]:
    first = Named("first", "from the first")
    second = Named("second", '{"a": true}', enforcer=Enforcer.VALIDATION)
    engines: Any = [first, second]
    async with running(engines, **settings) as started:
        yield started, first, second


async def test_requests_choose_a_model() -> None:
    async with two() as (started, first, second):
        stub, task = started.stub, inline("Describe.")
        answers = {}
        for name in ("", "first", "second"):
            request = pb.RunTaskRequest(task=task, model=name)
            answers[name] = (await stub.RunTask(request, timeout=60)).result
        streamed = [
            event
            async for event in stub.StreamTask(
                pb.StreamTaskRequest(task=task, model="second"), timeout=60
            )
        ]
        counts = first.finished_requests, second.finished_requests
    assert [one.model for one in answers.values()] == ["first", "first", "second"]
    assert answers["second"].text == streamed[-1].result.text == '{"a": true}'
    assert counts == (3, 3), "each with its warm-up"


async def test_models_are_listed_and_described() -> None:
    async with two() as (started, _, _):
        listed = (await started.stub.ListModels(pb.ListModelsRequest(), timeout=60)).models
        named = await started.stub.GetModel(pb.GetModelRequest(name="second"), timeout=60)
        unnamed = await started.stub.GetModel(pb.GetModelRequest(), timeout=60)
        async with AsyncClient(started.address) as client:
            again = (await client.list_models()).models
    assert [(one.name, one.engine, one.serving) for one in listed] == [
        ("first", "fake", True),
        ("second", "fake", True),
    ]
    assert again == listed
    assert listed[1].capabilities == named.capabilities
    assert named.capabilities.enforcer == pb.ENFORCER_VALIDATION
    assert (named.name, unnamed.name) == ("second", "first")


async def test_a_schema_is_reported_as_the_model_enforces_it() -> None:
    grammar = pb.Grammar(json_schema=SCHEMA)
    async with two() as (started, _, _):
        found = [
            await started.stub.ValidateSchema(
                pb.ValidateSchemaRequest(grammar=grammar, model=name), timeout=60
            )
            for name in ("", "second")
        ]
    assert [one.enforcement for one in found] == [pb.ENFORCEMENT_ENFORCED, pb.ENFORCEMENT_CHECKED]


async def test_an_unknown_model_is_not_found() -> None:
    task, image = inline("Describe."), pb.Image(data=image_bytes())
    async with two() as (started, first, second):
        stub = started.stub
        errors = [
            await failure(call)
            for call in (
                stub.RunTask(pb.RunTaskRequest(task=task, model="third"), timeout=60),
                stub.AnalyzeImage(
                    pb.AnalyzeImageRequest(images=[image], model="third"), timeout=60
                ),
                stub.ValidateSchema(
                    pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=SCHEMA), model="third"),
                    timeout=60,
                ),
                stub.GetModel(pb.GetModelRequest(name="third"), timeout=60),
            )
        ]
        stream = stub.StreamTask(pb.StreamTaskRequest(task=task, model="third"), timeout=60)
        errors.append((await stream_failure(stream))[1])
        assert (first.finished_requests, second.finished_requests) == (1, 1)
    for error in errors:
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
        assert error.metadata["known"] == "first, second"


async def test_an_unhealthy_model_is_listed_as_not_serving() -> None:
    async with two(health_interval_s=0.05) as (started, _, second):
        second.healthy = False
        inferences = started.server.runtime.models
        await until(lambda: inferences["second"].refusal is not None, 60)
        listed = (await started.stub.ListModels(pb.ListModelsRequest(), timeout=60)).models
        error = await failure(
            started.stub.RunTask(pb.RunTaskRequest(task=inline(), model="second"), timeout=60)
        )
        answer = await started.stub.RunTask(pb.RunTaskRequest(task=inline()), timeout=60)
        second.healthy = True
        await until(lambda: inferences["second"].refusal is None, 60)
    assert [one.serving for one in listed] == [True, False]
    assert error.reason == "ENGINE_UNHEALTHY"
    assert answer.result.model == "first"
