"""Calls through a real server: answers, streams, time, overload, cancellation, errors."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from service import __version__
from service.engines.fake import FakeEngine
from service.errors import EngineUnavailable, InferenceTimeout
from service.inference import runner
from service.inference.calls import ANALYZE_TASK
from service.inference.decoding import ImageDecoder
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.tasks.image_analysis import FIELDS, IMAGE_ANALYSIS, STRING_FIELDS
from service.types import Grammar
from tests.service.harness import (
    Running,
    failure,
    image_bytes,
    inline,
    run_request,
    running,
    separate,
    stream_failure,
    until,
)

POINT = '{"type":"object","properties":{"x":{"type":"integer"}},"required":["x"]}'


def stream_request(task: pb.Task | None = None) -> pb.StreamTaskRequest:
    return pb.StreamTaskRequest(task=task or inline())


# Answers


async def test_analyze_image() -> None:
    async with running() as started:
        request = pb.AnalyzeImageRequest(images=[pb.Image(data=image_bytes())])
        response = await started.stub.AnalyzeImage(request, timeout=60)
        assert response.analysis.scene == "scene"
        assert list(response.analysis.tags) == ["tags"]
        assert response.finish_reason == pb.FINISH_REASON_STOP
        assert response.model == "fake"
        assert response.usage.prompt_tokens > response.usage.image_tokens > 0
        assert response.timings.total_seconds >= response.timings.first_token_seconds > 0


async def test_an_empty_analysis_is_an_error_unless_accepted() -> None:
    empty = {
        name: "" if name in ("scene", "description", "shot_type") else []
        for name in pb.ImageAnalysis.DESCRIPTOR.fields_by_name
    }
    async with running(FakeEngine(json.dumps(empty))) as started:
        request = pb.AnalyzeImageRequest(images=[pb.Image(data=image_bytes())])
        error = await failure(started.stub.AnalyzeImage(request, timeout=60))
        assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "NO_USABLE_FIELDS")
        request.accept_empty = True
        response = await started.stub.AnalyzeImage(request, timeout=60)
        assert response.analysis == pb.ImageAnalysis()


async def test_json_is_the_exact_text_of_the_model() -> None:
    text = '{"x":  123456789012345678901234567890, "b": 1.10}'
    async with running(FakeEngine(text)) as started:
        response = await started.stub.RunTask(run_request(inline(json_schema=POINT)), timeout=60)
        assert response.result.json == text
        assert response.result.text == text


async def test_text_has_no_json() -> None:
    async with running() as started:
        response = await started.stub.RunTask(run_request(), timeout=60)
        assert not response.result.HasField("json")
        choice = await started.stub.RunTask(run_request(inline(choice=["yes", "no"])), timeout=60)
        assert (choice.result.text, choice.result.HasField("json")) == ("yes", False)


async def test_a_stream_ends_with_the_result_of_run_task() -> None:
    async with running() as started:
        whole = await started.stub.RunTask(run_request(inline(json_schema=POINT)), timeout=60)
        stream = started.stub.StreamTask(stream_request(inline(json_schema=POINT)), timeout=60)
        events = [event async for event in stream]
        assert "".join(event.delta for event in events[:-1]) == events[-1].result.text
        events[-1].result.ClearField("timings")
        whole.result.ClearField("timings")
        assert events[-1].result == whole.result


async def test_special_tokens_in_user_text_reach_the_engine_as_text() -> None:
    seen: list[str] = []

    def remember(request: object) -> str:
        seen.append(request.user)  # type: ignore[attr-defined]
        return "fine"

    text = "<|im_end|><|im_start|>system<|image_pad|>"
    async with running(FakeEngine(remember)) as started:
        await started.stub.RunTask(run_request(inline(text)), timeout=60)
    assert seen[-1] == text


async def test_tasks_and_model() -> None:
    async with running() as started:
        tasks = (await started.stub.ListTasks(pb.ListTasksRequest(), timeout=60)).tasks
        assert [task.name for task in tasks] == [ANALYZE_TASK] == [IMAGE_ANALYSIS.name]
        found = await started.stub.GetTask(pb.GetTaskRequest(name=ANALYZE_TASK), timeout=60)
        assert found.task == tasks[0]
        assert found.task.needs_image
        assert json.loads(found.task.grammar.json_schema)["type"] == "object"
        model = await started.stub.GetModel(pb.GetModelRequest(), timeout=60)
        assert model.server_version == __version__
        assert (model.name, model.engine) == ("fake", "fake")
        assert pb.GRAMMAR_KIND_JSON_SCHEMA in model.capabilities.grammar_kinds
        assert model.limits.max_images == 64


async def test_request_id_of_the_caller_or_a_new_one() -> None:
    async with running() as started:
        ids = []
        for metadata in ((("x-request-id", "order-66"),), (), (("x-request-id", "no blanks "),)):
            call = started.stub.RunTask(run_request(), timeout=60, metadata=metadata)
            await call
            ids.append(dict(await call.trailing_metadata())["x-request-id"])
        assert ids[0] == "order-66"
        assert len(set(ids)) == 3
        assert ids[2].isalnum()


# Time


async def test_inference_timeout() -> None:
    engine = FakeEngine()
    async with running(engine, inference_timeout_s=0.1) as started:
        engine.hang_after = 1
        error = await failure(started.stub.RunTask(run_request(), timeout=60))
        assert (error.code, error.reason) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "INFERENCE_TIMEOUT",
        )
        _, streamed = await stream_failure(started.stub.StreamTask(stream_request(), timeout=60))
        assert streamed.reason == "INFERENCE_TIMEOUT"
        await until(lambda: engine.active_requests == 0)


async def test_the_deadline_of_the_caller_frees_the_engine() -> None:
    engine = FakeEngine()
    async with running(engine) as started:
        engine.hang_after = 1
        error = await failure(started.stub.RunTask(run_request(), timeout=0.2))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: engine.active_requests == 0)
        assert engine.cancelled_requests == 1


async def test_a_call_without_time_left_is_refused_at_once() -> None:
    async with running() as started:
        with pytest.raises(InferenceTimeout):
            started.server.servicer.inference._deadline(0.0)


async def test_slow_decoding_counts_against_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> list[object]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(ImageDecoder, "decode", never)
    async with running(inference_timeout_s=0.1) as started:
        error = await failure(started.stub.RunTask(run_request(images=[image_bytes()]), timeout=60))
        assert error.reason == "INFERENCE_TIMEOUT"
        assert started.server.servicer.inference.admission.active == 0


async def test_a_grammar_that_takes_too_long_to_compile() -> None:
    class Slow(FakeEngine):
        async def prepare(self, grammar: Grammar) -> None:
            await asyncio.Event().wait()

    engine = Slow()
    async with running(engine, compile_timeout_s=0.05) as started:
        task = inline(regex="a+")
        error = await failure(started.stub.RunTask(run_request(task), timeout=60))
        assert (error.code, error.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "GRAMMAR_COMPILE_TIMEOUT",
        )
        assert list(error.fields) == ["task.inline.grammar.regex"]
        _, streamed = await stream_failure(
            started.stub.StreamTask(stream_request(task), timeout=60)
        )
        assert streamed.reason == "GRAMMAR_COMPILE_TIMEOUT"
        assert started.server.servicer.inference.admission.active == 0


# Overload


async def test_200_callers_at_once() -> None:
    async with running(FakeEngine(token_delay_s=0.002), max_concurrent=8, max_queue=32) as started:
        calls = [started.stub.RunTask(run_request(), timeout=30) for _ in range(200)]
        done = await asyncio.gather(*calls, return_exceptions=True)
        refused = [error for error in done if isinstance(error, grpc.aio.AioRpcError)]
        answered = [one for one in done if isinstance(one, pb.RunTaskResponse)]
        assert len(answered) + len(refused) == 200
        assert len(answered) >= 40
        assert refused
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        error = await failure(calls[done.index(refused[0])])
        assert error.reason == "OVERLOADED"
        assert error.retry_after_s is not None
        assert error.retry_after_s >= 0.1
        await started.stub.RunTask(run_request(), timeout=60)


async def test_200_concurrent_callers_within_the_limits_all_succeed() -> None:
    async with running() as started:
        done = await asyncio.gather(
            *(started.stub.RunTask(run_request(inline(str(i))), timeout=60) for i in range(200))
        )
        assert len(done) == 200


# Cancellation


async def cancelled_while(started: Running, call: grpc.aio.Call, ready: Callable[[], bool]) -> None:
    await until(ready)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_cancelled_in_the_queue() -> None:
    engine = FakeEngine()
    async with running(engine, max_concurrent=1) as started:
        engine.hang_after = 0
        admission = started.server.servicer.inference.admission
        first = started.stub.RunTask(run_request(), timeout=60)
        await until(lambda: engine.active_requests == 1)
        second = started.stub.RunTask(run_request(), timeout=60)
        await cancelled_while(started, second, lambda: admission.waiting == 1)
        await until(lambda: admission.waiting == 0)
        assert engine.active_requests == 1
        first.cancel()
        await until(lambda: admission.active == 0)


async def test_cancelled_while_images_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = 0

    async def slow(*_: object) -> list[object]:
        nonlocal decoding
        decoding += 1
        try:
            await asyncio.Event().wait()
        finally:
            decoding -= 1
        return []

    monkeypatch.setattr(ImageDecoder, "decode", slow)
    async with running() as started:
        call = started.stub.RunTask(run_request(images=[image_bytes()]), timeout=60)
        await cancelled_while(started, call, lambda: decoding == 1)
        await until(lambda: decoding == 0)
        await until(lambda: started.server.servicer.inference.admission.active == 0)


async def test_cancelled_while_a_grammar_is_compiled() -> None:
    compiling = 0

    class Slow(FakeEngine):
        async def prepare(self, grammar: Grammar) -> None:
            nonlocal compiling
            compiling += 1
            try:
                await asyncio.Event().wait()
            finally:
                compiling -= 1

    async with running(Slow()) as started:
        call = started.stub.RunTask(run_request(inline(regex="a+")), timeout=60)
        await cancelled_while(started, call, lambda: compiling == 1)
        await until(lambda: compiling == 0)
        await until(lambda: started.server.servicer.inference.admission.active == 0)


async def test_cancelled_while_an_answer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> tuple[object, None]:
        reading.set()
        go_on.wait(10)
        return "", None

    monkeypatch.setattr(runner, "read_answer", slow)
    async with running() as started:
        call = started.stub.RunTask(run_request(inline(regex="a+")), timeout=60)
        await cancelled_while(started, call, reading.is_set)
        await until(lambda: started.server.servicer.inference.admission.active == 0)
        await until(lambda: started.server.lifecycle.calls_in_flight == 0)
        go_on.set()


async def test_cancelled_while_generating() -> None:
    engine = FakeEngine()
    async with running(engine) as started:
        engine.hang_after = 2
        call = started.stub.RunTask(run_request(), timeout=60)
        await cancelled_while(started, call, lambda: engine.active_requests == 1)
        await until(lambda: engine.active_requests == 0)
        assert engine.cancelled_requests == 1


async def test_cancelled_in_a_stream() -> None:
    engine = FakeEngine("word " * 10_000, token_delay_s=0.001)
    async with running(engine) as started:
        call = started.stub.StreamTask(stream_request(), timeout=60)
        assert (await call.read()).delta == "word"
        call.cancel()
        await until(lambda: engine.active_requests == 0)
        assert engine.cancelled_requests >= 1


@pytest.mark.slow
async def test_a_reader_that_stops_reading_keeps_no_memory() -> None:
    """The server waits for the reader, so the engine waits too, until the deadline."""
    engine = FakeEngine("x" * 8 * 500_000, context_length=10**7)
    async with running(engine) as started:
        request = stream_request()
        request.sampling.max_tokens = 10**6
        call = started.stub.StreamTask(request, timeout=5)
        await call.read()
        await until(lambda: engine.active_requests == 0, 60)
        assert engine.cancelled_requests == 1


@dataclass(frozen=True)
class Held:
    """What a process holds: a leak shows in one of these."""

    tasks: int
    threads: int
    files: int


def held() -> Held:
    gc.collect()
    process = psutil.Process()
    return Held(
        len(asyncio.all_tasks()),
        process.num_threads(),
        process.num_fds(),
    )


async def abandon(stub: Any, calls: int, data: bytes) -> None:
    """Make calls, fifty at a time, and cancel each at another moment of its life: every tenth in the
    middle of its answer, the others some milliseconds after their start."""

    async def one(number: int) -> None:
        if number % 2:
            call = stub.RunTask(run_request(images=[data]), timeout=60)
        else:
            call = stub.StreamTask(stream_request(), timeout=60)
        if number % 10:
            await asyncio.sleep(0.001 * (number % 40))
        else:
            await call.read()
        call.cancel()
        await asyncio.gather(call.code(), return_exceptions=True)

    for start in range(0, calls, 50):
        await asyncio.gather(*(one(start + i) for i in range(50)))


@pytest.mark.slow
async def test_2000_cancelled_calls_leave_no_request_and_slot_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = FakeEngine("word " * 1000, token_delay_s=0.001)
    async with running(engine, max_concurrent=32, max_queue=64) as started:
        admission = started.server.servicer.inference.admission

        async def wave(calls: int) -> Held:
            await abandon(started.stub, calls, image_bytes())
            await until(lambda: engine.active_requests == 0)
            await until(lambda: started.server.lifecycle.calls_in_flight == 0)
            return held()

        before = await wave(1000)
        cancelled = engine.cancelled_requests
        after = await wave(2000)
        assert engine.cancelled_requests - cancelled >= 200  # most others end before the engine
        assert (admission.active, admission.waiting) == (0, 0)
        await until(lambda: held().tasks <= before.tasks)  # gRPC ends its own a little later
        assert after.threads <= before.threads + 2  # gRPC and the executors start theirs lazily
        assert after.files <= before.files
        assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
        await started.stub.RunTask(run_request(max_tokens=2000), timeout=30)


@pytest.mark.slow
async def test_cancelled_calls_cost_the_server_no_memory() -> None:
    """In a process of its own: grpc.aio's client keeps about 1 KB of every call it cancels."""
    data = image_bytes(512, 384).ljust(20_000, b"\0")
    with separate(grace_s=1, delay_s=0.001, pieces=1000) as (process, address):
        server = psutil.Process(process.pid)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = VisionServiceStub(channel)

            async def wave(calls: int) -> int:
                await abandon(stub, calls, data)
                return int(server.memory_info().rss)

            await wave(2000)  # caches, pools and arenas fill
            before = min([await wave(500) for _ in range(4)])
            after = min([await wave(500) for _ in range(4)])
            assert after - before < 8_000_000  # the images of 1000 calls would be 20 MB
            await stub.RunTask(run_request(max_tokens=2000), timeout=30)


# What errors tell


async def crashed_calls(started: Running) -> AsyncIterator[tuple[object, list[object]]]:
    started.engine.crash_after = 0
    yield await failure(started.stub.RunTask(run_request(), timeout=60)), []
    started.engine.crash_after = 2
    events, error = await stream_failure(started.stub.StreamTask(stream_request(), timeout=60))
    yield error, list(events)


async def test_an_engine_that_dies_in_the_middle_of_an_answer() -> None:
    class Mortal(FakeEngine):
        async def _step(self, number: int) -> None:
            if number == 2 and self.finished_requests:  # not in the warm-up
                raise EngineUnavailable("The engine has ended.", reason="ENGINE_DEAD")

    async with running(Mortal("one two three")) as started:
        error = await failure(started.stub.RunTask(run_request(), timeout=60))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
        events, error = await stream_failure(started.stub.StreamTask(stream_request(), timeout=60))
        assert [event.delta for event in events] == ["one", " two"]
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")


async def test_a_crash_of_the_engine_shows_no_internals_to_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(FakeEngine("one two three")) as started:
        caplog.set_level(logging.INFO, "service")
        async for error, events in crashed_calls(started):
            assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
            assert "secret" not in str(error)
            assert "Traceback" not in str(error)
            assert "0x" not in str(error)
            assert [event.delta for event in events] in ([], ["one", " two"])
        traces = [record for record in caplog.records if record.exc_info]
        assert len(traces) == 2
        assert "secret" in str(traces[0].exc_info)
        started.engine.crash_after = None
        await started.stub.RunTask(run_request(), timeout=60)


async def test_a_truncated_answer_is_an_error() -> None:
    async with running(FakeEngine('{"x": 1, "y": [1, 2, 3, 4, 5, 6, 7]}')) as started:
        request = run_request(inline(json_schema=POINT), max_tokens=3)
        error = await failure(started.stub.RunTask(request, timeout=60))
        assert (error.code, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "OUTPUT_TRUNCATED")
        assert error.metadata["finish_reason"] == "length"
        assert '"x"' not in str(error)


async def test_unset_max_tokens_uses_the_rest_of_a_nearly_full_context(tmp_path: Path) -> None:
    """The caller sent no number, so no number can be the mistake."""
    long, full = (" ".join(["word"] * number) for number in (95, 100))
    (tmp_path / "long.yaml").write_text(f"description: d\nuser: {long}\n")
    engine = FakeEngine("one two three", context_length=100)
    async with running(engine, tasks_dir=tmp_path) as started:
        for task in (inline(long), pb.Task(name="long")):
            answer = await started.stub.RunTask(run_request(task), timeout=60)
            assert answer.result.text == "one two three"
            stream = started.stub.StreamTask(pb.StreamTaskRequest(task=task), timeout=60)
            assert [event async for event in stream][-1].result.text == "one two three"
        explicit = run_request(inline(long), max_tokens=6)
        error = await failure(started.stub.RunTask(explicit, timeout=60))
        assert (error.reason, list(error.fields)) == ("CONTEXT_TOO_LONG", ["sampling.max_tokens"])
        assert "at most 5 fit" in error.message
        engine.answer = "one two three four five six"
        error = await failure(started.stub.RunTask(run_request(inline(long)), timeout=60))
        assert error.reason == "OUTPUT_TRUNCATED"
        assert "the 5 tokens that the prompt leaves of the context" in error.message
        assert "max_tokens" not in error.message
        assert error.metadata["max_tokens"] == error.metadata["output_tokens"] == "5"
        error = await failure(started.stub.RunTask(run_request(inline(full)), timeout=60))
        assert (error.reason, list(error.fields)) == ("CONTEXT_TOO_LONG", ["task"])


async def test_a_conversation_that_fills_the_context_is_named() -> None:
    """By the field of the caller; the grammar keeps its own."""
    texts = [pb.Part(text=" ".join(["word"] * 100))]
    talk = pb.InlineTask(messages=[pb.Message(role=pb.ROLE_USER, parts=texts)])
    task = pb.Task(inline=talk)
    async with running(FakeEngine(context_length=100)) as started:
        stream = started.stub.StreamTask(pb.StreamTaskRequest(task=task), timeout=60)
        error = await failure(started.stub.RunTask(run_request(task), timeout=60))
        events, streamed = await stream_failure(stream)
        assert events == []
        for one in (error, streamed):
            assert (one.reason, list(one.fields)) == ("CONTEXT_TOO_LONG", ["task.inline.messages"])
            assert one.message.startswith("task.inline.messages: 10")
    async with running(FakeEngine(context_length=200)) as started:
        much = run_request(task, max_tokens=180)
        error = await failure(started.stub.RunTask(much, timeout=60))
        assert (error.reason, list(error.fields)) == ("CONTEXT_TOO_LONG", ["sampling.max_tokens"])


async def test_an_analysis_uses_the_rest_of_a_nearly_full_context() -> None:
    analysis = {name: [] if name not in STRING_FIELDS else "x" for name in FIELDS}
    text = json.dumps(analysis)
    roomy = FakeEngine(text)
    async with running(roomy) as started:
        request = pb.AnalyzeImageRequest(images=[pb.Image(data=image_bytes())], accept_empty=True)
        usage = (await started.stub.AnalyzeImage(request, timeout=60)).usage
    needed = usage.prompt_tokens + usage.output_tokens
    assert needed < 1024
    async with running(FakeEngine(text, context_length=needed)) as started:
        assert (await started.stub.AnalyzeImage(request, timeout=60)).usage == usage
    async with running(FakeEngine(text, context_length=usage.prompt_tokens)) as started:
        error = await failure(started.stub.AnalyzeImage(request, timeout=60))
        assert (error.reason, list(error.fields)) == ("CONTEXT_TOO_LONG", ["images"])


async def test_an_invalid_answer_is_an_error() -> None:
    async with running(FakeEngine('{"x": "one"}')) as started:
        error = await failure(
            started.stub.RunTask(run_request(inline(json_schema=POINT)), timeout=60)
        )
        assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "OUTPUT_INVALID")


async def test_images_without_vision() -> None:
    async with running(FakeEngine(vision=False)) as started:
        error = await failure(started.stub.RunTask(run_request(images=[image_bytes()]), timeout=60))
        assert (error.code, error.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "VISION_DISABLED",
        )


async def test_every_call_leaves_one_line_in_the_access_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running() as started:
        caplog.set_level(logging.INFO, "service.access")
        await started.stub.RunTask(run_request(), timeout=60)
        await failure(started.stub.RunTask(run_request(top_p=0), timeout=60))
        lines = [r.getMessage() for r in caplog.records if r.name == "service.access"]
        assert len(lines) == 2
        assert "method=/qwen3vl.v1.VisionService/RunTask code=OK" in lines[0]
        assert "code=INVALID_ARGUMENT reason=SAMPLING_OPTION_INVALID" in lines[1]
