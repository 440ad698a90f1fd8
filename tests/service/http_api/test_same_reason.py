"""Every reason of docs/errors.md over gRPC and over HTTP: brought about in both ways, the same on both.

``test_same_as_grpc`` has the reasons that a request alone brings about. Here are those that need a state of
the server, and those that only one of the two can have.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.client import CHANNEL_OPTIONS, CallError, read_error
from service.engines.fake import FakeEngine
from service.error_table import REASONS
from service.errors import (
    BackEndAnswerInvalid,
    BackEndFailed,
    BackEndRefusal,
    EngineUnavailable,
    ServiceError,
)
from service.lifecycle import Phase
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.structured_output.pool import GrammarPool
from tests.service.harness import SERVICE, until
from tests.service.http_api.harness import CHAT, Reply, Serving, request, serving, shown
from tests.service.http_api.test_same_as_grpc import REQUESTS, Raising, Same, over_grpc, over_http
from tests.service.structured_output import misbehaving
from tests.service.structured_output.test_pool import BAD

pytestmark = pytest.mark.slow  # a server for each reason

TEXT = Same("text")
LIMIT_S = 60
Both = tuple[CallError, Reply]
Situation = Callable[[Path], Awaitable[Both]]
SITUATIONS: dict[str, Situation] = {}
"""Reason -> what brings it about on both sides. The argument is a folder for files."""

HTTP_ONLY = {
    "IMAGE_URL_REFUSED": "gRPC takes the bytes of images alone",
    "IMAGE_FETCH_FAILED": "gRPC takes the bytes of images alone",
    "UNKNOWN_PATH": "gRPC's own UNIMPLEMENTED, which has no reason",
    "METHOD_NOT_ALLOWED": "gRPC has no HTTP methods",
    "REQUEST_TOO_LARGE": "gRPC's own RESOURCE_EXHAUSTED, which has no reason",
    "CONTENT_TYPE_UNSUPPORTED": "gRPC has one content type",
}
"""Reason -> why gRPC cannot have it."""
GRPC_ONLY = {
    "CERTIFICATE_NOT_ALLOWED": "HTTP asks for no client certificates",
    "REQUEST_COMPRESSED": "HTTP says CONTENT_TYPE_UNSUPPORTED, with the status 415 of such a body",
    "TEXT_EMPTY": "HTTP has conversations alone, in which a text may be blank on both sides",
}
"""Reason -> why HTTP cannot have it. ``test_auth``, ``test_attacks`` and ``test_bad_input`` bring them about."""


def situation(reason: str) -> Callable[[Situation], Situation]:
    def keep(function: Situation) -> Situation:
        SITUATIONS[reason] = function
        return function

    return keep


# How both are asked


@asynccontextmanager
async def channel_to(server: Serving) -> AsyncIterator[grpc.aio.Channel]:
    address = f"127.0.0.1:{server.grpc.port}"
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        yield channel


async def error_of(call: Awaitable[Any]) -> CallError:
    try:
        found = await call
    except grpc.aio.AioRpcError as error:
        return read_error(error)
    raise AssertionError(f"gRPC answered: {found}")


async def raw_grpc(
    server: Serving, data: bytes, metadata: tuple[tuple[str, str], ...] = ()
) -> CallError:
    async with channel_to(server) as channel:
        method = channel.unary_unary(f"{SERVICE}/RunTask")
        return await error_of(method(data, metadata=metadata, timeout=LIMIT_S))


async def ask(server: Serving, one: Same = TEXT, key: str = "") -> Both:
    """The same request in both ways, one after the other."""
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    by_grpc = await raw_grpc(server, over_grpc(one).SerializeToString(), metadata)
    return by_grpc, await server.chat(dict(metadata), **over_http(one))


async def ask_together(server: Serving, one: Same = TEXT) -> Both:
    by_grpc = raw_grpc(server, over_grpc(one).SerializeToString())
    return await asyncio.gather(by_grpc, server.chat(**over_http(one)))


# Requests


@situation("INVALID_FIELD")
async def _(_: Path) -> Both:
    """A conversation that ends with a message of the assistant."""
    turns = ((pb.ROLE_USER, "user"), (pb.ROLE_ASSISTANT, "assistant"))
    messages = [pb.Message(role=role, parts=[pb.Part(text="Hello")]) for role, _ in turns]
    task = pb.Task(inline=pb.InlineTask(messages=messages))
    async with serving() as server:
        by_grpc = await raw_grpc(server, pb.RunTaskRequest(task=task).SerializeToString())
        content = [{"role": role, "content": "Hello"} for _, role in turns]
        return by_grpc, await server.chat(messages=content)


@situation("UNKNOWN_FIELD")
async def _(_: Path) -> Both:
    async with serving() as server:
        known = over_grpc(TEXT).SerializeToString()
        unknown = b"\xfa\x7f\x01a"  # field 2047 with the text "a"
        return await raw_grpc(server, known + unknown), await server.chat(zzz="a")


@situation("MALFORMED_REQUEST")
async def _(_: Path) -> Both:
    async with serving() as server:
        return await raw_grpc(server, b"\xff\xff"), await server.post(b"{")


@situation("UNKNOWN_MODEL")
async def _(_: Path) -> Both:
    named = over_grpc(TEXT)
    named.model = "other"
    async with serving() as server:
        return await raw_grpc(server, named.SerializeToString()), await server.chat(model="other")


# Keys and quotas


def keys(folder: Path, words: str = "") -> Path:
    path = folder / "keys"
    path.write_text(f"me:{hashlib.sha256(b'my key').hexdigest()} {words}\n")
    return path


@situation("API_KEY_MISSING")
async def _(folder: Path) -> Both:
    async with serving(api_keys_file=keys(folder)) as server:
        return await ask(server)


@situation("API_KEY_INVALID")
async def _(folder: Path) -> Both:
    async with serving(api_keys_file=keys(folder)) as server:
        return await ask(server, key="another key")


@situation("QUOTA_EXCEEDED")
async def _(folder: Path) -> Both:
    async with serving(api_keys_file=keys(folder, "requests_per_minute=1")) as server:
        allowed = await server.chat({"authorization": "Bearer my key"})
        assert allowed.status == 200
        return await ask(server, key="my key")


# Grammars


def bad_grammar(source: str, limit_s: float = LIMIT_S) -> Situation:
    async def run(_: Path) -> Both:
        pool = GrammarPool(1, limit_s, command=BAD)
        async with serving(pool=pool) as server:
            return await ask(server, Same("grammar", schema=source))

    return run


SITUATIONS |= {
    "GRAMMAR_COMPILE_TIMEOUT": bad_grammar(misbehaving.HANG, 1.5),
    "GRAMMAR_COMPILE_CRASHED": bad_grammar(misbehaving.SEGFAULT),
    "GRAMMAR_TOO_COSTLY": bad_grammar(misbehaving.EAT),
}


@situation("GRAMMAR_WORKER_LOST")
async def _(folder: Path) -> Both:
    """Each of the two requests is tried twice, and its process is killed each time."""
    source = misbehaving.struck(folder / "count", 4, signal.SIGKILL)
    async with serving(pool=GrammarPool(1, LIMIT_S, command=BAD)) as server:
        return await ask(server, Same("grammar", schema=source))


# Time and load


@situation("INFERENCE_TIMEOUT")
async def _(_: Path) -> Both:
    engine = FakeEngine()
    async with serving(engine, inference_timeout_s=0.5) as server:
        engine.hang_after = 0
        return await ask(server)


@situation("RECEIVE_TIMEOUT")
async def _(_: Path) -> Both:
    """The message and the body never come."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(LIMIT_S)
        yield b""

    async with serving(receive_timeout_s=0.3) as server, channel_to(server) as channel:
        method = channel.stream_unary(f"{SERVICE}/RunTask")
        by_grpc = await error_of(method(nothing(), timeout=LIMIT_S))
        connection = await server.connect()
        await connection.send("POST", CHAT, b"{", {"content-length": "100"})
        reply = await connection.reply()
        connection.close()
        return by_grpc, reply


@situation("OVERLOADED")
async def _(_: Path) -> Both:
    engine = FakeEngine()
    async with serving(engine, max_concurrent=1, max_queue=0) as server:
        engine.hang_after = 0
        first = asyncio.create_task(server.chat())
        await until(lambda: engine.active_requests == 1, LIMIT_S)
        found = await ask(server)
        first.cancel()
        return found


# The engine


@situation("ENGINE_LOADING")
async def _(_: Path) -> Both:
    async with serving(load=False) as server:
        return await ask(server)


@situation("ENGINE_UNHEALTHY")
async def _(_: Path) -> Both:
    async with serving(health_interval_s=0.05) as server:
        server.engine.healthy = False
        lifecycle = server.runtime.lifecycle
        await until(lambda: lifecycle.phase is Phase.UNHEALTHY, LIMIT_S)
        return await ask(server)


@situation("ENGINE_DRAINING")
async def _(_: Path) -> Both:
    """Two calls that the end of the grace cuts."""
    engine = FakeEngine()
    async with serving(engine) as server:
        engine.hang_after = 0
        calls = asyncio.create_task(ask_together(server))
        await until(lambda: engine.active_requests == 2, LIMIT_S)
        await server.runtime.stop(0.1)
        return await calls


@situation("ENGINE_CLOSED")
async def _(_: Path) -> Both:
    async with serving() as server:
        await server.engine.close()
        return await ask(server)


@situation("INTERNAL")
async def _(_: Path) -> Both:
    engine = FakeEngine()
    async with serving(engine) as server:
        engine.crash_after = 0
        return await ask(server)


def said_by_the_engine(error: ServiceError) -> Situation:
    """What real engines say, as this one says it."""

    async def run(_: Path) -> Both:
        engine = Raising()
        async with serving(engine) as server:
            engine.error = error
            return await ask(server)

    return run


SITUATIONS |= {
    error.reason: said_by_the_engine(error)
    for error in (
        EngineUnavailable("The engine makes no progress.", reason="ENGINE_STALLED"),
        EngineUnavailable("The engine has ended.", reason="ENGINE_DEAD"),
        EngineUnavailable("The engine cannot be used."),
        EngineUnavailable("No model server answers.", reason="BACKEND_UNREACHABLE"),
        EngineUnavailable("The replica that ran the request has ended.", reason="REPLICA_LOST"),
        BackEndFailed("The model server failed."),
        BackEndRefusal("The model server refused the request."),
        BackEndAnswerInvalid("The model server sent no complete answer."),
    )
}


@pytest.mark.parametrize("reason", sorted(SITUATIONS))
async def test_the_same_reason(reason: str, tmp_path: Path) -> None:
    by_grpc, reply = await SITUATIONS[reason](tmp_path)
    row = REASONS[reason]
    assert (by_grpc.reason, by_grpc.code.name) == (reason, row.grpc), by_grpc
    assert (reply.error["code"], reply.status) == (reason, row.http), reply.error
    assert ("retry-after" in reply.headers) is row.retry
    assert by_grpc.request_id
    assert reply.headers["x-request-id"]


def with_url(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return request(messages=[{"role": "user", "content": [part]}])


HTTP_REQUESTS: dict[str, tuple[str, str, Any, dict[str, str]]] = {
    "IMAGE_URL_REFUSED": ("POST", CHAT, with_url("https://example.org/a.png"), {}),
    "IMAGE_FETCH_FAILED": ("POST", CHAT, with_url("https://localhost:1/a.png"), {}),
    "UNKNOWN_PATH": ("GET", "/nothing", None, {}),
    "METHOD_NOT_ALLOWED": ("GET", CHAT, None, {}),
    "REQUEST_TOO_LARGE": ("POST", CHAT, request(messages=shown("a" * 1_200_000)), {}),
    "CONTENT_TYPE_UNSUPPORTED": ("POST", CHAT, request(), {"content-type": "text/plain"}),
}


@pytest.mark.parametrize("reason", sorted(HTTP_ONLY))
async def test_a_reason_of_http_alone(reason: str) -> None:
    method, path, document, headers = HTTP_REQUESTS[reason]
    hosts = "localhost:1=127.0.0.1"  # where nobody listens
    async with serving(
        max_message_bytes=1_100_000, max_image_bytes=1000, image_hosts=hosts
    ) as server:
        body = None if document is None else json.dumps(document).encode()
        reply = await server.request(method, path, body, headers)
    assert (reply.error["code"], reply.status) == (reason, REASONS[reason].http)


def test_every_reason_has_a_case() -> None:
    """A new row of the table needs a case here, or a sentence that says why one side cannot have it."""
    by_requests = {one.reason for one in REQUESTS if one.reason}
    both = [by_requests, set(SITUATIONS), set(HTTP_ONLY), set(GRPC_ONLY)]
    assert set().union(*both) == set(REASONS)
    assert sum(map(len, both)) == len(REASONS), "a reason has two kinds of cases"
    assert set(HTTP_REQUESTS) == set(HTTP_ONLY)


def test_what_grpc_cannot_have_is_as_it_is_said() -> None:
    assert {field.name for field in pb.Image.DESCRIPTOR.oneofs[0].fields} == {"data"}
