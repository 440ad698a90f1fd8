"""The budget of memory: who waits, who passes, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
from contextlib import AsyncExitStack

import pytest

from service.deadlines import Deadline
from service.errors import InferenceTimeout, Overloaded
from service.inference.memory import MemoryBudget


async def holder(budget: MemoryBudget, amount: int) -> tuple[asyncio.Task[None], asyncio.Event]:
    """A task that holds an amount until its event is set, as far as it got in one turn."""
    release = asyncio.Event()

    async def hold() -> None:
        async with budget.hold(amount):
            await release.wait()

    task = asyncio.create_task(hold())
    await asyncio.sleep(0)
    return task, release


async def test_small_amounts_pass_large_ones_that_wait() -> None:
    budget = MemoryBudget(80)
    first, release = await holder(budget, 60)
    second, _ = await holder(budget, 20)
    assert (budget.held, budget.waiting) == (60, 20)
    async with budget.hold(10), budget.hold(10):
        assert budget.held == 80
    release.set()
    await first
    assert (budget.held, budget.waiting) == (20, 0)
    second.cancel()


async def test_large_amounts_are_not_starved_by_small_ones() -> None:
    """While a large amount waits, small ones get nothing beyond their own quarter."""
    budget = MemoryBudget(80)
    async with AsyncExitStack() as small:
        first = AsyncExitStack()
        await first.enter_async_context(budget.hold(10))
        for _ in range(7):  # without a large one they may take everything
            await small.enter_async_context(budget.hold(10))
        large, release = await holder(budget, 60)
        late, late_release = await holder(budget, 10)
        assert budget.waiting == 70
        async with first:
            assert budget.held == 80
        assert (budget.held, budget.waiting) == (70, 70), "the room is kept for the large one"
    await asyncio.sleep(0)
    assert (budget.held, budget.waiting) == (70, 0)
    release.set()
    late_release.set()
    await asyncio.gather(large, late)
    assert budget.held == 0


async def test_more_than_the_budget_is_held_alone() -> None:
    budget = MemoryBudget(80)
    huge, release = await holder(budget, 1000)
    assert budget.held == 1000
    other, other_release = await holder(budget, 1000)
    assert budget.waiting == 1000
    async with budget.hold(10):
        release.set()
        await huge
        await asyncio.sleep(0)
    assert budget.held == 1000
    other_release.set()
    await other


async def test_waiting_amounts_are_limited_by_bytes_and_deadline() -> None:
    budget = MemoryBudget(80, max_waiting=50)
    async with budget.hold(60):
        waiting, _ = await holder(budget, 40)
        with pytest.raises(Overloaded) as caught:
            async with budget.hold(20):
                pass
        assert caught.value.retry_after_s > 0
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert budget.waiting == 0
        with pytest.raises(InferenceTimeout):
            async with budget.hold(20, Deadline(0.01)):
                pass
        assert budget.waiting == 0
    assert budget.held == 0


async def test_the_budget_is_fully_released_in_the_end() -> None:
    rng = random.Random(3)
    budget = MemoryBudget(100)

    async def one() -> None:
        deadline = Deadline(rng.random() * 0.02) if rng.random() < 0.3 else None
        with contextlib.suppress(InferenceTimeout):
            async with budget.hold(rng.choice([1, 5, 12, 13, 60, 90, 300]), deadline):
                assert budget.held <= 400
                await asyncio.sleep(rng.random() * 0.002)

    tasks = []
    for _ in range(300):
        tasks.append(asyncio.create_task(one()))
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        if rng.random() < 0.2:
            await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert budget.held == budget.waiting == 0


async def test_callers_take_turns_in_their_wait_for_memory() -> None:
    budget, order = MemoryBudget(80), []

    async def hold(name: str) -> None:
        async with budget.hold(60, caller=name[0]):
            order.append(name)
            await asyncio.sleep(0)

    async with budget.hold(60):
        tasks = [asyncio.create_task(hold(name)) for name in ("a1", "a2", "a3", "b1")]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order == ["a1", "b1", "a2", "a3"]
    assert budget.held == budget.waiting == 0


async def test_what_waits_makes_room_for_a_caller_with_less() -> None:
    budget = MemoryBudget(80, max_waiting=60)

    async def hold(name: str) -> str:
        try:
            async with budget.hold(20, caller=name[0]):
                return name
        except Overloaded:
            return f"{name} refused"

    async with budget.hold(60):
        tasks = [asyncio.create_task(hold(name)) for name in ("a1", "a2", "a3", "a4", "b1", "b2")]
        for _ in range(3):
            await asyncio.sleep(0)
        assert budget.waiting == 60
    found = await asyncio.gather(*tasks)
    assert found == ["a1", "a2", "a3 refused", "a4 refused", "b1", "b2 refused"]
    assert budget.held == budget.waiting == 0


async def test_nothing_that_waits_makes_room_in_vain() -> None:
    """Only the newest amount of the other caller would make room, which is not enough."""
    budget, refused = MemoryBudget(80, max_waiting=60), []

    async def hold(name: str, amount: int) -> None:
        try:
            async with budget.hold(amount, caller=name[0]):
                pass
        except Overloaded:
            refused.append(name)

    async with budget.hold(60):
        waiting = [asyncio.create_task(hold(name, 20)) for name in ("a1", "a2", "a3")]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            async with budget.hold(60, caller="b"):
                pass
        assert budget.waiting == 60
        await hold("a4", 20)
        await asyncio.create_task(asyncio.sleep(0))
        assert refused == ["a4"]
    await asyncio.gather(*waiting)
    assert refused == ["a4"]
    assert budget.held == budget.waiting == 0
