"""Large messages are copied one at a time, and the event loop serves others between two of them."""

from __future__ import annotations

import asyncio
import time

import pytest

from service import heap
from service.grpc_api import large_messages
from service.grpc_api.large_messages import LARGE_BYTES, LargeMessages
from tests.service.harness import until


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
    reading = [asyncio.ensure_future(messages.received(one.read())) for one in arrivals]
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


@pytest.mark.usefixtures("all_wait")
async def test_a_large_message_is_copied_into_memory_that_was_used_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Blocks:
        def __enter__(self) -> None:
            log.append("begin")

        def __exit__(self, *_: object) -> None:
            log.append("end")

    monkeypatch.setattr(heap, "LargeBlocks", Blocks)
    messages = LargeMessages()
    one = Arrival(log, "a")
    reading = asyncio.ensure_future(messages.received(one.read()))
    await asyncio.sleep(0)
    assert log == [], "nothing is copied before the message has arrived"
    one.arrived.set_result(None)
    await reading
    assert log == ["begin", "a", "end"]


async def test_a_message_that_arrives_at_once_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(large_messages, "ARRIVAL_S", 60.0)
    messages = LargeMessages()
    await messages._turn.acquire()  # a large message has its turn, which does not end
    small = Arrival([], "small")
    small.arrived.set_result(None)
    assert await asyncio.wait_for(messages.received(small.read()), 30) == "small"


@pytest.mark.usefixtures("all_wait")
async def test_a_call_that_ends_while_its_message_waits_gives_its_turn_back() -> None:
    log: list[str] = []
    messages = LargeMessages()
    await messages._turn.acquire()
    arrivals = [Arrival(log, name) for name in "ab"]
    reading = [asyncio.ensure_future(messages.received(one.read())) for one in arrivals]
    await asyncio.sleep(0)
    for one in arrivals:
        one.arrived.set_result(None)
    await until(lambda: len(messages._turn._waiters or ()) == 2)
    reading[0].cancel()
    await asyncio.wait([reading[0]])
    assert log == ["a cancelled"]
    messages._turn.release()
    assert await asyncio.wait_for(reading[1], 30) == "b"
    await until(lambda: not messages._turn.locked())


async def test_a_call_that_is_cancelled_before_its_message_arrives() -> None:
    log: list[str] = []
    messages = LargeMessages()
    reading = asyncio.ensure_future(messages.received(Arrival(log, "a").read()))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    assert log == ["a cancelled"]
    assert not messages._turn.locked()


async def test_work_on_a_large_message_has_its_turn_and_passes_its_error_on() -> None:
    messages = LargeMessages()

    def fail() -> None:
        assert messages._turn.locked()
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await messages.off_loop(LARGE_BYTES + 1, fail)
    await until(lambda: not messages._turn.locked())
    assert await messages.off_loop(LARGE_BYTES, lambda: messages._turn.locked()) is False
