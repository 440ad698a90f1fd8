"""Attacks on connections: nobody reads, nobody sends, everything is compressed, too many at once."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Iterable
from typing import Any

import grpc

from benchmarks.attack.case import Value, case, health, share, true
from benchmarks.attack.probe import probing
from benchmarks.attack.servers import channel_to, paced, serving, text_request
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.attacks import bombs, keyless, leftovers, unread, withheld
from tests.attacks.servers import Target

MEMORY_WITHOUT_A_KEY_MIB = 30.0
TRACEBACK = "Traceback (most recent call last)"


def _target(server: Any) -> Target:
    key = server.keys.get("ordinary")
    return Target("127.0.0.1", server.port, key, server.process)


@case("no-attack", "nothing, for comparison: only the health check is asked", "-")
def no_attack(short: bool) -> Iterable[Value]:
    with paced(0.0, 1) as server, probing(server.address) as probe:
        time.sleep(1 if short else 5)
    yield health(probe)


@case(
    "unread",
    "64 StreamTask calls with an HTTP/2 window of 0",
    "nobody else served; SIGTERM took 32 s",
)
def unread_streams(short: bool) -> Iterable[Value]:
    with paced(0.001, 16) as server:
        with probing(server.address) as probe:
            seen = asyncio.run(unread.attack(_target(server), 64, 2 if short else 20))
        stop_s = asyncio.run(_stop_with_unread_streams(server))
    yield share("ordinary calls answered within 2 s", seen.answered, seen.tried)
    yield Value("from SIGTERM to the end", stop_s, "s", 10)
    yield health(probe)


async def _stop_with_unread_streams(server: Any) -> float:
    connection, _ = await unread.open_unread("127.0.0.1", server.port, 64)
    await asyncio.sleep(1)
    seconds = await asyncio.to_thread(server.stop_s)
    await connection.close()
    return float(seconds)


@case(
    "bombs",
    "without a key: gzip messages of 65 KB that unpack to 63 MB, 8 senders",
    "+2.1 GB; health p50 438 ms",
)
def gzip_bombs(short: bool) -> Iterable[Value]:
    with paced(0.0, 1, keys=True) as server, probing(server.address) as probe:
        seen = asyncio.run(bombs.attack(_target(server), 8, 2 if short else 10))
    yield Value("memory added", seen.peak_mib - seen.before_mib, "MiB", MEMORY_WITHOUT_A_KEY_MIB)
    yield Value("slowest call with a key", max(seen.seconds), "s", 1)
    yield health(probe)


@case(
    "withheld",
    "without a key: 60 requests of 60 MB whose last byte never comes",
    "+3.3 GB, never freed",
)
def withheld_bytes(short: bool) -> Iterable[Value]:
    path = b"/qwen3vl.v1.VisionService/RunTask"
    with paced(0.0, 1, keys=True) as server, probing(server.address) as probe:
        attack = withheld.attack(_target(server), 60, 60 << 20, 3 if short else 10, path)
        seen = asyncio.run(attack)
    yield Value("memory added", seen.peak_mib - seen.before_mib, "MiB", MEMORY_WITHOUT_A_KEY_MIB)
    yield share("calls ended by the server", seen.ended, 60)
    yield health(probe)


@case(
    "keyless",
    "4,000 calls without a key at once, each with a body, again and again; then calls of all methods",
    "+71 MiB",
)
def calls_without_a_key(short: bool) -> Iterable[Value]:
    seconds, streams = (1, 100) if short else (5, 500)
    with paced(0.0, 1, keys=True) as server, probing(server.address) as probe:
        seen = asyncio.run(keyless.attack(_target(server), 8, streams, seconds))
    yield Value("memory added", seen.peak_mib - seen.before_mib, "MiB", MEMORY_WITHOUT_A_KEY_MIB)
    yield share("calls ended by the server", seen.ended, seen.calls)
    yield health(probe)
    with paced(0.0, 1, keys=True) as server:
        attack = keyless.attack(_target(server), 8, streams, seconds, keyless.EVERY_METHOD)
        seen = asyncio.run(attack)
    yield Value("memory added, calls of all methods", seen.peak_mib - seen.before_mib, "MiB")


@case(
    "leftovers",
    "calls with 4 images of 4 megapixels that fail, without garbage collection",
    "46 MiB decoded each, all kept: up to 366 MB a call",
)
def failed_calls(short: bool) -> Iterable[Value]:
    calls = 5 if short else 20
    grown = asyncio.run(leftovers.growth_mib(calls, 4, 2000))
    yield Value("memory kept of each failed call", max(grown, 0.0) / calls, "MiB", 5)


@case(
    "descriptors",
    "120 idle connections to a server with 64 file descriptors",
    "new callers hang, no line in the log",
)
def idle_connections(short: bool) -> Iterable[Value]:
    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    with serving(engine="fake", preexec=few_descriptors) as server:
        held = []
        try:
            for _ in range(120):
                one = socket.create_connection(("127.0.0.1", server.port), timeout=5)
                held.append(one)
            again = asyncio.run(_answered_within(server, 3))
            warnings = [line for line in server.log.splitlines() if "level=warning" in line]
            said = any("connections" in line for line in warnings)
        finally:
            for one in held:
                one.close()
        after = asyncio.run(_answered_within(server, 10))
    yield true("a new caller is answered, or the log warns", again or said)
    yield true("answered when the connections are gone", after)


async def _answered_within(server: Any, limit_s: float) -> bool:
    async with channel_to(server) as channel:
        stub: Any = VisionServiceStub(channel)
        try:
            await stub.RunTask(text_request(), timeout=limit_s, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return False
    return True


@case(
    "races",
    "400 calls whose deadline ends when that of the server does",
    "stack traces in the log",
)
def racing_deadlines(short: bool) -> Iterable[Value]:
    limits = {"QWEN3VL_INFERENCE_TIMEOUT_S": "0.15", "QWEN3VL_MAX_CONCURRENT": "256"}
    with paced(0.01, 20, environment=limits) as server:
        for _ in range(1 if short else 4):
            asyncio.run(_race(server))
        text = server.log
    yield Value("stack traces in the log", text.count(TRACEBACK), "", 0)


async def _race(server: Any) -> None:
    async with channel_to(server) as channel:
        stub: Any = VisionServiceStub(channel)
        stream = pb.StreamTaskRequest(task=text_request().task)
        calls: list[Any] = []
        for number in range(100):
            limit_s = 0.145 + 0.0001 * number
            calls.append(stub.RunTask(text_request(), timeout=limit_s).code())
            calls.append(stub.StreamTask(stream, timeout=limit_s).code())
        await asyncio.gather(*calls)
