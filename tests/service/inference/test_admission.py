"""Places and the queue: order, limits, time-outs and cancellation, without a server."""

from __future__ import annotations

import asyncio

import pytest

from service.deadlines import Deadline
from service.errors import InferenceTimeout, Overloaded
from service.inference.admission import RETRY_MAX_S, RETRY_MIN_S, Admission, jitter
from service.quotas import ANONYMOUS


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Holder:
    """Calls that hold a place until they are told to go."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    def start(self, name: str, within_s: float = 60.0) -> asyncio.Task[None]:
        self.gates[name] = asyncio.Event()
        return asyncio.create_task(self._hold(name, Deadline(within_s)))

    async def _hold(self, name: str, deadline: Deadline) -> None:
        async with self.admission.slot(deadline):
            self.order.append(name)
            await self.gates[name].wait()


async def test_first_come_first_served() -> None:
    admission = Admission(max_concurrent=1, max_queue=3)
    holder = Holder(admission)
    calls = [holder.start(name) for name in "abcd"]
    await settle()
    assert (admission.active, admission.waiting, holder.order) == (1, 3, ["a"])
    for name in "abcd":
        holder.gates[name].set()
    await asyncio.gather(*calls)
    assert holder.order == ["a", "b", "c", "d"]
    assert (admission.active, admission.waiting) == (0, 0)


async def test_the_time_to_return_follows_how_long_calls_take() -> None:
    admission = Admission(max_concurrent=1, max_queue=1)
    assert 0.75 <= admission.retry_after_s <= 1.25  # a guess, before any call has ended
    for _ in range(10_000):  # many: a pause of the machine counts as a long call
        async with admission.slot(Deadline(60)):
            pass
        if admission.retry_after_s < 0.29:
            break
    # Each reading has a random factor of 0.75 to 1.25.
    assert RETRY_MIN_S <= admission.retry_after_s < 0.29 / 0.75 * 1.25


@pytest.mark.parametrize(("mean_s", "extreme_s"), [(0.0, RETRY_MIN_S), (1e6, RETRY_MAX_S)])
@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_times_to_return_are_spread_within_their_bounds(
    mean_s: float, extreme_s: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jitter, "uniform", lambda low, high: {0.75: low, 1.25: high}[factor])
    admission = Admission(max_concurrent=1, max_queue=1)
    monkeypatch.setattr(admission, "_mean_s", mean_s)
    told_s = admission.retry_after_s
    assert RETRY_MIN_S <= told_s <= RETRY_MAX_S
    assert (told_s == pytest.approx(extreme_s)) == ((mean_s > 1) == (factor > 1))


async def test_full_queue_is_refused_with_a_time_to_return() -> None:
    holder = Holder(Admission(max_concurrent=1, max_queue=1))
    calls = [holder.start("a"), holder.start("b")]
    await settle()
    with pytest.raises(Overloaded) as refused:
        await holder.start("c")
    assert 0.1 <= refused.value.retry_after_s <= 60
    holder.gates["a"].set()
    holder.gates["b"].set()
    await asyncio.gather(*calls)


async def test_no_queue_at_all() -> None:
    admission = Admission(max_concurrent=1, max_queue=0)
    async with admission.slot(Deadline(1)):
        with pytest.raises(Overloaded):
            async with admission.slot(Deadline(1)):
                pass
    async with admission.slot(Deadline(1)):
        assert admission.active == 1


async def test_time_over_in_the_queue() -> None:
    admission = Admission(max_concurrent=1, max_queue=2)
    holder = Holder(admission)
    first, second = holder.start("a"), holder.start("b", within_s=0.01)
    with pytest.raises(InferenceTimeout):
        await second
    assert admission.waiting == 0
    holder.gates["a"].set()
    await first
    assert (holder.order, admission.active) == (["a"], 0)


async def test_cancelled_in_the_queue_gives_its_turn_to_the_next() -> None:
    admission = Admission(max_concurrent=1, max_queue=2)
    holder = Holder(admission)
    first, second, third = (holder.start(name) for name in "abc")
    await settle()
    second.cancel()
    await settle()
    holder.gates["a"].set()
    holder.gates["c"].set()
    await asyncio.gather(first, third)
    assert second.cancelled()
    assert (holder.order, admission.active) == (["a", "c"], 0)


async def test_cancelled_in_the_turn_in_which_its_place_is_given() -> None:
    admission = Admission(max_concurrent=1, max_queue=2)
    holder = Holder(admission)
    first, second, third = (holder.start(name) for name in "abc")
    await settle()
    holder.gates["a"].set()
    first.add_done_callback(lambda _: second.cancel())  # its place is given, it has not run yet
    holder.gates["c"].set()
    await asyncio.gather(first, third)
    await asyncio.gather(second, return_exceptions=True)
    assert (holder.order[0], holder.order[-1]) == ("a", "c")
    assert (admission.active, admission.waiting) == (0, 0)


async def test_expired_and_cancelled_in_the_same_turn_frees_nothing_twice() -> None:
    admission = Admission(max_concurrent=1, max_queue=1)
    holder = Holder(admission)
    first, second = holder.start("a"), holder.start("b", within_s=60)
    await settle()
    place = admission._queue._waiting[ANONYMOUS.name].items[0]
    admission._expire(place, ANONYMOUS)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert (admission.active, admission.waiting) == (1, 0)
    holder.gates["a"].set()
    await first
    assert admission.active == 0


async def test_a_failing_call_gives_its_place_back() -> None:
    admission = Admission(max_concurrent=1, max_queue=0)
    with pytest.raises(ZeroDivisionError):
        async with admission.slot(Deadline(1)):
            raise ZeroDivisionError
    assert admission.active == 0
