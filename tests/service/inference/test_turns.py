"""Turns of callers: who is next, and that no place is lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from service.inference.turns import Turns


async def test_a_caller_with_many_waiting_images_does_not_delay_another() -> None:
    turns, order, gate = Turns(1), [], asyncio.Event()

    async def take(name: str) -> None:
        async with turns.turn(name[0]):
            await gate.wait()
            order.append(name)

    tasks = [asyncio.create_task(take(name)) for name in ("a1", "a2", "a3", "a4", "b1", "c1")]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["a1", "b1", "c1", "a2", "a3", "a4"]


@pytest.mark.parametrize("seed", range(3))
async def test_no_place_is_lost_or_made(seed: int) -> None:
    rng, turns, inside, most = random.Random(seed), Turns(3), 0, 0

    async def take() -> None:
        nonlocal inside, most
        async with turns.turn(rng.choice("abc")):
            inside += 1
            most = max(most, inside)
            try:
                await asyncio.sleep(rng.random() * 0.001)
            finally:
                inside -= 1

    tasks = []
    for _ in range(300):
        tasks.append(asyncio.create_task(take()))
        if rng.random() < 0.4:
            rng.choice(tasks).cancel()
        if rng.random() < 0.3:
            await asyncio.sleep(0)
    for task in rng.sample(tasks, 20):
        task.cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert most == 3
    async with turns.turn("a"), turns.turn("a"), turns.turn("b"):  # all places are there again
        late = asyncio.create_task(take())
        await asyncio.sleep(0)
        assert not late.done()
        late.cancel()
    await asyncio.gather(late, return_exceptions=True)
