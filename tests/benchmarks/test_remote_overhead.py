"""What the measurement of time added in front of other servers asks, and of whom."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from contextlib import ExitStack

import pytest

from benchmarks.remote_overhead import CHAT, DIRECT, OURS, PROXY, measured, running

pytestmark = pytest.mark.slow


def test_calls_take_turns_and_tokens_that_differ_are_told() -> None:
    asked: list[str] = []

    def ask(name: str, tokens: int):  # type: ignore[no-untyped-def]
        async def one() -> int:
            asked.append(name)
            return tokens

        return one

    calls = {DIRECT: ask(DIRECT, 5), PROXY: ask(PROXY, 5), OURS: ask(OURS, 7)}
    row = asyncio.run(measured(calls, rounds=3, warmup=0))
    assert asked == [DIRECT, PROXY, OURS, PROXY, OURS, DIRECT, OURS, DIRECT, PROXY]
    assert row["tokens"] == "5, 7"


def test_the_bare_proxy_changes_nothing() -> None:
    with ExitStack() as stack:
        direct = running(stack, "instant")
        proxy = running(stack, "proxy", direct)
        answers = []
        for url in (direct, proxy):
            data = json.dumps({"messages": []}).encode()
            request = urllib.request.Request(url + CHAT, data, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                answers.append((response.status, response.headers["content-type"], response.read()))
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(url + "/nothing", timeout=60)
            assert error.value.code == 404
            error.value.close()
        assert answers[0] == answers[1]
