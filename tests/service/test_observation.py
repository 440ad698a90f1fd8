"""The record of a call, as front ends and inference fill it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.engines.fake import FakeEngine
from service.errors import ServiceError, UnknownTask
from service.observation import CallRecord, Observation, current
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.harness import Running, failure, image_bytes, inline, run_request, running, until


@asynccontextmanager
async def recorded(
    engine: FakeEngine | None = None, **settings: Any
) -> AsyncIterator[tuple[Running, list[CallRecord]]]:
    """A server, and the records of the calls that have ended."""
    records: list[CallRecord] = []
    async with running(engine, **settings) as started:
        started.server.runtime.observation.listeners.append(records.append)
        yield started, records


async def test_a_call_with_an_image() -> None:
    async with recorded(FakeEngine("one two three", token_delay_s=0.01)) as (started, records):
        image = image_bytes(64, 48)
        answer = await started.stub.RunTask(run_request(images=[image]))
    (record,) = records
    assert (record.transport, record.method) == ("grpc", "RunTask")
    assert (record.code, record.reason, record.caller) == ("OK", "-", "-")
    assert (record.model, record.task, record.finish_reason) == ("fake", "inline", "stop")
    assert (record.images, record.pixels, record.image_bytes) == (1, 64 * 48, len(image))
    usage = answer.result.usage
    assert record.usage.prompt_tokens == usage.prompt_tokens > 0
    assert record.usage.output_tokens == usage.output_tokens > 1
    assert record.attempts == 1
    assert record.admitted
    assert record.first_token_s is not None
    assert 0 < record.first_token_s < record.seconds
    assert record.token_s is not None


async def test_a_stream() -> None:
    async with recorded(FakeEngine("one two three")) as (started, records):
        request = pb.StreamTaskRequest(task=inline())
        events = [event async for event in started.stub.StreamTask(request)]
        await until(lambda: bool(records))
    (record,) = records
    assert (record.method, record.code, record.attempts) == ("StreamTask", "OK", 1)
    assert record.usage.output_tokens == events[-1].result.usage.output_tokens


async def test_a_registered_task_and_an_error_name_themselves() -> None:
    async with recorded() as (started, records):
        unknown = pb.RunTaskRequest(task=pb.Task(name="unheard-of"))
        await failure(started.stub.RunTask(unknown))
        known = pb.RunTaskRequest(task=pb.Task(name="image-analysis"))
        await failure(started.stub.RunTask(known))
    assert [(one.code, one.reason, one.task) for one in records] == [
        ("NOT_FOUND", "UNKNOWN_TASK", ""),
        ("INVALID_ARGUMENT", "IMAGE_REQUIRED", "image-analysis"),
    ]


async def test_attempts_that_were_thrown_away_count() -> None:
    schema = '{"type": "array", "items": {"type": "integer"}, "uniqueItems": true, "maxItems": 40}'
    async with recorded(FakeEngine("[1, 1]"), output_retries=2) as (started, records):
        request = run_request(inline(json_schema=schema), temperature=1.0)
        error = await failure(started.stub.RunTask(request))
    (record,) = records
    assert (record.reason, record.attempts) == (error.reason, 3) == ("OUTPUT_INVALID", 3)
    assert record.usage.output_tokens > 0


async def test_a_call_in_the_queue_and_one_that_is_cancelled() -> None:
    async with recorded(FakeEngine(), max_concurrent=1) as (started, records):
        started.engine.hang_after = 0
        first = asyncio.ensure_future(started.stub.RunTask(run_request()))
        await until(lambda: started.engine.active_requests == 1)
        second = asyncio.ensure_future(started.stub.RunTask(run_request()))
        await until(lambda: started.server.runtime.budgets.admission.waiting == 1)
        started.engine.hang_after = None
        first.cancel()
        await second
        await until(lambda: len(records) == 2)
    cancelled, answered = records
    assert (cancelled.code, cancelled.reason, cancelled.admitted) == ("CANCELLED", "-", True)
    assert answered.code == "OK"
    assert answered.queued_s > 0


async def test_methods_of_others_are_recorded() -> None:
    async with recorded() as (started, records):
        health = health_pb2_grpc.HealthStub(started.channel)
        await health.Check(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await health.Check(health_pb2.HealthCheckRequest(service="none"))
        await until(lambda: len(records) == 2)
    assert [(one.method, one.code) for one in records] == [
        ("grpc.health.v1.Health/Check", "OK"),
        ("grpc.health.v1.Health/Check", "NOT_FOUND"),
    ]


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (UnknownTask("x"), ("NOT_FOUND", "UNKNOWN_TASK")),
        (ServiceError("x", reason="OF_A_PLUG_IN"), ("INTERNAL", "INTERNAL")),
        (KeyError("x"), ("INTERNAL", "INTERNAL")),
        (asyncio.CancelledError(), ("CANCELLED", "-")),
    ],
)
async def test_a_front_end_of_few_lines(error: BaseException, ended: tuple[str, str]) -> None:
    records: list[CallRecord] = []
    observation = Observation(records.append)

    def fail() -> None:
        with observation.call("line", "ask", "id-1") as record:
            record.caller = "somebody"
            assert current() is record
            raise error

    with pytest.raises(type(error)):
        fail()
    with observation.call("line", "ask"):
        pass
    assert [(one.code, one.reason) for one in records] == [ended, ("OK", "-")]
    assert (records[0].request_id, records[0].caller) == ("id-1", "somebody")


async def test_only_the_first_end_counts() -> None:
    records: list[CallRecord] = []
    observation = Observation(records.append)
    record = observation.begin("line", "ask")
    observation.end(record, "OK")
    observation.end(record, "CANCELLED")
    assert [one.code for one in records] == ["OK"]


def test_outside_of_a_call_nobody_reads_the_record() -> None:
    assert current() is not current()
