"""Replicas that are lost, and deployments that several servers share."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from service.engine import Engine
from service.engines.ray import RayEngine
from service.errors import EngineUnavailable
from service.types import Chunk, GenerateRequest, Sampling
from tests.service.engines.conformance import collect, generate
from tests.service.engines.ray.clusters import START_S, busy, on_ray
from tests.service.engines.ray.talking import BEGIN, HOLD, PROCESS, TalkingEngine, broken

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def request(text: str) -> GenerateRequest:
    return GenerateRequest("test", text, sampling=Sampling(max_tokens=1000))


async def said(engine: Engine, text: str) -> str:
    return "".join(chunk.text for chunk in await collect(engine, request(text)))


async def rest_of(stream: AsyncIterator[Chunk]) -> list[Chunk]:
    return [chunk async for chunk in stream]


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that Ray does, on a machine that may be busy."""
    end = time.monotonic() + START_S
    while not await condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.05)


async def healthy(engine: Engine) -> bool:
    try:
        await engine.check_health()
    except EngineUnavailable as error:
        return error.reason != "ENGINE_UNHEALTHY"
    return True


async def with_replicas(engine: RayEngine, count: int) -> None:
    """Wait until so many replicas take requests."""

    async def there() -> bool:
        await healthy(engine)
        return engine.capabilities.details["replicas"] == str(count)

    await eventually(there)


async def is_deployed(engine: RayEngine) -> bool:
    from ray import serve

    return engine._plan.name in await asyncio.to_thread(lambda: serve.status().applications)


async def test_a_lost_replica(tmp_path: Path) -> None:
    """Requests that had sent nothing run again; those that had sent text end with an error."""
    engine = on_ray(TalkingEngine, replicas=2)
    await engine.start()
    try:
        await with_replicas(engine, 2)

        async def both_answer() -> bool:
            return len({await said(engine, PROCESS) for _ in range(8)}) == 2

        await eventually(both_answer)
        flag = tmp_path / "go"
        streams: list[AsyncGenerator[Chunk, None]] = []
        processes: list[int] = []

        async def both_have_streams() -> bool:
            """One more stream. Ray may give requests that come at once to the same replica."""
            streams.append(generate(engine, request(f"{BEGIN} {flag}")))
            processes.append(int((await anext(streams[-1])).text))
            return len(streams) >= 8 and len(set(processes)) == 2

        await eventually(both_have_streams)
        held = [asyncio.ensure_future(said(engine, f"{HOLD} {flag}")) for _ in range(8)]

        async def all_there() -> bool:
            return busy(engine) == len(streams) + len(held)

        await eventually(all_there)

        os.kill(processes[0], signal.SIGKILL)
        for process, stream in zip(processes, streams, strict=True):
            if process == processes[0]:
                async with aclosing(stream):
                    with pytest.raises(EngineUnavailable) as raised:
                        await rest_of(stream)
                assert raised.value.reason == "REPLICA_LOST"
        flag.touch()
        for process, stream in zip(processes, streams, strict=True):
            if process != processes[0]:
                async with aclosing(stream):
                    assert (await rest_of(stream))[-1].finish_reason is not None
        answers = await asyncio.wait_for(asyncio.gather(*held), START_S)
        assert len(answers) == 8
        assert str(processes[0]) not in answers
    finally:
        await engine.close()


@pytest.mark.long
async def test_health_follows_the_replicas() -> None:
    engine = on_ray(TalkingEngine)
    await engine.start()
    try:
        assert await healthy(engine)
        os.kill(int(await said(engine, PROCESS)), signal.SIGKILL)

        async def unhealthy() -> bool:
            return not await healthy(engine)

        await eventually(unhealthy)
        await eventually(lambda: healthy(engine))
        await said(engine, PROCESS)
    finally:
        await engine.close()


async def test_servers_share_a_deployment(tmp_path: Path) -> None:
    name = f"shared-{os.getpid()}"

    def server(linger_s: float = 600.0, **settings: str) -> RayEngine:
        return on_ray(TalkingEngine, name=name, linger_s=linger_s, settings=settings)

    first, second, other = server(a="1"), server(a="1"), server(a="2")
    await asyncio.gather(first.start(), second.start())
    process = await said(first, PROCESS)
    assert await said(second, PROCESS) == process
    with pytest.raises(EngineUnavailable) as raised:
        await other.start()
    assert "ray_name: " in raised.value.message
    assert "a (running: 1, here: 2)" in raised.value.message
    await other.close()

    await first.close()
    assert await said(second, PROCESS) == process
    await second.close()
    third = server(a="1")
    await third.start()
    assert await said(third, PROCESS) == process, "the replica stayed for a while"
    await third.close()

    changed = server(0.0, a="2")
    await changed.start()
    assert await said(changed, PROCESS) != process
    await changed.close()


@pytest.mark.long
async def test_the_last_server_ends_the_deployment() -> None:
    engine = on_ray(TalkingEngine)
    await engine.start()
    assert await is_deployed(engine)
    await engine.close()

    async def gone() -> bool:
        return not await is_deployed(engine)

    await eventually(gone)


@pytest.mark.long
async def test_an_engine_that_does_not_start_tells_why() -> None:
    engine = on_ray(broken)
    with pytest.raises(EngineUnavailable) as raised:
        await engine.start()
    assert "there is no model in the folder tests made up" in raised.value.message
    await engine.close()
