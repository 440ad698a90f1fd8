"""The timers of answers that nobody reads, which all front ends share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from service import unread
from service.lifecycle import Lifecycle, Phase
from service.unread import Answer
from tests.service.harness import until

GRACE_S = 200.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "STALL_S", 0.01)
    monkeypatch.setattr(unread, "DROP_AFTER_S", 0.01)


@asynccontextmanager
async def in_flight() -> AsyncIterator[tuple[Lifecycle, Answer]]:
    """A call that never ends by itself, and its answer."""
    lifecycle = Lifecycle()
    lifecycle.phase = Phase.SERVING
    call = asyncio.create_task(asyncio.Event().wait())
    lifecycle.enter(call)
    answer = Answer(lifecycle, call)
    try:
        yield lifecycle, answer
    finally:
        answer.close()
        call.cancel()
        await asyncio.wait([call])


async def drained(lifecycle: Lifecycle, *, within_s: float) -> bool:
    """Whether a drain ends so soon, before its grace period."""
    draining = asyncio.create_task(lifecycle.drain(GRACE_S))
    await asyncio.wait([draining], timeout=within_s)
    ended = draining.done()
    draining.cancel()
    await asyncio.wait([draining])
    return ended


async def test_a_drain_does_not_wait_for_what_nobody_reads() -> None:
    async with in_flight() as (lifecycle, answer):
        answer.waits()
        await until(lambda: answer.stalled)
        assert await drained(lifecycle, within_s=60)


async def test_a_drain_waits_for_a_reader_who_goes_on_reading() -> None:
    async with in_flight() as (lifecycle, answer):
        answer.waits()
        await until(lambda: answer.stalled)
        answer.read()
        assert not answer.stalled
        assert not await drained(lifecycle, within_s=0.1)


async def test_what_was_read_in_time_never_stalls() -> None:
    async with in_flight() as (_, answer):
        answer.waits()
        answer.read()
        await asyncio.sleep(0.05)
        assert not answer.stalled


async def test_the_first_message_that_waits_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that sends pings to a caller who does not read them stalls all the same."""
    monkeypatch.setattr(unread, "STALL_S", 0.05)
    async with in_flight() as (_, answer):
        for _ in range(20):
            answer.waits()
            await asyncio.sleep(0.01)
        assert answer.stalled


async def test_a_call_is_dropped_after_its_limit() -> None:
    async with in_flight() as (_, answer):
        dropped: list[bool] = []
        answer.drop_in(0.01, lambda: dropped.append(answer.dropped))
        await until(lambda: bool(dropped))
        assert dropped == [True]


Step = Callable[[Answer], None]


@pytest.mark.parametrize(
    "end",
    [Answer.keep, Answer.close, lambda answer: answer.drop_in(GRACE_S, lambda: None)],
    ids=["kept", "closed", "a new limit"],
)
async def test_a_limit_ends_with(end: Step) -> None:
    async with in_flight() as (_, answer):
        answer.drop_in(0.01, lambda: None)
        answer.waits()
        answer.read()
        end(answer)
        await asyncio.sleep(0.05)
        assert not answer.dropped
