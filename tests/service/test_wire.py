"""What nobody should send: random bytes as a request, and HTTP/2 that no gRPC client writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.engines.fake import FakeEngine
from service.grpc_api import guard as grpc_guard
from service.grpc_api.server import VisionServer, serve
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import Settings
from service.tasks.registry import load_registry
from tests.attacks.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    SETTINGS,
    frame,
    headers,
    message,
)
from tests.service.harness import Running, failure, inline, run_request, running

RUN_TASK = b"/qwen3vl.v1.VisionService/RunTask"

# Codes that a request of random bytes may end with. INTERNAL and UNKNOWN are not among them.
REFUSED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,  # a valid request with so small a max_tokens that its answer is cut
}

valid_requests = st.builds(
    lambda user, images, options: pb.RunTaskRequest(
        task=inline(user),
        images=[pb.Image(data=data) for data in images],
        sampling=pb.SamplingOptions(**options),
    ).SerializeToString(),
    st.text(max_size=20),
    st.lists(st.binary(max_size=40), max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(),
            "top_p": st.floats(),
            "top_k": st.integers(0, 2**32 - 1),
            "seed": st.integers(0, 2**64 - 1),
            "max_tokens": st.integers(0, 2**32 - 1),
        },
    ),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A request with some of its bytes changed, cut off or repeated."""
    data = bytearray(draw(valid_requests))
    for position in draw(st.lists(st.integers(0, max(0, len(data) - 1)), max_size=4)):
        if data:
            data[position] = draw(st.integers(0, 255))
    return bytes(data[draw(st.integers(0, 3)) :]) * draw(st.integers(1, 2))


async def outcomes(requests: Sequence[bytes], methods: Sequence[str]) -> set[grpc.StatusCode]:
    """Codes of the calls that failed; the server must answer a good call after all of them."""
    codes: set[grpc.StatusCode] = set()
    async with running() as started:
        for method in methods:
            for data in requests:
                try:
                    await started.raw(method, data)
                except grpc.aio.AioRpcError as error:
                    codes.add(error.code())
        await started.stub.RunTask(run_request(), timeout=60)
    return codes


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.one_of(st.binary(max_size=60), valid_requests, damaged()), min_size=5, max_size=20)
)
def test_random_bytes_are_refused_or_answered(requests: list[bytes]) -> None:
    methods = ("RunTask", "AnalyzeImage", "GetTask")
    assert asyncio.run(outcomes(requests, methods)) <= REFUSED


async def test_nesting_beyond_what_protobuf_reads() -> None:
    data = b""
    for _ in range(200):  # field 1 of a message, in field 1 of a message, …
        length = len(data)
        varint = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
        data = b"\x0a" + varint + data
    async with running() as started:
        error = await failure(started.raw("RunTask", data))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT


# HTTP/2 by hand


async def exchange(
    running: Running, path: bytes, *extra: tuple[bytes, bytes], stall_s: float = 0.0
) -> bytes:
    """Send one RunTask request with these headers; what comes back from the status on.

    stall_s: how long the event loop of the server stands still right after the request was sent.
    """
    body = run_request().SerializeToString()
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    writer.write(
        PREFACE
        + frame(SETTINGS, 0, 0, b"")
        + frame(HEADERS, END_HEADERS, 1, headers(path, *extra))
        + frame(DATA, END_STREAM, 1, message(body))
    )
    time.sleep(stall_s)  # noqa: ASYNC251
    answer = b""
    while b"grpc-status" not in answer:
        part = await asyncio.wait_for(reader.read(65_536), 60)
        assert part, "the server closed the connection without a status"
        answer += part
    writer.close()
    await writer.wait_closed()
    return answer.partition(b"grpc-status")[2]


async def test_the_hand_made_client_can_call() -> None:
    async with running() as started:
        assert (await exchange(started, RUN_TASK)).startswith(b"\x010")


@pytest.mark.parametrize("path", [b"/\xff\xfe/x", b"/qwen3vl.v1.VisionService/\xff", b"x", b"/"])
async def test_a_path_that_is_not_text_does_not_end_the_server(path: bytes) -> None:
    """Without the guard, the first of these ends grpcio's server. See service/grpc_api/guard.py."""
    async with running() as started:
        for _ in range(3):
            status = await exchange(started, path)
            assert status.startswith(b"\x0212"), status  # UNIMPLEMENTED
        response = await started.stub.RunTask(run_request(), timeout=60)
        assert response.result.text


async def test_a_deadline_that_has_passed_on_arrival() -> None:
    async with running() as started:
        before = started.engine.finished_requests
        status = await exchange(started, RUN_TASK, (b"grpc-timeout", b"1n"), stall_s=0.1)
        assert status.startswith(b"\x014")  # DEADLINE_EXCEEDED
        assert started.engine.finished_requests == before


@pytest.mark.parametrize("name", [b"x-request-id", b"authorization", b"x-api-key"])
async def test_metadata_that_is_not_text(name: bytes) -> None:
    async with running() as started:
        assert (await exchange(started, RUN_TASK, (name, b"\xff\xfe"))).startswith(b"\x010")


def test_the_guard_logs_an_unknown_grpcio(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        pass

    monkeypatch.setattr(grpc_guard.cygrpc, "AioServer", Other)
    assert not grpc_guard.install()
    assert grpc_guard.cygrpc.AioServer is Other


@pytest.mark.slow
async def test_serve_ends_with_an_error_when_grpc_ends_by_itself() -> None:
    """A process that is alive behind a closed port would never be restarted."""
    ready: asyncio.Future[VisionServer] = asyncio.get_running_loop().create_future()
    engine = FakeEngine()
    serving = asyncio.create_task(
        serve(Settings(port=0), engine, load_registry(None), on_ready=ready.set_result)
    )
    server = await ready
    assert server.front_end._server is not None
    await server.front_end._server.stop(None)
    with pytest.raises(RuntimeError, match="ended by itself"):
        await asyncio.wait_for(serving, 60)
