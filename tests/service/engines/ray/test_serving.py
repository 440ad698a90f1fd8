"""A server whose engine runs in replicas, and real clients."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from service.client import CHANNEL_OPTIONS
from service.engines.ray import RayEngine
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.settings import Settings
from service.types import GenerateRequest
from service.wiring import build_registry
from tests.service.certificates import Authority
from tests.service.engines.conformance import collect
from tests.service.engines.ray.clusters import START_S, busy, on_ray
from tests.service.engines.ray.talking import CRASH, LONG, TalkingEngine
from tests.service.harness import (
    Running,
    failure,
    image_bytes,
    inline,
    run_request,
    running,
    stream_failure,
    until,
)
from tests.service.reflection_client import ReflectionClient

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def engine() -> RayEngine:
    """A new engine on replicas that all tests here share."""
    return on_ray(TalkingEngine, name="serving", linger_s=600.0, replicas=2)


@asynccontextmanager
async def on_replicas(**settings: Any) -> AsyncIterator[Running]:
    async with running(engine(), **settings) as server:
        yield server


async def idle(server: Running) -> None:
    """Wait until no replica has a request."""
    await until(lambda: busy(server.engine) == 0, START_S)


async def test_answers_and_the_description_of_the_model() -> None:
    async with on_replicas() as server:
        answer = await server.stub.RunTask(run_request(inline("Say what you are.")))
        assert answer.result.text == "This is a replica."
        assert answer.result.usage.output_tokens > 0
        model = await server.stub.GetModel(pb.GetModelRequest())
        assert model.engine == "ray"
        assert model.details["replica_engine"] == "fake"


@pytest.mark.parametrize(
    "request_",
    [
        run_request(images=[image_bytes()[:200]]),
        run_request(images=[b"no image"]),
        run_request(inline(json_schema="{")),
        run_request(inline(regex="(")),
        run_request(inline("word " * 40_000)),
        run_request(max_tokens=10**6),
        run_request(temperature=9),
        run_request(inline("", json_schema='{"type": "object"}')),
    ],
    ids=["truncated", "no image", "schema", "regex", "context", "max_tokens", "sampling", "text"],
)
async def test_errors_are_those_of_an_engine_here(request_: pb.RunTaskRequest) -> None:
    async with running(TalkingEngine()) as here, on_replicas() as there:
        metadata = [("x-request-id", "the-same")]
        expected = await failure(here.stub.RunTask(request_, metadata=metadata))
        found = await failure(there.stub.RunTask(request_, metadata=metadata))
    assert vars(found) == vars(expected)
    assert expected.code is not grpc.StatusCode.INTERNAL


async def test_a_defect_in_a_replica_tells_callers_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with on_replicas() as server:
        error = await failure(server.stub.RunTask(run_request(inline(CRASH))))
        assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "secret" not in error.message
        assert "a defect in /secret/path" in caplog.text
        await server.stub.RunTask(run_request())


async def test_images_reach_the_engine() -> None:
    request = run_request(images=[image_bytes(640, 480), image_bytes(64, 64, "PNG")])
    async with running(TalkingEngine()) as here, on_replicas() as there:
        expected = await here.stub.RunTask(request)
        found = await there.stub.RunTask(request)
    assert found.result.usage == expected.result.usage
    assert found.result.usage.image_tokens > 300


async def test_large_requests_reach_the_engine() -> None:
    """They take another way than small ones: a message of Ray Serve has 4 MiB."""
    file = io.BytesIO()
    Image.effect_noise((2300, 2300), 100).save(file, "PNG")
    request = run_request(images=[file.getvalue(), image_bytes(64, 64)])
    assert len(request.images[0].data) > 4 << 20
    async with running(TalkingEngine()) as here, on_replicas() as there:
        expected = await here.stub.RunTask(request)
        found = await there.stub.RunTask(request)
    assert found.result.usage == expected.result.usage


async def test_no_proxy_is_between_the_server_and_its_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    found = on_ray(TalkingEngine)  # engines with the same deployment share connections
    await found.start()
    try:
        chunks = await collect(found, GenerateRequest("test", "Say what you are."))
        assert "".join(chunk.text for chunk in chunks) == "This is a replica."
    finally:
        await found.close()


async def test_health_and_reflection() -> None:
    async with on_replicas() as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        found = await health.Check(
            health_pb2.HealthCheckRequest(service="qwen3vl.v1.VisionService")
        )
        assert found.status == health_pb2.HealthCheckResponse.SERVING

        def ask() -> Any:
            with grpc.insecure_channel(server.address) as channel:
                client = ReflectionClient(channel)
                task = {"task": {"inline": {"user": "Say what you are."}}}
                return client.services(), client.call("qwen3vl.v1.VisionService", "RunTask", task)

        with ThreadPoolExecutor(1) as pool:
            services, answers = await asyncio.get_running_loop().run_in_executor(pool, ask)
        assert "qwen3vl.v1.VisionService" in services
        assert answers[0]["result"]["text"] == "This is a replica."


async def test_a_caller_that_leaves_frees_the_replica() -> None:
    async with on_replicas() as server:
        call = server.stub.StreamTask(pb.StreamTaskRequest(task=inline(LONG)))
        async for event in call:
            if event.WhichOneof("event") == "delta":
                break
        call.cancel()
        await idle(server)
        await until(lambda: server.engine.active_requests == 0)


async def test_a_deadline_ends_the_request_in_the_replica() -> None:
    async with on_replicas() as server:
        error = await failure(server.stub.RunTask(run_request(inline(LONG)), timeout=0.5))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await idle(server)


async def test_a_drain_lets_calls_finish() -> None:
    async with on_replicas() as server:
        call = server.stub.StreamTask(pb.StreamTaskRequest(task=inline(LONG)))
        events = aiter(call)
        await anext(events)
        stopping = asyncio.create_task(server.server.stop(START_S))
        texts = [event.delta async for event in events]
        assert "".join(texts).count("word") > 300
        await stopping


async def test_a_drain_cuts_calls_after_its_time() -> None:
    async with on_replicas() as server:
        call = server.stub.StreamTask(pb.StreamTaskRequest(task=inline(LONG)))
        events = aiter(call)
        await anext(events)
        stopping = asyncio.create_task(server.server.stop(0))
        _, error = await stream_failure(events)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DRAINING")
        await stopping


async def test_tls_and_keys_in_front(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{hashlib.sha256(b'secret').hexdigest()}\n")
    settings = Settings(port=0, tls_cert=cert, tls_key=key, api_keys_file=keys)
    server = VisionServer(settings, engine(), build_registry(settings))
    await server.start()
    try:
        await server.load()
        credentials = grpc.ssl_channel_credentials(authority.cert.read_bytes())
        address = f"localhost:{server.port}"
        async with grpc.aio.secure_channel(address, credentials, CHANNEL_OPTIONS) as channel:
            stub = VisionServiceStub(channel)
            error = await failure(stub.RunTask(run_request()))
            assert error.reason == "API_KEY_MISSING"
            metadata = [("authorization", "Bearer secret")]
            answer = await stub.RunTask(run_request(), metadata=metadata)
            assert answer.result.text == "This is a replica."
    finally:
        await server.stop(0)
