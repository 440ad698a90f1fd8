"""The time limit on an await, in the form of new Pythons and in that of 3.10."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from service import deadlines as timeouts
from service.deadlines import wait_until


@pytest.fixture(params=["3.11 and newer", "3.10"], autouse=True)
def _python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "3.10":
        monkeypatch.setattr(timeouts, "sys", SimpleNamespace(version_info=(3, 10)))


def later(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


class Work:
    """Waits for ever, and knows how it ended."""

    cancelled = False

    async def __call__(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_what_is_in_time_comes_through() -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return "done"

    assert await wait_until(work(), later(5)) == "done"


async def test_what_is_late_is_cancelled() -> None:
    work = Work()
    with pytest.raises(asyncio.TimeoutError):
        await wait_until(work(), later(0.01))
    assert work.cancelled


async def test_a_limit_that_has_passed() -> None:
    with pytest.raises(asyncio.TimeoutError):
        await wait_until(asyncio.sleep(5), later(-1))


async def test_errors_come_through() -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await wait_until(work(), later(5))


async def test_the_caller_may_leave() -> None:
    work = Work()
    waiting = asyncio.ensure_future(wait_until(work(), later(5)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.cancelled
