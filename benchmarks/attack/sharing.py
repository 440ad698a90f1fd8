"""One caller against the others: floods, retries, heavy schemas; and what fairness costs an ordinary call."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks.attack.case import Value, case, health, share, true
from benchmarks.attack.flood import flooding
from benchmarks.attack.images import DRAWING, request
from benchmarks.attack.probe import probing
from benchmarks.attack.servers import Server, channel_to, paced, serving, text_request
from service.client import read_error
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub

BASELINE = "ATTACK_BASELINE"
"""Environment variable with the folder of an older checkout, whose calls are timed beside ours."""


@dataclass
class Seen:
    """What callers of one kind saw. seconds: of answered calls; refusals: reason -> how many."""

    seconds: list[float] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("inf")


async def callers(
    server: Server, name: str, count: int, message: pb.RunTaskRequest, seconds: float
) -> Seen:
    """Callers in a closed loop that wait as RetryInfo says; a call that is open at the end is dropped."""
    seen = Seen()
    end = time.monotonic() + seconds

    async def one(stub: Any) -> None:
        while time.monotonic() < end:
            begun = time.monotonic()
            try:
                await stub.RunTask(message, metadata=server.metadata(name), timeout=120)
                seen.seconds.append(time.monotonic() - begun)
            except grpc.aio.AioRpcError as error:
                found = read_error(error)
                reason = found.reason or error.code().name
                seen.refusals[reason] = seen.refusals.get(reason, 0) + 1
                await asyncio.sleep(found.retry_after_s or 0.1)

    async with channel_to(server) as channel:
        stub = VisionServiceStub(channel)
        tasks = [asyncio.create_task(one(stub)) for _ in range(count)]
        try:
            await asyncio.wait(tasks, timeout=seconds)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return seen


@case(
    "flood",
    "one key keeps 330 long calls open; another key makes 12 calls at once",
    "12 of 12 OVERLOADED",
)
def flood(short: bool) -> Iterable[Value]:
    long = text_request("Long.", regex="[a-z]{300}")
    with serving(keys=True) as server, probing(server.address) as probe:
        asyncio.run(callers(server, "ordinary", 1, text_request(regex="[a-z]{20}"), 1))
        found = asyncio.run(_flooded(server, long, 12))
    answered = [one for one in found if one is not None]
    yield share("calls of the other key answered", len(answered), 12)
    if answered:
        yield Value("the slowest of them", max(answered), "s")
    yield health(probe)


async def _flooded(server: Server, long: pb.RunTaskRequest, count: int) -> list[float | None]:
    attack = asyncio.create_task(callers(server, "attacker", 330, long, 600))
    await asyncio.sleep(3)

    async def one(stub: Any) -> float | None:
        begun = time.monotonic()
        try:
            message = text_request(regex="[a-z]{20}")
            await stub.RunTask(message, metadata=server.metadata(), timeout=120)
        except grpc.aio.AioRpcError:
            return None
        return time.monotonic() - begun

    async with channel_to(server) as channel:
        stub = VisionServiceStub(channel)
        found = await asyncio.gather(*(one(stub) for _ in range(count)))
    attack.cancel()
    await asyncio.gather(attack, return_exceptions=True)
    return list(found)


SHARE = 4
"""Calls at the same time that the quota of each key allows."""
ROUNDS = 3
"""In each the first key is alone, beside 4 callers of the other, and beside 40."""


@case(
    "ten-times-its-share",
    "two keys with a quota of 4 calls at the same time: one has 4 callers, the other 40",
    "the first is refused",
)
def ten_times(short: bool) -> Iterable[Value]:
    seconds = 3 if short else 4
    message = request(DRAWING.read_bytes(), choice=False)
    message.task.inline.grammar.regex = "[a-z]{40}"
    quota = ("--key-concurrent", str(SHARE))
    with serving(*quota, keys=True) as server, probing(server.address) as probe:
        asyncio.run(callers(server, "ordinary", SHARE, message, 2))
        alone: list[float] = []
        beside: dict[int, list[float]] = {SHARE: [], 10 * SHARE: []}
        refused: Counter[str] = Counter()
        for _ in range(1 if short else ROUNDS):
            alone += asyncio.run(callers(server, "ordinary", SHARE, message, seconds)).seconds
            for count, waits in beside.items():
                with flooding(server, "attacker", count, message, seconds + 1) as other:
                    time.sleep(0.5)  # until it has its share
                    seen = asyncio.run(callers(server, "ordinary", SHARE, message, seconds))
                waits += seen.seconds
                refused.update(seen.refusals)
    p50 = statistics.median(alone)
    share_p50, flood_p50 = (statistics.median(waits) for waits in beside.values())
    yield Value("p50 of the first, times its p50 alone", flood_p50 / p50, "×", 2)
    yield Value("the same where the other has 4 callers, its share", share_p50 / p50, "×")
    yield Value("p50 of the first alone", p50 * 1e3, "ms")
    yield Value("refusals of the first", refused.total(), "", 0)
    yield true("the other is refused for its quota", "QUOTA_EXCEEDED" in other["refusals"])
    yield health(probe)


@case(
    "retries",
    "500 callers that wait as RetryInfo says, beside 64 (an engine that answers 25 calls a second)",
    "0.67× the answers; 14,023 refusals",
)
def retries(short: bool) -> Iterable[Value]:
    seconds = 8 if short else 30
    rates, refused = {}, 0
    for count in (64, 500):
        slots = {"QWEN3VL_MAX_CONCURRENT": "64"}
        with paced(0.16, 16, environment=slots) as server, probing(server.address) as probe:
            seen = asyncio.run(callers(server, "", count, text_request(), seconds))
        rates[count] = len(seen.seconds)
        refused = sum(seen.refusals.values())
    yield Value("answers with 500 callers, beside 64", rates[500] / rates[64], "×", 0.95, True)
    yield Value(f"refusals in {seconds} s", refused, "", 1500)
    yield health(probe)


def heavy(number: int) -> str:
    """A schema of about 200 KB, unlike all others, that takes a while to analyse."""
    values = [f"{number}-{index}-{index * 7919 % 10007}" for index in range(11_000)]
    return json.dumps({"enum": values})


@case(
    "heavy-schemas",
    "40 new schemas of 200 KB of one key; then a small new one of another",
    "11.7 s for the small one",
)
def heavy_schemas(short: bool) -> Iterable[Value]:
    with serving(engine="fake", keys=True) as server, probing(server.address) as probe:
        took = asyncio.run(_small_beside_heavy(server, 10 if short else 40))
    yield Value("the new schema of the other key", took, "s", 2)
    yield health(probe)


async def _small_beside_heavy(server: Server, count: int) -> float:
    async with channel_to(server) as first, channel_to(server) as second:
        stub: Any = VisionServiceStub(first)
        attack = [
            asyncio.ensure_future(
                stub.ValidateSchema(
                    pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=heavy(number))),
                    metadata=server.metadata("attacker"),
                    timeout=120,
                )
            )
            for number in range(count)
        ]
        await asyncio.sleep(0.5)
        grammar = pb.Grammar(json_schema='{"type": "object", "properties": {"a": {}}}')
        begun = time.monotonic()
        other: Any = VisionServiceStub(second)
        await other.ValidateSchema(
            pb.ValidateSchemaRequest(grammar=grammar), metadata=server.metadata(), timeout=120
        )
        took = time.monotonic() - begun
        for call in attack:
            call.cancel()
        await asyncio.gather(*attack, return_exceptions=True)
    return took


@case(
    "ordinary-call",
    "no attack: a text call with keys, quotas and metrics, beside one without them",
    "0.63 ms",
)
def ordinary_call(short: bool) -> Iterable[Value]:
    """With ``ATTACK_BASELINE``: beside the server of an older checkout with the same settings."""
    rounds, calls = (3, 100) if short else (9, 400)
    with ExitStack() as stack:
        servers = {"plain": stack.enter_context(serving(engine="fake"))}
        guarded = ("--admin-port", "0")
        servers["guarded"] = stack.enter_context(serving(*guarded, engine="fake", keys=True))
        quotas = " concurrent=50 requests_per_minute=10000000\n"
        keys_file = servers["guarded"].keys_file
        keys_file.write_text(keys_file.read_text().replace("\n", quotas))
        servers["guarded"].hang_up()
        if folder := os.environ.get(BASELINE):
            older = {"PYTHONPATH": f"{folder}:{Path(folder) / 'clients' / 'python'}"}
            servers["older"] = stack.enter_context(
                serving(
                    "--metrics-port",
                    "0",
                    engine="fake",
                    keys=True,
                    environment=older,
                    root=Path(folder),
                )
            )
        found = asyncio.run(_timed(servers, rounds, calls))
    medians = {name: statistics.median(seconds) * 1e3 for name, seconds in found.items()}
    for name, value in medians.items():
        yield Value(f"p50, {name}", value, "ms")
    yield Value("p50 guarded, over plain", medians["guarded"] / medians["plain"], "×")
    beside = "older" if "older" in medians else "plain"
    yield Value(f"p50 guarded, beside {beside}", medians["guarded"] / medians[beside], "×", 1.08)


async def _timed(servers: dict[str, Server], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds of calls, one at a time; the servers take turns, the first round does not count."""
    found: dict[str, list[float]] = {name: [] for name in servers}
    message = text_request()
    async with channels(servers) as stubs:
        for number in range(rounds + 1):
            order = list(servers) if number % 2 else list(reversed(servers))
            for name in order:
                for _ in range(calls):
                    begun = time.perf_counter()
                    await stubs[name].RunTask(message, metadata=servers[name].metadata())
                    if number:
                        found[name].append(time.perf_counter() - begun)
    return found


class channels:
    """A stub for each server, while the body runs."""

    def __init__(self, servers: dict[str, Server]) -> None:
        self._channels = {name: channel_to(server) for name, server in servers.items()}

    async def __aenter__(self) -> dict[str, Any]:
        return {name: VisionServiceStub(one) for name, one in self._channels.items()}

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels.values():
            await channel.close()
