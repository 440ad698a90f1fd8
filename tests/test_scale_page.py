"""docs/scale.md: its program spreads calls over servers, and leaves out those that do not serve."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from service.engines.fake import FakeEngine
from service.lifecycle import Phase
from service.observation import CallRecord
from tests.pages import ROOT, blocks
from tests.service.harness import Running, running, until

PAGE = (ROOT / "docs/scale.md").read_text()
PORTS = "127.0.0.1:50051,127.0.0.1:50052,127.0.0.1:50053"
NAMES = ("red", "green", "blue")
pytestmark = pytest.mark.slow


async def run_program(servers: list[Running], capsys: pytest.CaptureFixture[str]) -> Counter[str]:
    """Run the program of the page. Returns how many calls each server answered."""
    (program,) = blocks(PAGE, "python")
    assert PORTS in program
    code = program.replace(PORTS, ",".join(one.address for one in servers))
    await asyncio.to_thread(exec, f"{code}\nchannel.close()", {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30  # every call was answered
    return Counter(line.split()[1] for line in lines)


async def spread_over(
    names: set[str], servers: list[Running], capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the program until every one of these servers has a share of the calls, which may be none
    where all calls come before it is connected. No other server gets a call."""
    for _ in range(10):
        counts = await run_program(servers, capsys)
        assert counts.keys() <= names
        if min(counts[name] for name in names) >= 5:
            return
    raise AssertionError(f"the calls are not spread: {counts}")


async def test_calls_are_spread_over_the_servers_that_serve(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(running(FakeEngine(name), health_interval_s=0.05))
            for name in NAMES
        ]
        await spread_over(set(NAMES), servers, capsys)

        _, second, third = servers
        second.engine.healthy = False
        await until(lambda: second.server.lifecycle.phase is Phase.UNHEALTHY, 60)
        asked: list[CallRecord] = []
        second.server.runtime.observation.listeners.append(asked.append)
        await spread_over({"red", "blue"}, servers, capsys)
        assert [one.method for one in asked if one.method == "RunTask"] == []  # not even in vain

        await third.server.stop(0)
        assert await run_program(servers, capsys) == {"red": 30}
