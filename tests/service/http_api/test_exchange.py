"""What every HTTP request goes through: key, phase, leaving callers, slow readers, the end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.engines.fake import FakeEngine
from service.http_api import exchange
from service.runtime import Runtime
from service.settings import Settings, SettingsError
from service.tasks.registry import load_registry
from tests.service.certificates import Authority
from tests.service.harness import ROOT, until
from tests.service.http_api.harness import (
    CHAT,
    LIMIT_S,
    LONG,
    Connection,
    HttpFrontEnd,
    Serving,
    events,
    request,
    serving,
    small_buffers,
    streamed,
)

pytestmark = pytest.mark.slow

KEY = "a-long-random-key"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"alice:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    return path


# Keys


async def test_a_call_needs_its_key(keys: Path) -> None:
    async with serving(api_keys_file=keys) as server:
        missing = await server.chat()
        wrong = await server.chat({"authorization": "Bearer other"})
        models = await server.request("GET", "/v1/models")
        right = await server.chat({"authorization": f"Bearer {KEY}"})
        other_header = await server.chat({"x-api-key": KEY})
        public = [
            await server.request("GET", path) for path in ("/livez", "/readyz", "/openapi.json")
        ]
    assert (missing.status, missing.error["code"]) == (401, "API_KEY_MISSING")
    assert "over HTTP in its headers" in missing.error["message"]
    assert (models.status, models.error["code"]) == (401, "API_KEY_MISSING")
    assert (wrong.status, wrong.error["code"]) == (401, "API_KEY_INVALID")
    assert wrong.error["type"] == "authentication_error"
    assert (right.status, other_header.status) == (200, 200)
    assert [reply.status for reply in public] == [200, 200, 200]


async def test_the_key_is_checked_before_the_body_is_read(keys: Path) -> None:
    async with serving(api_keys_file=keys) as server:
        connection = await server.connect()
        await connection.send("POST", CHAT, b"{", {"content-length": "50000000"})
        reply = await connection.reply()
        connection.close()
    assert (reply.status, reply.error["code"]) == (401, "API_KEY_MISSING")


async def test_the_caller_is_known_to_the_access_log(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.access")
    async with serving(api_keys_file=keys) as server:
        await server.chat({"authorization": f"Bearer {KEY}", "x-request-id": "mine-1"})
        await server.chat()
    lines = [record.message for record in caplog.records if record.name == "service.access"]
    assert "method=chat.completions code=OK reason=- " in lines[0]
    assert "caller=alice peer=127.0.0.1:" in lines[0]
    assert "code=UNAUTHENTICATED reason=API_KEY_MISSING" in lines[1]


async def test_the_request_id_is_the_callers_or_a_new_one() -> None:
    async with serving() as server:
        mine = await server.chat({"x-request-id": "mine-1"})
        odd = await server.chat({"x-request-id": "not good\t"})
        none = await server.chat()
    assert mine.headers["x-request-id"] == "mine-1"
    assert mine.json["id"] == "chatcmpl-mine-1"
    ids = {odd.headers["x-request-id"], none.headers["x-request-id"]}
    assert len(ids) == 2
    assert "not good" not in ids


# CORS


ORIGIN = {"origin": "https://app.example"}
PREFLIGHT = {
    **ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


async def test_a_preflight_needs_no_key_and_the_call_does(keys: Path) -> None:
    async with serving(api_keys_file=keys, http_origins="https://app.example") as server:
        preflight = await server.request("OPTIONS", CHAT, None, PREFLIGHT)
        refused = await server.chat(ORIGIN)
        right = await server.chat({**ORIGIN, "authorization": f"Bearer {KEY}"})
        other = await server.request(
            "OPTIONS", CHAT, None, {**PREFLIGHT, "origin": "https://evil.example"}
        )
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    assert right.status == 200
    assert "access-control-allow-origin" not in other.headers
    assert (other.status, other.error["code"]) == (400, "INVALID_FIELD")
    assert "origin" in other.error["message"]
    assert other.headers["x-request-id"]


async def test_without_an_allow_list_no_page_may_call() -> None:
    async with serving() as server:
        preflight = await server.request("OPTIONS", CHAT, None, PREFLIGHT)
        call = await server.chat(ORIGIN)
    assert preflight.status == 405
    assert not any(
        name.startswith("access-control") for name in (*preflight.headers, *call.headers)
    )


# Phases


async def test_health_follows_the_phase() -> None:
    async with serving(load=False) as server:
        loading = [await server.request("GET", path) for path in ("/livez", "/readyz", "/healthz")]
        early = await server.chat()
        models = await server.request("GET", "/v1/models")
        await server.runtime.load()
        ready = await server.request("GET", "/readyz")
        head = await server.request("HEAD", "/livez")
    assert [reply.status for reply in loading] == [200, 503, 503]
    assert loading[1].json == {"status": "loading"}
    assert (early.status, early.error["code"]) == (503, "ENGINE_LOADING")
    assert int(early.headers["retry-after"]) >= 1
    assert models.error["code"] == "ENGINE_LOADING"
    assert (ready.status, ready.json) == (200, {"status": "serving"})
    assert head.status == 200


async def test_a_full_queue_says_when_to_come_again() -> None:
    engine = FakeEngine("one two")
    async with serving(engine, max_concurrent=1, max_queue=0) as server:
        engine.hang_after = 1
        first = asyncio.create_task(server.chat())
        await until(lambda: engine.active_requests == 1, 60)
        second = await server.chat()
        first.cancel()
    assert (second.status, second.error["code"]) == (429, "OVERLOADED")
    assert second.error["type"] == "rate_limit_error"
    assert int(second.headers["retry-after"]) >= 1
    assert int(second.headers["retry-after-ms"]) >= 1
    assert "x-should-retry" not in second.headers


async def test_a_call_that_takes_too_long() -> None:
    engine = FakeEngine("one two")
    async with serving(engine, inference_timeout_s=0.3) as server:
        engine.hang_after = 1
        reply = await server.chat()
        stream = await server.chat(stream=True)
    assert (reply.status, reply.error["code"]) == (504, "INFERENCE_TIMEOUT")
    assert reply.headers["x-should-retry"] == "false"
    if stream.status == 200:  # the first piece came in time
        *_, last, done = events(stream.body)
        assert (last["error"]["code"], done) == ("INFERENCE_TIMEOUT", "[DONE]")
    else:
        assert (stream.status, stream.error["code"]) == (504, "INFERENCE_TIMEOUT")


# Callers who leave


@pytest.mark.parametrize("stream", [False, True])
async def test_the_slot_is_free_when_the_caller_leaves(stream: bool) -> None:
    engine = FakeEngine("one two three")
    async with serving(engine, max_concurrent=1) as server:
        engine.hang_after = 1
        connection = await server.connect()
        body = json.dumps(request(stream=stream)).encode()
        await connection.send("POST", CHAT, body)
        await until(lambda: engine.active_requests == 1, 60)
        connection.close()
        await until(lambda: engine.cancelled_requests == 1, 60)
        await until(lambda: server.runtime.budgets.admission.active == 0, 60)
        engine.hang_after = None
        assert (await server.chat()).status == 200


async def test_a_connection_serves_one_request_after_the_other() -> None:
    async with serving(FakeEngine("ok")) as server:
        connection = await server.connect()
        body = json.dumps(request()).encode()
        for _ in range(3):
            await connection.send("POST", CHAT, body)
            assert (await connection.reply()).text == "ok"
        await connection.send("POST", CHAT, json.dumps(request(stream=True)).encode())
        assert events((await connection.reply()).body)[-1] == "[DONE]"
        await connection.send("POST", CHAT, body)
        assert (await connection.reply()).status == 200
        connection.close()


async def test_a_refused_body_does_not_spoil_the_connection(keys: Path) -> None:
    async with serving(api_keys_file=keys) as server:
        connection = await server.connect()
        body = json.dumps(request()).encode()
        await connection.send("POST", CHAT, body)
        assert (await connection.reply()).status == 401
        await connection.send("POST", CHAT, body, {"authorization": f"Bearer {KEY}"})
        assert (await connection.reply()).status == 200
        connection.close()


# Streams


async def first_pieces(connection: Connection, count: int) -> list[bytes]:
    status, _ = await connection.head()
    assert status == 200
    found = []
    async for piece in connection.pieces():
        found.append(piece)
        if len(found) == count:
            break
    return found


async def test_a_quiet_stream_gets_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PING_S", 0.05)
    engine = FakeEngine("one two")
    async with serving(engine) as server:
        engine.hang_after = 0
        connection = await server.connect()
        await connection.send("POST", CHAT, json.dumps(request(stream=True)).encode())
        assert await first_pieces(connection, 2) == [b": ping\n\n", b": ping\n\n"]
        connection.close()


async def test_comments_do_not_disturb_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PING_S", 0.001)
    async with serving(FakeEngine("word " * 40, token_delay_s=0.002)) as server:
        reply = await server.chat(stream=True)
    assert b": ping\n\n" in reply.body
    assert streamed(events(reply.body)) == "word " * 40


@asynccontextmanager
async def not_reading(server: Serving) -> AsyncIterator[None]:
    """A caller who asks for a stream and reads nothing."""
    unread = small_buffers(server)
    unread.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(unread, ("127.0.0.1", server.http.port))
    body = json.dumps(request(stream=True, max_tokens=10**6)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    await loop.sock_sendall(unread, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    try:
        yield
    finally:
        unread.close()


async def test_a_reader_who_stops_is_dropped_after_the_time_of_a_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit_s = 300.0  # far away, so that the engine does not end the call itself
    monkeypatch.setattr("service.unread.DROP_AFTER_S", 1.5 - limit_s)
    caplog.set_level("INFO", "service.access")
    engine = FakeEngine(LONG, context_length=2_000_000)
    async with serving(engine, inference_timeout_s=limit_s) as server, not_reading(server):
        await until(lambda: "reason=NOT_READ" in caplog.text, 60)
        await until(lambda: server.runtime.lifecycle.calls_in_flight == 0, 60)
        await until(lambda: engine.active_requests == 0, 60)
    assert "returned without" not in caplog.text
    assert "code=DEADLINE_EXCEEDED" in caplog.text


async def test_a_drain_does_not_wait_for_a_reader_who_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.unread.STALL_S", 0.1)
    engine = FakeEngine(LONG, context_length=2_000_000)
    async with serving(engine) as server, not_reading(server):
        await until(lambda: engine.finished_requests > 1, 120)  # the warm-up, and this one
        await asyncio.wait_for(server.runtime.stop(LIMIT_S * 4), LIMIT_S)
        assert server.runtime.lifecycle.calls_in_flight == 0


# The end of the server


async def test_a_drain_finishes_calls_and_cuts_the_rest() -> None:
    engine = FakeEngine("one two three")
    async with serving(engine) as server:
        engine.hang_after = 2
        whole = asyncio.create_task(server.chat())
        stream = asyncio.create_task(server.chat(stream=True))
        await until(lambda: engine.active_requests == 2, 60)
        await server.runtime.stop(0.1)
    assert (await whole).error["code"] == "ENGINE_DRAINING"
    assert (await whole).status == 503
    *rest, last, done = events((await stream).body)
    assert streamed(rest) == "one two"
    assert (last["error"]["code"], done) == ("ENGINE_DRAINING", "[DONE]")


async def until_draining(port: int) -> None:
    """Wait until a process has handled a signal: it is not ready any more, or listens no more."""
    status = 200
    while status == 200:
        try:
            connection = Connection(*await asyncio.open_connection("127.0.0.1", port))
            await connection.send("GET", "/readyz")
            status = (await connection.reply()).status
            connection.close()
        except OSError:
            return


@pytest.mark.parametrize("signals", [1, 2])
async def test_sigterm_finishes_a_stream_and_the_second_cuts_it(signals: int) -> None:
    pieces = 40 if signals == 1 else 400
    server = subprocess.Popen(  # noqa: ASYNC220  # starts in milliseconds
        [sys.executable, "-m", "tests.service.http_api.serve_fake", "60", "0.05", str(pieces)],
        cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        port = int(await asyncio.to_thread(server.stdout.readline))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        connection = Connection(reader, writer)
        await connection.send("POST", CHAT, json.dumps(request(stream=True)).encode())
        begun = await first_pieces(connection, 3)
        for _ in range(signals):
            server.send_signal(signal.SIGTERM)
            await until_draining(port)  # two signals that wait together are one
        rest = [piece async for piece in connection.pieces()]
        writer.close()
        code = await asyncio.to_thread(server.wait, 60)
    finally:
        server.kill()
        server.communicate()
    found = events(b"".join(begun + rest))
    assert found[-1] == "[DONE]"
    assert code == 0
    if signals == 1:
        assert streamed(found) == "word " * pieces
    else:
        assert found[-2]["error"]["code"] == "ENGINE_DRAINING"


# The port


async def test_a_port_that_is_taken_ends_the_start() -> None:
    async with serving() as server:
        settings = Settings(port=0, http_port=server.http.port)
        runtime = Runtime(settings, [FakeEngine()], load_registry(None))
        with pytest.raises(SettingsError, match="http_port: cannot listen on 127"):
            await runtime.start([HttpFrontEnd(runtime)])
        await runtime.stop(0)


async def test_small_requests_do_not_wait_for_acknowledgements() -> None:
    """A response that leaves in several packets waits 40 ms unless the socket has TCP_NODELAY."""
    async with serving() as server:
        connection = await server.connect()
        await connection.send("POST", CHAT, json.dumps(request()).encode())
        await connection.reply()
        accepted = [
            one.transport.get_extra_info("socket")
            for one in server.http._server._server.server_state.connections  # type: ignore[union-attr]
        ]
        found = [one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in accepted]
        connection.close()
    assert found
    assert all(found)


async def test_tls(tmp_path: Path, keys: Path) -> None:
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    async with serving(tls_cert=cert, tls_key=key, api_keys_file=keys) as server:
        assert server.http.place.startswith("https://")
        server.ssl = ssl.create_default_context(cafile=str(authority.cert))
        server.ssl.check_hostname = False
        right = await server.chat({"authorization": f"Bearer {KEY}"})
        assert (await server.chat()).status == 401
    assert right.status == 200
