"""Attacks on the HTTP port: slow, large, compressed, unread, deep, smuggled, and without a key.

All speak HTTP by hand, because no client library sends what an attacker does.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from benchmarks.attack.case import Value, case, health, share, true
from benchmarks.attack.probe import Health, probing
from benchmarks.attack.servers import Server, free_port, paced, peak

MEMORY_MIB = 30.0
CHAT, RUN = "/v1/chat/completions", "/qwen3vl.v1.VisionService/RunTask"
STREAM = "/qwen3vl.v1.VisionService/StreamTask"
LIMIT_S = 60.0
RECEIVE_S = 3
STALLED_S = 15.0
"""After which the server has noticed that nobody reads."""
TEXT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}


@contextmanager
def served(delay_s: float = 0.0, pieces: int = 1, **more: str) -> Iterator[tuple[Server, int]]:
    """A server that asks for keys, and its HTTP port. more: settings, as in the environment."""
    port = free_port()
    environment = {
        "QWEN3VL_HTTP_PORT": str(port),
        "QWEN3VL_RECEIVE_TIMEOUT_S": str(RECEIVE_S),
        **more,
    }
    with paced(delay_s, pieces, keys=True, environment=environment) as server:
        yield server, port


@contextmanager
def attacked(
    delay_s: float = 0.0, pieces: int = 1, **more: str
) -> Iterator[tuple[Server, int, Health, list[float]]]:
    """The same with its health, and the memory that it has added at most."""
    with (
        served(delay_s, pieces, **more) as (server, port),
        probing(server.address) as probe,
        peak(server) as added,
    ):
        yield server, port, probe, added


@asynccontextmanager
async def opened(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


def head(path: str, *lines: str, method: str = "POST", key: str = "") -> bytes:
    words = [f"{method} {path} HTTP/1.1", "host: a", *lines]
    if key:
        words.append(f"authorization: Bearer {key}")
    return "\r\n".join([*words, "", ""]).encode()


def post(path: str, body: bytes, *lines: str, key: str = "") -> bytes:
    sized = (f"content-length: {len(body)}", "content-type: application/json", *lines)
    return head(path, *sized, key=key) + body


async def status(port: int, *pieces: bytes, limit_s: float = LIMIT_S) -> int:
    """The status of the first response to these bytes; 0 where the server only closes."""
    async with opened(port) as (reader, writer):
        with contextlib.suppress(OSError):  # it may close before it has read all
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
        try:
            line = await asyncio.wait_for(reader.readline(), limit_s)
        except (OSError, asyncio.TimeoutError):
            return 0
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0


async def ended_after_s(port: int, first: bytes, again: bytes, limit_s: float) -> float:
    """Seconds until the server closes a connection that goes on with some bytes each 0.2 s."""
    begun = time.monotonic()
    async with opened(port) as (reader, writer):
        writer.write(first)
        reading = asyncio.create_task(reader.read())
        while not reading.done() and time.monotonic() - begun < limit_s:
            with contextlib.suppress(OSError):
                writer.write(again)
                await writer.drain()
            await asyncio.wait([reading], timeout=0.2)
        found = time.monotonic() - begun if reading.done() else float("inf")
        reading.cancel()
        await asyncio.wait([reading])
        return found


async def ordinary(server: Server, port: int, seconds: float) -> list[float]:
    """Seconds of the calls of an ordinary caller, one after the other; a failed one counts as 60."""
    found = []
    end = time.monotonic() + seconds
    request = post(CHAT, json.dumps(TEXT).encode(), key=server.keys["ordinary"])
    while time.monotonic() < end:
        begun = time.monotonic()
        answered = await status(port, request) == 200
        found.append(time.monotonic() - begun if answered else 60.0)
        await asyncio.sleep(0.05)
    return found


@case("http-slow", "100 headers and 100 bodies over HTTP that come a byte at a time", "-")
def slow(short: bool) -> Iterable[Value]:
    async def attack(server: Server, port: int) -> tuple[list[float], list[float]]:
        limit_s = 40.0
        key = server.keys["attacker"]
        sized = ("content-length: 100000", "content-type: application/json")
        attackers = [
            *(ended_after_s(port, b"POST / HTTP/1.1\r\nx: ", b"a", limit_s) for _ in range(100)),
            *(ended_after_s(port, head(CHAT, *sized, key=key), b" ", limit_s) for _ in range(100)),
        ]
        calls, *ended = await asyncio.gather(ordinary(server, port, 4), *attackers)
        return calls, ended

    with attacked() as (server, port, probe, added):
        calls, ended = asyncio.run(attack(server, port))
    yield share("connections ended by the server", sum(one < 1e6 for one in ended), 200)
    yield Value("the last one ended after", max(ended), "s", 30)
    yield share("ordinary calls answered", sum(one < 60 for one in calls), len(calls))
    yield Value("memory added", added[0], "MiB", MEMORY_MIB)
    yield health(probe)


@case("http-headers", "without a key: 64 requests over HTTP with headers without an end", "-")
def headers(short: bool) -> Iterable[Value]:
    async def attack(server: Server, port: int) -> list[int]:
        line = b"x-a: " + b"a" * 60_000 + b"\r\n"
        endless = [status(port, b"GET / HTTP/1.1\r\n", *([line] * 300)) for _ in range(32)]
        many = [
            status(port, b"GET / HTTP/1.1\r\n", *([b"a: b\r\n" * 1000] * 300)) for _ in range(32)
        ]
        return list(await asyncio.gather(*endless, *many))

    with attacked() as (server, port, probe, added):
        found = asyncio.run(attack(server, port))
        after = asyncio.run(ordinary(server, port, 1))
    yield share("refused", sum(one in (0, 400, 431) for one in found), 64)
    yield share("ordinary calls answered after it", sum(one < 60 for one in after), len(after))
    yield Value("memory added", added[0], "MiB", MEMORY_MIB)
    yield health(probe)


@case("http-connections", "without a key: 1000 connections to the HTTP port that say nothing", "-")
def connections(short: bool) -> Iterable[Value]:
    async def attack(server: Server, port: int) -> tuple[list[float], list[float]]:
        silent = [ended_after_s(port, b"", b"", 90) for _ in range(200 if short else 1000)]
        calls, *ended = await asyncio.gather(ordinary(server, port, 5), *silent)
        return calls, ended

    with attacked() as (server, port, probe, added):
        calls, ended = asyncio.run(attack(server, port))
    yield share("connections ended by the server", sum(one < 1e6 for one in ended), len(ended))
    yield Value("the last one ended after", max(ended), "s", 60)
    yield share("ordinary calls answered", sum(one < 60 for one in calls), len(calls))
    yield Value("memory added", added[0], "MiB", MEMORY_MIB)
    yield health(probe)


@case(
    "http-bodies",
    "bodies over HTTP: chunks without an end without a key and with one, gzip bombs with one",
    "-",
)
def bodies(short: bool) -> Iterable[Value]:
    limit = 2_100_000
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    bomb = gzip.compress(bytes(60 << 20))

    async def attack(server: Server, port: int) -> dict[str, list[int]]:
        key = server.keys["attacker"]
        chunked = ("transfer-encoding: chunked", "content-type: application/json")
        packed = ("content-encoding: gzip",)
        work = {
            "401": [status(port, head(CHAT, *chunked), *([chunk] * 400)) for _ in range(16)],
            "413": [
                status(port, head(CHAT, *chunked, key=key), *([chunk] * 400)) for _ in range(16)
            ],
            "415": [status(port, post(CHAT, bomb, *packed, key=key)) for _ in range(32)],
        }
        return {name: list(await asyncio.gather(*calls)) for name, calls in work.items()}

    bound = {"QWEN3VL_MAX_MESSAGE_BYTES": str(limit), "QWEN3VL_MAX_IMAGE_BYTES": "1000000"}
    with attacked(**bound) as (server, port, probe, added):
        found = asyncio.run(attack(server, port))
        after = asyncio.run(ordinary(server, port, 1))
    for name, statuses in found.items():
        right = sum(one in (0, int(name)) for one in statuses)
        yield share(f"refused with {name}, or closed", right, len(statuses))
    yield share("ordinary calls answered after it", sum(one < 60 for one in after), len(after))
    # 16 bodies of up to 2 MB wait at once, and a copy of each while it is put together.
    yield Value("memory added", added[0], "MiB", MEMORY_MIB + 2 * 16 * limit / 2**20)
    yield health(probe)


@case("http-unread", "64 streams over HTTP whose events nobody reads", "-")
def unread_events(short: bool) -> Iterable[Value]:
    count = 16 if short else 64

    @asynccontextmanager
    async def not_reading(server: Server, port: int) -> AsyncIterator[None]:
        body = json.dumps({**TEXT, "stream": True}).encode()
        request = post(CHAT, body, key=server.keys["attacker"])
        held = []
        for _ in range(count):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # little room in between
            one.connect(("127.0.0.1", port))
            one.sendall(request)
            held.append(one)
        try:
            yield
        finally:
            for one in held:
                one.close()

    async def attack(server: Server, port: int) -> list[float]:
        async with not_reading(server, port):
            return await ordinary(server, port, 2 if short else 10)

    async def stop(server: Server, port: int) -> float:
        async with not_reading(server, port):
            await asyncio.sleep(STALLED_S)
            return await asyncio.to_thread(server.stop_s)

    room = {"QWEN3VL_MAX_CONCURRENT": "128"}
    with attacked(0.0, 5000, **room) as (server, port, probe, added):
        calls = asyncio.run(attack(server, port))
    with served(0.001, 50_000, **room) as (server, port):
        stop_s = asyncio.run(stop(server, port))
    yield share("ordinary calls answered", sum(one < 60 for one in calls), len(calls))
    yield Value("from SIGTERM to the end", stop_s, "s", 15)
    yield Value("memory added", added[0], "MiB", 2 * MEMORY_MIB)
    yield health(probe)


def hostile_json() -> dict[str, bytes]:
    """Bodies of JSON that cost a careless reader its stack, its time or its meaning."""
    message = '{"model": "fake", "messages": [{"role": "user", "content": "a"}]'
    deep = 200_000
    return {
        "deep lists": b"[" * deep + b"]" * deep,
        "deep objects": b'{"a":' * deep + b"1" + b"}" * deep,
        "deep schema": f'{message}, "structured_outputs": {{"json": '.encode()
        + b'{"a":' * deep + b"1" + b"}" * deep + b"}}",
        "a number of a million digits": f'{message}, "seed": {"9" * 1_000_000}}}'.encode(),
        "a huge exponent": f'{message}, "temperature": 1e999999999}}'.encode(),
        "a huge exponent in a schema": (
            f'{message}, "response_format": {{"type": "json_schema", "json_schema": {{"name": "a", '
            '"schema": {"minimum": 1e999999999}}}}'
        ).encode(),
        "duplicate keys": f'{message}, "n": 1, "n": 2}}'.encode(),
        "not a number": f'{message}, "temperature": NaN}}'.encode(),
        "half a surrogate": b'{"model": "\\ud800", "messages": "\\udfff"}',
        "not UTF-8": b'{"model": "\xff"}',
        "many keys": json.dumps({f"k{n}": n for n in range(100_000)}).encode(),
        "many wrong messages": json.dumps({"model": "fake", "messages": [{}] * 100_000}).encode(),
    }  # fmt: skip


@case(
    "http-json",
    "JSON over HTTP: deep, with huge numbers, with keys twice, with 100,000 wrong fields",
    "-",
)
def bad_json(short: bool) -> Iterable[Value]:
    async def attack(server: Server, port: int) -> dict[str, tuple[int, float]]:
        key = server.keys["attacker"]
        found = {}
        for path in (CHAT, RUN):
            for name, body in hostile_json().items():
                begun = time.monotonic()
                answer = await status(port, post(path, body, key=key))
                found[f"{path} {name}"] = answer, time.monotonic() - begun
        return found

    with attacked() as (server, port, probe, added):
        found = asyncio.run(attack(server, port))
        traces = server.log.count("Traceback")
    wrong = {name: answer for name, (answer, _) in found.items() if answer != 400}
    if wrong:
        print(f"   not refused with 400: {wrong}")
    yield share("refused with 400", len(found) - len(wrong), len(found))
    yield Value("the slowest refusal", max(seconds for _, seconds in found.values()), "s", 5)
    yield Value("stack traces in the log", traces, "", 0)
    yield Value("memory added", added[0], "MiB", 10 * MEMORY_MIB)
    yield health(probe)


def smuggled() -> dict[str, bytes]:
    """Requests that two servers may read differently, each with a second one inside."""
    inner = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
    sized = f"content-length: {len(inner)}"
    return {
        "length and chunks": head(CHAT, sized, "transfer-encoding: chunked") + b"0\r\n\r\n" + inner,
        "two lengths": head(CHAT, sized, "content-length: 0") + inner,
        "a list of lengths": head(CHAT, f"{sized}, 0") + inner,
        "a length with a sign": head(CHAT, f"content-length: +{len(inner)}") + inner,
        "unknown encoding": head(CHAT, "transfer-encoding: xchunked", sized) + inner,
        "encoding twice": head(CHAT, "transfer-encoding: chunked", "transfer-encoding: identity")
        + b"0\r\n\r\n" + inner,
        "a blank before the colon": head(CHAT, f"content-length : {len(inner)}") + inner,
        "a folded line": head(CHAT, "x: a\r\n content-length: 0", sized) + inner,
        "a null in a header": head(CHAT, "x: a\0b", sized) + inner,
        "a chunk size with a sign": head(CHAT, "transfer-encoding: chunked") + b"+0\r\n\r\n" + inner,
        "no host": b"POST " + CHAT.encode() + b" HTTP/1.1\r\n" + sized.encode() + b"\r\n\r\n" + inner,
    }  # fmt: skip


async def responses(port: int, data: bytes, seconds: float) -> list[int]:
    """The statuses of all responses on one connection within some time."""
    async with opened(port) as (reader, writer):
        writer.write(data)
        found = b""
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            while piece := await asyncio.wait_for(reader.read(65536), seconds):
                found += piece
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", found)]


@case(
    "http-smuggling", "requests over HTTP with a second one inside, and 200 requests at once", "-"
)
def smuggling(short: bool) -> Iterable[Value]:
    async def attack(server: Server, port: int) -> tuple[dict[str, list[int]], list[int]]:
        found = {name: await responses(port, data, 1) for name, data in smuggled().items()}
        one = post(CHAT, json.dumps(TEXT).encode(), key=server.keys["ordinary"])
        return found, await responses(port, one * 200, 3)

    with attacked() as (server, port, probe, added):
        found, pipelined = asyncio.run(attack(server, port))
    twice = {name: statuses for name, statuses in found.items() if len(statuses) > 1}
    if twice:
        print(f"   more than one response: {twice}")
    yield Value("requests that were answered twice", len(twice), "", 0)
    yield share("of 200 requests at once, answered in their order", pipelined.count(200), 200)
    yield Value("memory added", added[0], "MiB", MEMORY_MIB)
    yield health(probe)


def hostile_connect() -> dict[str, tuple[bytes, ...]]:
    """Calls of Connect and gRPC-Web that are wrong, without the key of the caller."""
    streamed = "content-type: application/connect+json"
    grpc_web = "content-type: application/grpc-web+proto"
    bomb = gzip.compress(bytes(60 << 20))
    frame = struct.pack(">BI", 0, 2) + b"{}"
    chunk = b"%x\r\n%s\r\n" % (len(frame) * 5000, frame * 5000)

    def framed(flag: int, size: int, body: bytes, kind: str) -> bytes:
        data = struct.pack(">BI", flag, size) + body
        return head(STREAM, kind, f"content-length: {len(data)}") + data

    return {
        "a frame of 4 GB": (framed(0, 2**32 - 1, b"{}", streamed),),
        "a frame of 4 GB in gRPC-Web": (framed(0, 2**32 - 1, b"{}", grpc_web),),
        "a packed frame": (framed(1, len(bomb), bomb, streamed),),
        "a packed frame in gRPC-Web": (framed(1, len(bomb), bomb, grpc_web),),
        "a packed call": (post(RUN, bomb, "content-encoding: gzip"),),
        "frames without an end": (head(STREAM, streamed, "transfer-encoding: chunked"), *([chunk] * 100)),
        "an unknown flag": (framed(0x40, 2, b"{}", streamed),),
        "an unknown method": (post("/qwen3vl.v1.VisionService/Nothing", b"{}"),),
        "an image of no base64": (
            post("/qwen3vl.v1.VisionService/AnalyzeImage", b'{"images": [{"data": "%%%"}]}'),
        ),
        "a huge time limit": (post(RUN, b"{}", "connect-timeout-ms: 99999999999999999999"),),
    }  # fmt: skip


@case(
    "http-connect",
    "wrong calls of Connect and gRPC-Web: frames of 4 GB, packed, without an end",
    "-",
)
def connect(short: bool) -> Iterable[Value]:
    async def attack(server: Server, port: int) -> dict[str, tuple[int, str]]:
        found = {}
        for key in ("", server.keys["attacker"]):
            for name, (first, *rest) in hostile_connect().items():
                given = first.replace(b"host: a", f"host: a\r\nx-api-key: {key}".encode(), 1)
                answer = await status(port, given if key else first, *rest)
                found[f"{name}{' with a key' if key else ''}"] = answer, key
        return found

    with attacked() as (server, port, probe, added):
        found = asyncio.run(attack(server, port))
        after = asyncio.run(ordinary(server, port, 1))
        traces = server.log.count("Traceback")
    # Streams and gRPC-Web carry their errors under the status 200.
    broken = {name: answer for name, (answer, _) in found.items() if answer in (0, 500)}
    if broken:
        print(f"   without an answer, or a defect: {broken}")
    yield share("refused", len(found) - len(broken), len(found))
    yield share("ordinary calls answered after it", sum(one < 60 for one in after), len(after))
    yield Value("stack traces in the log", traces, "", 0)
    yield Value("memory added", added[0], "MiB", 2 * MEMORY_MIB)
    yield health(probe)


@case(
    "http-preflights",
    "2000 preflights of CORS, and 2000 calls without a key, from a page of another origin",
    "-",
)
def preflights(short: bool) -> Iterable[Value]:
    count = 200 if short else 2000
    origin = "origin: https://evil.example"
    preflight = head(CHAT, origin, "access-control-request-method: POST", method="OPTIONS")
    body = base64.b64encode(bytes(30_000))

    async def attack(server: Server, port: int) -> tuple[list[int], list[int], list[float]]:
        async def many(data: bytes) -> list[int]:
            found: list[int] = []
            for _ in range(count // 20):
                found += await asyncio.gather(*(status(port, data) for _ in range(20)))
            return found

        return tuple(  # type: ignore[return-value]
            await asyncio.gather(
                many(preflight), many(post(CHAT, body, origin)), ordinary(server, port, 2)
            )
        )

    allowed = {"QWEN3VL_HTTP_ORIGINS": "https://good.example"}
    with attacked(**allowed) as (server, port, probe, added):
        asked, called, calls = asyncio.run(attack(server, port))
    yield share("preflights refused", asked.count(400), len(asked))
    yield share("calls refused for the missing key", called.count(401), len(called))
    yield share("ordinary calls answered", sum(one < 60 for one in calls), len(calls))
    yield true("every ordinary call within 2 s", max(calls) < 2)
    yield Value("memory added", added[0], "MiB", MEMORY_MIB)
    yield health(probe)
