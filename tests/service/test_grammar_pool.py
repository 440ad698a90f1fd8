"""A real server with worker processes: what a compiler that hangs or crashes costs, and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from service.engines.fake import FakeEngine
from service.errors import EngineUnavailable
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import Settings, SettingsError
from service.structured_output.pool import CACHE_BYTES, GrammarPool
from service.tasks.registry import load_registry
from service.types import Capabilities
from tests.service import bending
from tests.service.harness import ROOT, Running, failure, inline, run_request, running, until
from tests.service.structured_output import misbehaving
from tests.service.structured_output.test_pool import BAD, begun, children, count

WORKERS, LIMIT_S = 2, 2.0
LONG_LIMIT_S = 5.0
"""For calls that are answered while a grammar hangs, on a busy machine, too."""


@contextlib.asynccontextmanager
async def serving(
    cache_bytes: int = CACHE_BYTES, limit_s: float = LIMIT_S, **settings: Any
) -> AsyncIterator[tuple[Running, GrammarPool]]:
    """A server whose workers can misbehave. When it has stopped, nothing of them is left."""
    before = asyncio.all_tasks()
    pool = GrammarPool(WORKERS, limit_s, cache_bytes=cache_bytes, command=BAD)
    async with running(pool=pool, **settings) as started:
        yield started, pool
    assert children() == []
    assert not [task for task in asyncio.all_tasks() - before if "grammar" in task.get_name()]


async def served(started: Running, busy: asyncio.Future[Any]) -> int:
    """How many calls with a new grammar are answered while something else is not done. Between them
    come calls with a known grammar and without one."""
    answered = 0
    while not busy.done():
        fresh = f'{{"title": "{answered}"}}'
        await started.stub.RunTask(run_request(inline(json_schema=fresh)))
        answered += not busy.done()
        for task in (inline(json_schema="{}"), inline()):
            await started.stub.RunTask(run_request(task))
    return answered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (misbehaving.HANG, "GRAMMAR_COMPILE_TIMEOUT"),
        (misbehaving.HANG_DEEP, "GRAMMAR_COMPILE_TIMEOUT"),
        (misbehaving.SEGFAULT, "GRAMMAR_COMPILE_CRASHED"),
        (misbehaving.EAT, "GRAMMAR_TOO_COSTLY"),
    ],
)
async def test_a_bad_grammar_fails_only_its_own_request(source: str, reason: str) -> None:
    hangs = reason == "GRAMMAR_COMPILE_TIMEOUT"
    async with serving(limit_s=LONG_LIMIT_S if hangs else LIMIT_S) as (started, pool):
        await started.stub.RunTask(run_request(inline(json_schema="{}")))
        bad = asyncio.ensure_future(
            failure(started.stub.RunTask(run_request(inline(json_schema=source))))
        )
        answered = await served(started, bad)
        error = await bad
        assert error.reason == reason
        assert list(error.fields) == ["task.inline.grammar.json_schema"]
        if hangs:  # the others go on with the other worker meanwhile
            assert answered, "they would have waited for all of the limit"
        await until(lambda: all(child.alive for child in pool._children.values()), 60)
        assert len(set(pool.pids)) == WORKERS
        tried = count("cache_misses", cache="analysis")
        again = await failure(started.stub.RunTask(run_request(inline(json_schema=source))))
        assert again.reason == reason
        assert count("cache_misses", cache="analysis") == tried, "it is remembered"
        validated = await failure(
            started.stub.ValidateSchema(
                pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=source))
            )
        )
        assert validated.reason == reason


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
async def test_a_worker_that_is_killed_or_stopped_costs_the_caller_nothing(
    number: signal.Signals, tmp_path: Path
) -> None:
    source = misbehaving.struck(tmp_path / "count", 1, number)
    async with serving() as (started, _):
        request = run_request(inline(json_schema=source))
        assert (await started.stub.RunTask(request, timeout=60)).result.json
    assert (tmp_path / "count").read_text() == ".."


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_grammar_whose_workers_are_killed_or_stopped_can_be_sent_again(
    number: signal.Signals, tmp_path: Path
) -> None:
    source = misbehaving.struck(tmp_path / "count", 2, number)
    async with serving() as (started, _):
        request = run_request(inline(json_schema=source))
        error = await failure(started.stub.RunTask(request, timeout=60))
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert error.reason == "GRAMMAR_WORKER_LOST"
        again = await started.stub.RunTask(request, timeout=60)
        assert again.result.json, "the grammar is not remembered as a bad one"
    assert (tmp_path / "count").read_text() == "..."


@pytest.mark.slow
async def test_many_bad_ones_at_once_do_not_stop_the_others() -> None:
    async with serving(limit_s=LONG_LIMIT_S) as (started, _):
        await started.stub.RunTask(run_request(inline(json_schema="{}")))
        sources = [misbehaving.SEGFAULT, misbehaving.NONSENSE, misbehaving.HANG]
        bad = asyncio.gather(
            *(failure(started.stub.RunTask(run_request(inline(json_schema=s)))) for s in sources)
        )
        known = 0
        while not bad.done():
            await started.stub.RunTask(run_request(inline(json_schema="{}")))
            known += not bad.done()
        assert [error.reason.rpartition("_")[2] for error in await bad] == [
            "CRASHED", "CRASHED", "TIMEOUT",
        ]  # fmt: skip
        assert known, "a known grammar needs no worker"
        await started.stub.RunTask(run_request(inline(json_schema='{"title": "after"}')))


@pytest.mark.slow
async def test_a_server_that_stops_while_a_worker_hangs_leaves_nothing() -> None:
    async with serving() as (started, pool):
        call = started.stub.RunTask(run_request(inline(json_schema=misbehaving.HANG_DEEP)))
        waiting = asyncio.ensure_future(failure(call))
        await until(lambda: begun(pool) == 1)
        await started.server.stop(0)
        assert children() == []
        assert (await waiting).reason == "ENGINE_DRAINING"


@pytest.mark.slow
async def test_a_server_without_workers_does_not_start() -> None:
    pool = GrammarPool(WORKERS, command=(*BAD, "--dead"))
    server = VisionServer(Settings(port=0), FakeEngine(), load_registry(None), pool=pool)
    await server.start()
    with pytest.raises(EngineUnavailable, match="cannot be started"):
        await server.load()
    await server.stop(0)
    assert children() == []


class Broken(FakeEngine):
    async def start(self) -> None:
        await asyncio.sleep(0.2)
        raise EngineUnavailable("no weights")


@pytest.mark.slow
async def test_workers_end_when_the_engine_does_not_start() -> None:
    server = VisionServer(
        Settings(port=0), Broken(), load_registry(None), pool=GrammarPool(WORKERS, command=BAD)
    )
    await server.start()
    with pytest.raises(EngineUnavailable, match="no weights"):
        await server.load()
    await server.stop(0)
    assert children() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_process_leaves_no_worker(number: signal.Signals) -> None:
    """Ctrl-C reaches the workers as well; SIGKILL leaves the server no time to end them."""
    server = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", "--engine", "fake", "--port", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if line.startswith("SERVING"):
            break
    workers = psutil.Process(server.pid).children()
    assert len(workers) == Settings.model_fields["compile_workers"].default
    for process in [psutil.Process(server.pid), *(workers if number is signal.SIGINT else ())]:
        process.send_signal(number)
    rest = server.communicate(timeout=60)[1]
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert "Traceback" not in rest, rest
    assert server.returncode == (-signal.SIGKILL if number is signal.SIGKILL else 0)


# Metrics


def page(port: int | None, host: str = "127.0.0.1") -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=60) as response:
        return str(response.read().decode())


async def test_metrics_are_served_where_a_port_is_set() -> None:
    async with running(admin_port=0) as started:
        assert started.server.admin_port
        text = await asyncio.to_thread(page, started.server.admin_port)
        assert 'qwen3vl_engine_info{deepstack_by="",deepstack_mode="",engine="fake"' in text
        assert "qwen3vl_deepstack_active 0.0" in text
        for name in ("cache_hits_total", "cache_misses_total", "cache_evictions_total"):
            assert f"# TYPE qwen3vl_grammar_{name} counter" in text
        assert "# TYPE qwen3vl_grammar_compile_seconds histogram" in text
        assert "# TYPE qwen3vl_grammar_worker_restarts_total counter" in text
        taken = VisionServer(
            Settings(port=0, admin_port=started.server.admin_port),
            FakeEngine(),
            load_registry(None),
        )
        with pytest.raises(SettingsError, match="admin_port: cannot listen on 127"):
            await taken.start()
        await taken.stop(0)
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(page, started.server.admin_port)
    async with running() as quiet:
        assert quiet.server.admin_port is None


async def numbers(port: int | None) -> dict[str, float]:
    """What the endpoint tells of grammars: ``cache_hits_total{cache="analysis"}`` and so on."""
    found = {}
    for line in (await asyncio.to_thread(page, port)).splitlines():
        if line.startswith("qwen3vl_grammar_"):
            name, value = line.removeprefix("qwen3vl_grammar_").rsplit(" ", 1)
            found[name] = float(value)
    return found


async def more(port: int | None, before: dict[str, float]) -> dict[str, float]:
    """What has become more, and by how much."""
    now = await numbers(port)
    return {key: now[key] - before.get(key, 0.0) for key in now if now[key] > before.get(key, 0.0)}


@pytest.mark.slow
async def test_metrics_count_cache_hits_misses_and_evictions() -> None:
    async with serving(cache_bytes=6000, admin_port=0) as (started, pool):
        port = started.server.admin_port

        async def run(schema: str) -> None:
            await started.stub.RunTask(run_request(inline(json_schema=schema)))

        before = await numbers(port)
        await asyncio.gather(*(run('{"title": "slow"}') for _ in range(6)))
        found = await more(port, before)
        assert found['cache_misses_total{cache="analysis"}'] == 1, "one for all that are equal"
        assert found['cache_hits_total{cache="analysis"}'] == 5
        assert found['compile_seconds_count{cache="analysis"}'] == 1
        assert found['compile_seconds_sum{cache="analysis"}'] >= 0.05
        assert not any("evictions" in name for name in found)
        for number in range(10):
            await run(f'{{"title": "{number}"}}')
            assert pool.size_bytes <= 6000
        found = await more(port, before)
        assert found['cache_evictions_total{cache="analysis"}'] >= 5
        await failure(started.stub.RunTask(run_request(inline(json_schema=misbehaving.SEGFAULT))))
        await run('{"title": "after"}')
        found = await more(port, before)
        assert found['worker_restarts_total{reason="crash"}'] == 2, "once more on a fresh one"


@pytest.mark.slow
async def test_metrics_tell_what_the_engine_compiled() -> None:
    async with bending.serving(admin_port=0, grammar_cache_bytes=1 << 20) as (server, _, stub):

        async def run(number: int) -> None:
            lists = {"type": "array", "items": {"const": f"{number:0600}"}, "maxItems": 1}
            task = inline(json_schema=json.dumps(lists))
            await stub.ValidateSchema(
                pb.ValidateSchemaRequest(grammar=task.inline.grammar), timeout=30
            )

        before = await numbers(server.admin_port)
        for number in (1, 1, *range(40)):
            await run(number)
        found = await more(server.admin_port, before)
    assert found['cache_hits_total{cache="engine"}'] == 2
    assert found['cache_misses_total{cache="engine"}'] == 40
    assert found['compile_seconds_count{cache="engine"}'] == 40
    assert 0 < found['cache_evictions_total{cache="engine"}'] < 40


class WithDeepStack(FakeEngine):
    @property
    def capabilities(self) -> Capabilities:
        found = super().capabilities
        details = {"deepstack": "on", "deepstack_mode": "auto", "deepstack_by": "hooks"}
        return Capabilities(
            **{name: getattr(found, name) for name in found.__slots__ if name != "details"},
            details=details,
        )


async def test_metrics_say_whether_deepstack_is_on() -> None:
    async with running(WithDeepStack(), admin_port=0) as started:
        text = await asyncio.to_thread(page, started.server.admin_port)
        assert "qwen3vl_deepstack_active 1.0" in text
        assert 'deepstack_by="hooks",deepstack_mode="auto"' in text
