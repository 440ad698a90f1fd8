"""What callers in Python get: channels that reach every kind of server, errors that can be read."""

from __future__ import annotations

import asyncio
import hashlib
import math
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from service.client import CallError, open_channel, read_error
from service.engines.fake import FakeEngine
from service.grpc_api.status import DETAILS_KEY
from service.inference import admission
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.service.harness import inline, run_request, running, until


def call(address: str, request: pb.RunTaskRequest, **options: Any) -> pb.RunTaskResponse:
    with open_channel(address, **options) as channel:
        return VisionServiceStub(channel).RunTask(request, timeout=60)


def error_of(address: str, request: pb.RunTaskRequest, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as found:
        call(address, request, **options)
    return found.value


async def test_a_call() -> None:
    async with running() as started:
        response = await asyncio.to_thread(call, started.address, run_request())
        assert response.result.model == "fake"


async def test_a_key_goes_with_calls_and_streams(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me:{hashlib.sha256(b'secret').hexdigest()}\n")

    def use(address: str) -> str:
        with open_channel(address, api_key="secret") as channel:
            stub = VisionServiceStub(channel)
            stub.RunTask(run_request(), timeout=60, metadata=(("x-request-id", "mine"),))
            return list(stub.StreamTask(pb.StreamTaskRequest(task=inline())))[-1].result.text

    async with running(api_keys_file=keys) as started:
        assert await asyncio.to_thread(use, started.address)
        error = await asyncio.to_thread(error_of, started.address, run_request())
        assert read_error(error).reason == "API_KEY_MISSING"
        error = await asyncio.to_thread(error_of, started.address, run_request(), api_key="other")
        assert read_error(error).reason == "API_KEY_INVALID"


async def test_an_error_is_unpacked() -> None:
    async with running() as started:
        request = run_request(temperature=math.nan, top_p=0)
        found = read_error(await asyncio.to_thread(error_of, started.address, request))
        assert found.code is grpc.StatusCode.INVALID_ARGUMENT
        assert found.reason == "SAMPLING_OPTION_INVALID"
        assert list(found.fields) == ["sampling.temperature", "sampling.top_p"]
        assert found.metadata["request_id"] == found.request_id
        assert found.retry_after_s is None
        assert [path for path, _ in found.field_violations] == list(found.fields)


async def test_overload_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission.jitter, "uniform", lambda low, high: 1.0)
    engine = FakeEngine()
    async with running(engine, max_concurrent=1, max_queue=0) as started:
        engine.hang_after = 0
        first = started.stub.RunTask(run_request(), timeout=60)
        await until(lambda: engine.active_requests == 1)
        error = await asyncio.to_thread(error_of, started.address, run_request())
        found = read_error(error)
        assert (found.reason, found.retry_after_s) == ("OVERLOADED", 1.0)
        first.cancel()


def test_no_server() -> None:
    error = error_of("127.0.0.1:1", run_request())
    found = read_error(error)
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "")


class Failed(grpc.RpcError):
    """A failed call as gRPC gives it, with trailers of any kind."""

    def __init__(self, *trailers: tuple[str, Any]) -> None:
        self._trailers = trailers

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INTERNAL

    def details(self) -> str | None:
        return None

    def trailing_metadata(self) -> tuple[tuple[str, Any], ...] | None:
        return self._trailers or None


@pytest.mark.parametrize(
    "error",
    [Failed(), Failed((DETAILS_KEY, b"\xff\xff")), Failed(("server", "proxy"), (DETAILS_KEY, b""))],
    ids=["no trailers", "bytes that are no status", "of a proxy"],
)
def test_errors_without_details_of_the_service_are_parsed(error: Failed) -> None:
    assert vars(read_error(error)) == vars(CallError(grpc.StatusCode.INTERNAL, ""))


def test_a_field_may_have_several_violations() -> None:
    bad = error_details_pb2.BadRequest()
    for path, text in (violations := (("b", "one"), ("a", "two"), ("b", "three"))):
        bad.field_violations.add(field=path, description=text)
    status = status_pb2.Status()
    status.details.add().Pack(bad)
    found = read_error(Failed((DETAILS_KEY, status.SerializeToString())))
    assert found.field_violations == violations
    assert list(found.fields.items()) == [("b", "one"), ("a", "two")]


def test_unknown_details_are_skipped() -> None:
    status = status_pb2.Status()
    status.details.add().Pack(error_details_pb2.DebugInfo(detail="theirs"))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="THEIRS", domain="proxy"))
    found = read_error(Failed((DETAILS_KEY, status.SerializeToString())))
    assert (found.reason, found.metadata, found.fields) == ("THEIRS", {}, {})
