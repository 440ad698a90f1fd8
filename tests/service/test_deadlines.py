"""The deadline of an await, in the form of new Pythons and in that of 3.10."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from service import deadlines as timeouts
from service.deadlines import Deadline


@pytest.fixture(params=["3.11 and newer", "3.10"], autouse=True)
def _python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "3.10":
        monkeypatch.setattr(timeouts, "sys", SimpleNamespace(version_info=(3, 10)))


class Late(Exception):
    """What a deadline raises here."""


class Work:
    """Waits for ever, and knows how it ended."""

    cancelled = False

    async def __call__(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_work_in_time_returns_its_result() -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return "done"

    assert await Deadline(5).wait(work(), Late) == "done"


async def test_late_work_is_cancelled() -> None:
    work = Work()
    with pytest.raises(Late):
        await Deadline(0.01).wait(work(), Late)
    assert work.cancelled


async def test_a_limit_that_has_passed() -> None:
    with pytest.raises(Late):
        await Deadline(-1).wait(asyncio.sleep(5), Late)


async def test_errors_of_the_work_are_raised() -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await Deadline(5).wait(work(), Late)


async def test_a_timeout_error_of_the_work_is_passed_on() -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise asyncio.TimeoutError("mine")

    with pytest.raises(asyncio.TimeoutError, match="mine"):
        await Deadline(5).wait(work(), Late)


async def test_one_deadline_spans_several_waits() -> None:
    long, short = Deadline(60), Deadline(0.01)
    await long.wait(asyncio.sleep(0.01), Late)
    assert 0 < long.left_s < 60
    for _ in range(2):
        with pytest.raises(Late):
            await short.wait(asyncio.Event().wait(), Late)
        assert short.left_s <= 0


async def test_cancelling_the_caller_cancels_the_work() -> None:
    work = Work()
    waiting = asyncio.ensure_future(Deadline(5).wait(work(), Late))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.cancelled
