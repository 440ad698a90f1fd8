"""Large messages are copied one at a time, and the event loop serves others between two of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import pytest

from service import heap
from service.grpc_api import large_messages
from service.grpc_api.large_messages import LARGE_BYTES, LargeMessages
from tests.service.harness import until

LARGE = bytes(LARGE_BYTES + 1)


class Arrival:
    """Stands in for gRPC's read: waits for a message, then copies it on the event loop."""

    def __init__(self, log: list[str], name: str) -> None:
        self.arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._log, self._name = log, name

    async def read(self) -> str:
        try:
            await self.arrived
        except asyncio.CancelledError:
            self._log.append(f"{self._name} cancelled")
            raise
        time.sleep(0.01)  # noqa: ASYNC251  # a copy blocks the event loop
        self._log.append(self._name)
        return self._name


async def awaited(read: Awaitable[str]) -> str:
    return await read


async def received(messages: LargeMessages, read: Awaitable[str]) -> str:
    """A message that is not parsed."""
    with messages.next() as message:
        return await message.received(read)


async def tick(log: list[str]) -> None:
    """Stands in for the other calls of the server."""
    while True:
        log.append("tick")
        await asyncio.sleep(0.001)


@pytest.fixture
def all_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message counts as one that took long to arrive."""
    monkeypatch.setattr(large_messages, "ARRIVAL_S", -1.0)


@pytest.mark.usefixtures("all_wait")
async def test_others_are_served_between_two_large_messages() -> None:
    log: list[str] = []
    messages = LargeMessages()
    arrivals = [Arrival(log, name) for name in "abc"]
    reading = [asyncio.ensure_future(received(messages, one.read())) for one in arrivals]
    await asyncio.sleep(0)
    ticking = asyncio.create_task(tick(log))
    for one in arrivals:
        one.arrived.set_result(None)
    assert await asyncio.gather(*reading) == ["a", "b", "c"]
    ticking.cancel()
    begun, ended = log.index("a"), log.index("c")
    between = log[begun : ended + 1]
    assert [name for name in between if name != "tick"] == ["a", "b", "c"]
    assert between[1] == "tick"
    assert between[-2] == "tick"


class Blocks:
    """Stands in for ``LargeBlocks``: notes when memory is taken from it."""

    log: list[str]

    def __enter__(self) -> None:
        self.log.append("begin")

    def __exit__(self, *_: object) -> None:
        self.log.append("end")


@pytest.mark.usefixtures("all_wait")
async def test_a_large_message_is_copied_and_parsed_in_memory_that_was_used_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    monkeypatch.setattr(heap, "LargeBlocks", type("Noted", (Blocks,), {"log": log}))
    messages = LargeMessages()
    one = Arrival(log, "a")
    with messages.next() as message:
        reading = asyncio.ensure_future(awaited(message.received(one.read())))
        await asyncio.sleep(0)
        assert log == [], "nothing is copied before the message has arrived"
        one.arrived.set_result(None)
        await reading
        assert log == ["begin", "a", "end"]
        del log[:]
        await message.parsed(LARGE, lambda data: log.append("parse"))
        assert log == ["begin", "parse", "end"]
    del log[:]
    await messages.off_loop(len(LARGE), lambda: log.append("decode"))
    assert log == ["decode"], "images stay, so their memory is not used again soon"


@pytest.mark.usefixtures("all_wait")
async def test_a_message_is_finished_before_the_next_one_is_copied() -> None:
    log: list[str] = []
    messages = LargeMessages()
    arrivals = [Arrival(log, name) for name in "abc"]

    async def call(one: Arrival) -> None:
        with messages.next() as message:
            name = await message.received(one.read())
            await message.parsed(LARGE, lambda _: log.append(f"parse {name}"))
        await messages.off_loop(len(LARGE), lambda: log.append(f"decode {name}"))

    calls = [asyncio.ensure_future(call(one)) for one in arrivals]
    await asyncio.sleep(0)
    for one in arrivals:
        one.arrived.set_result(None)
    await asyncio.wait_for(asyncio.gather(*calls), 60)
    assert [log.index(f"parse {name}") - log.index(name) for name in "abc"] == [1, 1, 1]
    assert log.index("decode a") < log.index("c")
    assert not messages._turn.waiting


@pytest.mark.usefixtures("all_wait")
async def test_a_call_that_ends_between_its_steps_gives_its_turn_back() -> None:
    messages = LargeMessages()
    one = Arrival([], "a")

    async def call() -> None:
        with messages.next() as message:
            await message.received(one.read())
            await asyncio.sleep(60)

    ended = asyncio.ensure_future(call())
    await asyncio.sleep(0)
    one.arrived.set_result(None)
    await until(lambda: messages._turn.taken)
    ended.cancel()
    await asyncio.wait([ended])
    await until(lambda: not messages._turn.taken)


async def test_the_pause_is_longer_than_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(large_messages.time, "perf_counter", lambda: now)
    message = LargeMessages().next()
    for took_s, pause_s in ((0.02, 0.06), (1.0, large_messages.MAX_PAUSE_S), (0.004, 0.0)):
        message._end(now - took_s)
        assert message._pause_ends - now == pytest.approx(pause_s)


async def test_a_message_that_arrives_at_once_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(large_messages, "ARRIVAL_S", 60.0)
    messages = LargeMessages()
    await messages._turn.acquire()  # a large message has its turn, which does not end
    small = Arrival([], "small")
    small.arrived.set_result(None)
    assert await asyncio.wait_for(received(messages, small.read()), 30) == "small"


@pytest.mark.usefixtures("all_wait")
async def test_a_call_that_ends_while_its_message_waits_gives_its_turn_back() -> None:
    log: list[str] = []
    messages = LargeMessages()
    await messages._turn.acquire()
    arrivals = [Arrival(log, name) for name in "ab"]
    reading = [asyncio.ensure_future(received(messages, one.read())) for one in arrivals]
    await asyncio.sleep(0)
    for one in arrivals:
        one.arrived.set_result(None)
    await until(lambda: messages._turn.waiting == 2)
    reading[0].cancel()
    await asyncio.wait([reading[0]])
    assert log == ["a cancelled"]
    messages._turn.release()
    assert await asyncio.wait_for(reading[1], 30) == "b"
    await until(lambda: not messages._turn.taken)


async def test_a_call_that_is_cancelled_before_its_message_arrives() -> None:
    log: list[str] = []
    messages = LargeMessages()
    reading = asyncio.ensure_future(received(messages, Arrival(log, "a").read()))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    assert log == ["a cancelled"]
    assert not messages._turn.taken


async def test_work_on_a_large_message_has_its_turn_and_passes_its_error_on() -> None:
    messages = LargeMessages()

    def fail() -> None:
        assert messages._turn.taken
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await messages.off_loop(LARGE_BYTES + 1, fail)
    await until(lambda: not messages._turn.taken)
    assert await messages.off_loop(LARGE_BYTES, lambda: messages._turn.taken) is False
