"""Our server in front of our own: ENFORCED stays ENFORCED, and errors keep their reasons."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from service.client import CallError, read_error
from service.engines.fake import FakeEngine
from service.errors import EngineUnavailable
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import Settings
from service.structured_output.analyser import in_thread
from service.types import Enforcer, GenerateRequest, GrammarKind, Role
from service.wiring import build_engines, build_registry
from tests.ports import free_port
from tests.service.certificates import Authority
from tests.service.engines.remote.scripted import saying, scripted
from tests.service.engines.remote.serving import GOOD, OBJECT, question, remote
from tests.service.harness import (
    Paced,
    Running,
    failure,
    image_bytes,
    running,
    stream_failure,
    until,
)
from tests.service.http_api.harness import serving

pytestmark = pytest.mark.slow

UNEVEN = json.dumps(
    {
        "type": "object",
        "properties": {"word": {"type": "string"}, "odd": {"type": "integer", "not": {"const": 2}}},
        "required": ["word"],
        "unevaluatedProperties": False,
    }
)
"""A schema with keywords that are only checked."""


@asynccontextmanager
async def gateway(
    worker: Running, *, server: dict[str, Any] | None = None, scheme: str = "grpc", **settings: Any
) -> AsyncIterator[Running]:
    """Our server in front of another one, over gRPC."""
    engine = remote(f"{scheme}://{worker.address}", **settings)
    async with running(engine, **(server or {})) as front:
        yield front


@asynccontextmanager
async def chain(
    engine: Any = None, *, worker: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[Running, Running]]:
    """(gateway, worker). worker: settings of the worker."""
    async with running(engine, **(worker or {})) as back, gateway(back, **settings) as front:
        yield front, back


@dataclass
class Recording:
    """Answers well, and keeps the requests."""

    requests: list[GenerateRequest] = field(default_factory=list)
    files: list[list[bytes]] = field(default_factory=list)

    def __call__(self, request: GenerateRequest) -> str:
        self.requests.append(request)
        images: Any = request.all_images  # their bytes are released when the call ends
        self.files.append([one._encoded.data for one in images])
        return GOOD if request.grammar is not None else "Two words."


# What is enforced


@pytest.mark.parametrize("schema", [OBJECT, UNEVEN])
async def test_the_report_is_that_of_the_worker(schema: str) -> None:
    async with chain() as (front, back):
        found = []
        for one in (front, back):
            model = await one.stub.GetModel(pb.GetModelRequest(), timeout=60)
            model.capabilities.max_images = 0  # the limit of the worker counts in the gateway
            asked = pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=schema))
            report = await one.stub.ValidateSchema(asked, timeout=60)
            result = (await one.stub.RunTask(question(schema=schema), timeout=60)).result
            found.append(
                (
                    model.capabilities,
                    report.enforcement,
                    list(report.keywords),
                    list(report.rewrites),
                    result.enforcement,
                    list(result.checked),
                    result.text,
                    result.usage,
                    result.model,
                )
            )
        strict = question(schema=OBJECT, strict=True)
        enforced = (await front.stub.RunTask(strict, timeout=60)).result.enforcement
    assert found[0] == found[1]
    assert found[0][0].enforcer == pb.ENFORCER_MASK
    assert enforced == pb.ENFORCEMENT_ENFORCED


async def test_a_worker_of_another_version_is_only_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.engines.remote.grpc_messages.__version__", "9.8.7")
    async with chain() as (front, _):
        result = (await front.stub.RunTask(question(), timeout=60)).result
        error = await failure(front.stub.RunTask(question(strict=True), timeout=60))
    assert result.enforcement == pb.ENFORCEMENT_CHECKED
    assert error.reason == "SCHEMA_NOT_ENFORCED"
    assert "9.8.7" in error.message


async def test_a_worker_that_does_not_enforce() -> None:
    async with (
        scripted(saying(GOOD)) as back,
        running(remote(back.url)) as worker,
        gateway(worker) as front,
    ):
        result = (await front.stub.RunTask(question(), timeout=60)).result
        error = await failure(front.stub.RunTask(question(strict=True), timeout=60))
    assert (result.json, result.enforcement) == (GOOD, pb.ENFORCEMENT_CHECKED)
    assert error.reason == "SCHEMA_NOT_ENFORCED"


async def test_a_promise_is_kept_when_the_worker_changes() -> None:
    """A worker is started anew without enforcement between the promise and the request."""
    async with chain(remote_retries=0) as (front, back):
        member = front.engine._members[0]  # type: ignore[attr-defined]
        capabilities = front.engine.capabilities
        assert capabilities.enforcer is Enforcer.MASK
        back.engine.enforcer = Enforcer.VALIDATION
        member._stale = True
        error = await failure(front.stub.RunTask(question(), timeout=60))
        assert error.reason == "BACKEND_UNREACHABLE"
        result = (await front.stub.RunTask(question(), timeout=60)).result
    assert result.enforcement == pb.ENFORCEMENT_CHECKED


async def test_retries_of_checked_answers() -> None:
    """The worker finds the invalid answer, and the gateway asks again."""
    texts = iter(['{"count": "three"}', '{"count": "four"}', GOOD])

    def answers(request: GenerateRequest) -> str:
        return "Hello" if request.grammar is None else next(texts)

    engine = FakeEngine(answers, enforcer=Enforcer.VALIDATION)
    async with chain(engine, server={"output_retries": 2}) as (front, _):
        sampling = pb.SamplingOptions(temperature=1)
        result = (await front.stub.RunTask(question(sampling=sampling), timeout=60)).result
    assert (result.json, result.attempts) == (GOOD, 3)


# Errors


def overloaded(engine: FakeEngine) -> None:
    engine.max_active = 0


def nothing(engine: FakeEngine) -> None:
    pass


LONG = OBJECT[:-1] + ',"description":"' + "long " * 300 + '"}'
PHOTO = pb.Image(data=image_bytes(400, 300))


@dataclass(frozen=True)
class Failing:
    """A call that a worker refuses. spoil: what happens to its engine after the start."""

    reason: str
    request: pb.RunTaskRequest
    engine: dict[str, Any]
    worker: dict[str, Any]
    spoil: Callable[[FakeEngine], None] = nothing


def bad(text: str) -> Callable[[GenerateRequest], str]:
    return lambda request: "Hello" if request.grammar is None else text


FAILURES = {
    "invalid": Failing("OUTPUT_INVALID", question(), {"answer": bad('{"count": "x"}')}, {}),
    "not JSON": Failing("OUTPUT_INVALID", question(), {"answer": bad("no JSON")}, {}),
    "cut": Failing("OUTPUT_TRUNCATED", question(sampling=pb.SamplingOptions(max_tokens=1)), {}, {}),
    "cut free text": Failing(
        "OUTPUT_TRUNCATED",
        question(schema=None, sampling=pb.SamplingOptions(max_tokens=2), images=[PHOTO]),
        {},
        {},
    ),
    "context": Failing("CONTEXT_TOO_LONG", question("word " * 90), {"context_length": 64}, {}),
    "max_tokens": Failing(
        "CONTEXT_TOO_LONG",
        question(sampling=pb.SamplingOptions(max_tokens=60)),
        {"context_length": 60},
        {},
    ),
    "overloaded": Failing("OVERLOADED", question(), {}, {}, overloaded),
    "schema too large": Failing(
        "SCHEMA_TOO_LARGE", question(schema=LONG), {}, {"max_schema_bytes": 1000}
    ),
    "text too long": Failing("TEXT_TOO_LONG", question("a" * 3000), {}, {"max_text_bytes": 2000}),
    "pixels": Failing(
        "IMAGE_TOO_MANY_PIXELS", question(images=[PHOTO]), {}, {"max_image_pixels": 10_000}
    ),
    "images": Failing("TOO_MANY_IMAGES", question(images=[PHOTO, PHOTO]), {}, {"max_images": 1}),
    "vision": Failing("VISION_DISABLED", question(images=[PHOTO]), {"vision": False}, {}),
    "kind": Failing(
        "GRAMMAR_KIND_UNSUPPORTED", question(), {"grammar_kinds": [GrammarKind.REGEX]}, {}
    ),
    "option": Failing(
        "SAMPLING_OPTION_INVALID",
        question(sampling=pb.SamplingOptions(top_k=3)),
        {"sampling_options": ["max_tokens"]},
        {},
    ),
}


def comparable(error: CallError) -> tuple[Any, ...]:
    metadata = {name: value for name, value in error.metadata.items() if name != "request_id"}
    return (
        error.code, error.reason, error.message, metadata, error.field_violations,
        error.retry_after_s,
    )  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
async def test_the_gateway_fails_as_the_worker_does(name: str) -> None:
    case = FAILURES[name]
    options: dict[str, Any] = {"worker": case.worker, "remote_retries": 0}
    async with chain(FakeEngine(**case.engine), **options) as (front, back):
        case.spoil(back.engine)
        for method, request in (
            ("RunTask", case.request),
            ("StreamTask", pb.StreamTaskRequest.FromString(case.request.SerializeToString())),
        ):
            errors = []
            for one in (front, back):
                call = getattr(one.stub, method)(request, timeout=60)
                if method == "RunTask":
                    errors.append(await failure(call))
                else:
                    errors.append((await stream_failure(call))[1])
            assert errors[1].reason == case.reason
            assert comparable(errors[0]) == comparable(errors[1])


async def test_the_time_limit_of_the_worker() -> None:
    async with chain(worker={"inference_timeout_s": 0.5}) as (front, back):
        back.engine.hang_after = 1
        error = await failure(front.stub.RunTask(question(), timeout=60))
    assert (error.code, error.reason) == (
        grpc.StatusCode.DEADLINE_EXCEEDED, "INFERENCE_TIMEOUT",
    )  # fmt: skip
    assert float(error.metadata["timeout_s"]) <= 0.5


async def test_a_bug_in_the_worker_is_a_failure_of_the_back_end() -> None:
    async with chain() as (front, back):
        back.engine.crash_after = 1
        error = await failure(front.stub.RunTask(question(), timeout=60))
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "BACKEND_FAILED")
    assert "secret" not in error.message


async def test_the_quota_of_the_gateway_is_not_that_of_its_caller(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    digest = hashlib.sha256(b"sk-secret").hexdigest()
    path.write_text(f"front:{digest} requests_per_minute=4\n")
    options = {"remote_key": "sk-secret", "remote_retries": 0}
    async with chain(worker={"api_keys_file": path}, **options) as (front, _):
        errors = []
        for _ in range(6):
            try:
                await front.stub.RunTask(question(), timeout=60)
            except grpc.aio.AioRpcError as error:
                errors.append(read_error(error))
    assert errors
    assert {one.reason for one in errors} == {"OVERLOADED"}
    assert all((one.retry_after_s or 0) > 0 for one in errors)


# The request


async def test_a_conversation_with_tools_and_images_arrives_as_it_was() -> None:
    recording = Recording()
    image = pb.Image(data=image_bytes(64, 32, "WEBP"), min_pixels=2000, max_pixels=9000)
    inline = pb.InlineTask(
        messages=[
            pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text="Be brief.")]),
            pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="Look:"), pb.Part(image=image)]),
            pb.Message(
                role=pb.ROLE_ASSISTANT,
                tool_calls=[pb.ToolCall(name="zoom", arguments_json='{"by": 2.0}')],
            ),
            pb.Message(role=pb.ROLE_TOOL, parts=[pb.Part(text="done"), pb.Part(image=PHOTO)]),
        ],
        tools=[pb.ToolDefinition(name="zoom", description="Zooms.", parameters_json='{"a": 1}')],
    )
    async with chain(FakeEngine(recording)) as (front, back):
        request = pb.RunTaskRequest(task=pb.Task(inline=inline))
        recording.requests.clear()
        recording.files.clear()
        for one in (front, back):
            await one.stub.RunTask(request, timeout=60)
    through, direct = recording.requests
    assert recording.files == [[image.data, PHOTO.data]] * 2
    assert through.tools == direct.tools
    assert [one.role for one in through.messages] == [
        Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL,
    ]  # fmt: skip
    assert [one.tool_calls for one in through.messages] == [
        one.tool_calls for one in direct.messages
    ]
    for shown, other in zip(through.all_images, direct.all_images, strict=True):
        assert (shown.min_pixels, shown.max_pixels) == (other.min_pixels, other.max_pixels)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"json_schema": OBJECT, "property_order": pb.PROPERTY_ORDER_ANY}, {}),
        ({"json_schema": OBJECT}, {"temperature": 0.5, "seed": 2**64 - 1, "top_k": 3}),
        ({"regex": "[a-c]+"}, {"max_tokens": 5, "repetition_penalty": 1.5}),
        ({"ebnf": 'root ::= "a"'}, {"top_p": 0.5}),
        ({"choice": pb.Choice(options=["née", "b"])}, {}),
        ({}, {"temperature": 0.0}),
    ],
)
async def test_grammar_and_options_arrive_as_they_were(
    fields: dict[str, Any], sampling: dict[str, Any]
) -> None:
    seen: list[GenerateRequest] = []

    def answers(request: GenerateRequest) -> str:
        seen.append(request)
        kinds = {GrammarKind.REGEX: "abc", GrammarKind.EBNF: "a", GrammarKind.CHOICE: "née"}
        return GOOD if request.grammar is None else kinds.get(request.grammar.kind, GOOD)

    grammar = pb.Grammar(**fields) if fields else None
    inline = pb.InlineTask(system="Short.", user="How many?", grammar=grammar)
    request = pb.RunTaskRequest(
        task=pb.Task(inline=inline), sampling=pb.SamplingOptions(**sampling)
    )
    async with chain(FakeEngine(answers)) as (front, back):
        seen.clear()
        for one in (front, back):
            await one.stub.RunTask(request, timeout=60)
    through, direct = seen
    assert (through.system, through.user) == ("Short.", "How many?")
    assert through.grammar == direct.grammar
    assert through.sampling == direct.sampling


async def test_a_stream_is_passed_on_while_it_is_generated() -> None:
    words = "one two three four five six seven eight"
    engine = Paced(words, first=3)
    async with chain(engine) as (front, _):
        engine.go_on.clear()
        request = pb.StreamTaskRequest(task=question(schema=None).task)
        events = []
        async for event in front.stub.StreamTask(request, timeout=60):
            engine.go_on.set()  # which is after some text has arrived
            events.append(event)
    assert "".join(one.delta for one in events) == events[-1].result.text == words
    assert len(events) > 2


async def test_pixels_become_a_file(tmp_path: Path) -> None:
    """An image without a file, as a task of a program may have one."""
    from service.types import Image as DecodedImage

    recording = Recording()
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    async with running(FakeEngine(recording)) as back:
        engine = remote(f"grpc://{back.address}")
        await engine.start()
        recording.requests.clear()
        request = GenerateRequest("id", "Look.", images=(DecodedImage(pixels, 500, 900),))
        chunks = [chunk async for chunk in engine.generate(request)]
        await engine.close()
    (image,) = recording.requests[0].images
    (data,) = recording.files[-1]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert (image.min_pixels, image.max_pixels) == (500, 900)
    assert chunks[-1].usage.image_tokens > 0


@pytest.mark.parametrize("over", ["grpc", "http"])
@pytest.mark.parametrize("default", [False, True])
async def test_the_schema_is_in_the_prompt_once_or_not_at_all(over: str, default: bool) -> None:
    """The request decides, else the worker."""
    recording = Recording()
    async with serving(FakeEngine(recording), schema_in_prompt=default) as back:
        url = back.base_url if over == "http" else f"grpc://127.0.0.1:{back.grpc.port}"
        async with running(remote(url)) as front:
            for wish in (None, False, True):
                asked = question()
                asked.task.inline.MergeFrom(pb.InlineTask(schema_in_prompt=wish))
                await front.stub.RunTask(asked, timeout=60)
            told = await front.stub.GetModel(pb.GetModelRequest(), timeout=60)
    prompts = [str(one.conversation) for one in recording.requests if one.grammar is not None]
    assert [one.count("valid under this JSON Schema") for one in prompts] == [int(default), 0, 1]
    assert told.capabilities.schema_in_prompt is default


# The connection


@pytest.mark.parametrize("right", [True, False])
async def test_the_key_goes_out_as_metadata(
    tmp_path: Path, right: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    path = tmp_path / "keys"
    path.write_text(f"front:{hashlib.sha256(b'sk-secret').hexdigest()}\n")
    async with running(api_keys_file=path) as back:
        if right:
            async with gateway(back, remote_key="sk-secret") as front:
                assert (await front.stub.RunTask(question(), timeout=60)).result.json
        else:
            engine = remote(f"grpc://{back.address}", remote_key="sk-wrong", remote_start_s=60)
            with pytest.raises(EngineUnavailable, match="API_KEY_INVALID"):
                await asyncio.wait_for(engine.start(), 50)
            await engine.close()
    assert "sk-secret" not in caplog.text
    assert "sk-wrong" not in caplog.text


async def test_tls_with_a_client_certificate(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    client = authority.issue("client")
    tls: dict[str, Any] = {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.cert}
    files: dict[str, Any] = {
        "remote_ca": authority.cert,
        "remote_cert": client[0],
        "remote_cert_key": client[1],
    }
    async with running(**tls) as back:
        async with gateway(back, scheme="grpcs", **files) as front:
            assert (await front.stub.RunTask(question(), timeout=60)).result.json
        engine = remote(f"grpcs://{back.address}", remote_start_s=60)
        begun = time.monotonic()
        with pytest.raises(EngineUnavailable):
            await engine.start()
        assert time.monotonic() - begun < 30, "another attempt would not help"
        await engine.close()


async def test_a_model_that_the_worker_does_not_have() -> None:
    async with running() as back:
        engine = remote(f"grpc://{back.address}", remote_model="other", remote_start_s=60)
        with pytest.raises(EngineUnavailable, match="does not serve the model"):
            await asyncio.wait_for(engine.start(), 50)
        await engine.close()


async def test_a_caller_that_leaves_cancels_the_work() -> None:
    async with chain() as (front, back):
        back.engine.hang_after = 1
        call = front.stub.RunTask(question(), timeout=60)
        await until(lambda: back.engine.active_requests == 1, 60)
        call.cancel()
        await until(lambda: back.engine.active_requests == 0, 60)
        assert back.engine.cancelled_requests == 1


async def test_the_worker_knows_the_deadline() -> None:
    async with chain() as (front, back):
        back.engine.hang_after = 1
        error = await failure(front.stub.RunTask(question(), timeout=1))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: back.engine.active_requests == 0, 60)


async def test_silence_ends() -> None:
    async with chain(remote_silence_s=0.5) as (front, back):
        back.engine.hang_after = 1
        error = await failure(front.stub.RunTask(question(), timeout=60))
        assert error.reason == "ENGINE_STALLED"
        await until(lambda: back.engine.active_requests == 0, 60)


async def test_the_request_id_is_the_same_on_both() -> None:
    recording = Recording()
    async with chain(FakeEngine(recording)) as (front, _):
        await front.stub.RunTask(question(), timeout=60, metadata=(("x-request-id", "id-1234"),))
    assert recording.requests[-1].request_id == "id-1234"


@asynccontextmanager
async def two_workers(
    folder: Path, **settings: Any
) -> AsyncIterator[tuple[Running, list[Running]]]:
    async with AsyncExitStack() as stack:
        ports = [free_port() for _ in range(2)]  # for a worker that starts again
        workers = [await stack.enter_async_context(running(port=port)) for port in ports]
        lines = [f"  w{i}: {{url: 'grpc://{one.address}'}}" for i, one in enumerate(workers)]
        path = folder / "fleet.yaml"
        path.write_text(
            "\n".join(["backends:", *lines, "models:", "  vl: {backends: [w0, w1], model: fake}"])
        )
        options: dict[str, Any] = {"remote_start_s": 0, "remote_file": path, **settings}
        engines = build_engines(Settings(engine="remote", **options))
        front = await stack.enter_async_context(running(engines))  # type: ignore[arg-type]
        yield front, workers


async def test_another_worker_where_nothing_was_generated(tmp_path: Path) -> None:
    async with two_workers(tmp_path, remote_retries=0) as (front, (first, second)):
        first.engine.max_active = 0
        before = second.engine.finished_requests
        for _ in range(4):
            assert (await front.stub.RunTask(question(), timeout=60)).result.model == "vl"
        assert second.engine.finished_requests == before + 4


async def test_a_worker_that_stops_is_left_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    async with two_workers(tmp_path, remote_retries=0) as (front, (first, second)):
        port = first.server.port
        await first.server.stop(0)
        before = second.engine.finished_requests
        for _ in range(6):
            await front.stub.RunTask(question(), timeout=60)
        assert second.engine.finished_requests == before + 6
        engine, settings = FakeEngine(), Settings(port=port)
        again = VisionServer(settings, engine, build_registry(settings), in_thread)
        await again.start()
        try:
            await again.load()
            warm = engine.finished_requests
            remote_engine: Any = front.engine[0]  # type: ignore[index]
            while not all(one.healthy for one in remote_engine._members):
                await remote_engine.check_health()  # as the server does every few seconds
                await asyncio.sleep(0.1)
            for _ in range(4):
                await front.stub.RunTask(question(), timeout=60)
            assert engine.finished_requests == warm + 2
        finally:
            await again.stop(0)


async def test_no_other_worker_after_text_was_generated(tmp_path: Path) -> None:
    async with two_workers(tmp_path) as (front, workers):
        for one in workers:
            one.engine.hang_after = 1
        call = asyncio.ensure_future(failure(front.stub.RunTask(question(), timeout=60)))
        await until(lambda: any(one.engine.active_requests for one in workers), 60)
        (busy,) = [one for one in workers if one.engine.active_requests]
        (idle,) = [one for one in workers if one is not busy]
        begun = idle.engine.cancelled_requests + idle.engine.finished_requests
        await busy.server.stop(0)
        error = await call
        assert error.reason in ("BACKEND_UNREACHABLE", "ENGINE_CLOSED", "ENGINE_DRAINING")
        assert idle.engine.cancelled_requests + idle.engine.finished_requests == begun


# Over HTTP


HTTP_FAILURES: dict[
    str, tuple[str, pb.RunTaskRequest, dict[str, Any], Callable[[FakeEngine], None]]
] = {
    "invalid": ("OUTPUT_INVALID", question(), {"answer": bad('{"count": "x"}')}, nothing),
    "context": ("CONTEXT_TOO_LONG", question("word " * 90), {"context_length": 64}, nothing),
    "overloaded": ("OVERLOADED", question(), {}, overloaded),
    "crash": ("BACKEND_FAILED", question(), {}, lambda engine: setattr(engine, "crash_after", 0)),
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("name", HTTP_FAILURES)
async def test_reasons_pass_over_http(name: str, streamed: bool) -> None:
    reason, request, options, spoil = HTTP_FAILURES[name]
    async with serving(FakeEngine(**options)) as back:
        engine = remote(back.base_url, remote_stream=streamed, remote_retries=0)
        async with running(engine) as front:
            spoil(back.engine)
            error = await failure(front.stub.RunTask(request, timeout=60))
    assert error.reason == reason
    if reason == "OVERLOADED":
        assert (error.retry_after_s or 0) > 0
