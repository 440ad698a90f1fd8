"""Analysis of grammars in processes: what is shared and kept, and what a bad one costs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import REGISTRY

from service.errors import EngineUnavailable, GrammarError, InternalError, Overloaded
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import Analysed
from service.structured_output import pool as pool_module
from service.structured_output import worker
from service.structured_output.pool import GrammarPool
from service.types import Grammar, GrammarKind
from tests.service.harness import until
from tests.service.structured_output import misbehaving

LIMITS = SchemaLimits()
BAD = (sys.executable, "-m", "tests.service.structured_output.misbehaving")


def schema(source: str) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, source)


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"qwen3vl_grammar_{name}_total", labels) or 0.0


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[GrammarPool]:
    """A pool on workers that can misbehave; afterwards no process and no task is left of it."""
    before = asyncio.all_tasks()
    pool = GrammarPool(**{"workers": 1, "command": BAD, "timeout_s": 20.0, **options})
    await pool.start()
    assert len(pool.pids) == pool._count
    try:
        yield pool
    finally:
        await pool.close()
        assert children() == []
        assert asyncio.all_tasks() == before


def children() -> list[int]:
    """Processes of this one that run worker code, zombies included."""
    return [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if child.status() == psutil.STATUS_ZOMBIE or "grammars" in " ".join(child.cmdline())
    ]


async def refused(pool: GrammarPool, source: str) -> GrammarError:
    with pytest.raises(GrammarError) as caught:
        await pool.analyse(schema(source), LIMITS)
    return caught.value


@pytest.mark.slow
async def test_a_pool_analyses_grammars_and_caches_results_and_refusals() -> None:
    hits, misses = count("cache_hits", cache="analysis"), count("cache_misses", cache="analysis")
    async with running() as pool:
        first = await pool.analyse(Grammar(GrammarKind.CHOICE, '["a", "née"]'), LIMITS)
        assert isinstance(first, Analysed)
        assert first.grammar.ebnf.startswith("root ::=")
        assert first.grammar.source == '["a", "née"]'
        again = await pool.analyse(Grammar(GrammarKind.CHOICE, '["a", "née"]'), LIMITS)
        assert again is first
        error = await refused(pool, '{"type": "nothing"}')
        assert (error.reason, error.violations[0].field) == (
            "SCHEMA_INVALID",
            "grammar.json_schema",
        )
        assert error.metadata["pointer"] == "/type"
        kept = await refused(pool, '{"type": "nothing"}')
        assert (kept.message, kept.reason, kept.metadata) == (
            error.message, error.reason, error.metadata,
        )  # fmt: skip
        assert kept is not error
        with pytest.raises(GrammarError, match="bytes"):
            await pool.analyse(schema('"' + "x" * LIMITS.max_bytes + '"'), LIMITS)
    assert count("cache_hits", cache="analysis") == hits + 2
    assert count("cache_misses", cache="analysis") == misses + 2


@pytest.mark.slow
async def test_other_limits_are_a_separate_cache_entry() -> None:
    async with running() as pool:
        deep = '{"items": {"items": {"items": {}}}}'
        await pool.analyse(schema(deep), LIMITS)
        with pytest.raises(GrammarError, match="levels deep"):
            await pool.analyse(schema(deep), SchemaLimits(max_depth=2))


@pytest.mark.slow
async def test_equal_grammars_share_one_analysis() -> None:
    misses = count("cache_misses", cache="analysis")
    async with running() as pool:
        slow = schema('{"title": "slow"}')
        gone, *others = [asyncio.ensure_future(pool.analyse(slow, LIMITS)) for _ in range(8)]
        await asyncio.sleep(0)  # all of them wait for the analysis now
        gone.cancel()
        found = await asyncio.gather(*others)
        assert all(one is found[0] for one in found)
        assert gone.cancelled()
    assert count("cache_misses", cache="analysis") == misses + 1


@pytest.mark.slow
@pytest.mark.parametrize("source", [misbehaving.SEGFAULT, misbehaving.NONSENSE])
async def test_a_crash_costs_one_request(source: str) -> None:
    restarts = count("worker_restarts", reason="crash")
    async with running() as pool:
        before = pool.pids
        waiting = asyncio.ensure_future(refused(pool, source))
        beside = asyncio.ensure_future(pool.analyse(schema('{"title": "slow 1"}'), LIMITS))
        error = await waiting
        assert error.reason == "GRAMMAR_COMPILE_CRASHED"
        assert error.violations[0].field == "grammar.json_schema"
        assert (await beside).report is not None
        assert len(pool.pids) == 1
        assert pool.pids != before
        kept = await refused(pool, source)
        assert kept.reason == "GRAMMAR_COMPILE_CRASHED"
        await pool.analyse(schema('{"title": "after"}'), LIMITS)
    # It ended a fresh process as well; when it came again it was not tried.
    assert count("worker_restarts", reason="crash") == restarts + 2


@pytest.mark.slow
async def test_workers_killed_from_outside_do_not_block_their_grammar() -> None:
    restarts = count("worker_restarts", reason="outside")
    async with running() as pool:
        for tried in (2, 4):
            with pytest.raises(EngineUnavailable) as caught:
                await pool.analyse(schema(misbehaving.KILLED), LIMITS)
            assert caught.value.reason == "GRAMMAR_WORKER_LOST"
            await pool.analyse(schema('{"title": "after"}'), LIMITS)
            assert count("worker_restarts", reason="outside") == restarts + tried


@pytest.mark.slow
async def test_a_grammar_for_which_the_system_is_short_of_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kills = iter(range(10))
    monkeypatch.setattr(pool_module, "oom_kills", lambda: next(kills))
    async with running() as pool:
        assert (await refused(pool, misbehaving.KILLED)).reason == "GRAMMAR_COMPILE_CRASHED"
        restarts = count("worker_restarts", reason="crash")
        assert (await refused(pool, misbehaving.KILLED)).reason == "GRAMMAR_COMPILE_CRASHED"
        assert count("worker_restarts", reason="crash") == restarts


@pytest.mark.slow
@pytest.mark.parametrize("source", [misbehaving.HANG, misbehaving.HANG_DEEP])
async def test_a_hanging_grammar_does_not_keep_others_waiting(source: str) -> None:
    async with running(workers=2, timeout_s=120.0) as pool:
        hanging = asyncio.ensure_future(pool.analyse(schema(source), LIMITS))
        await until(lambda: begun(pool) == 1)
        await pool.analyse(schema('{"title": "beside"}'), LIMITS)
        assert not hanging.done()
        await pool.close()
        with pytest.raises(EngineUnavailable):
            await hanging


def begun(pool: GrammarPool) -> int:
    """How many grammars are being analysed."""
    return sum(job.begun for job in pool._running.values())


@pytest.mark.slow
@pytest.mark.parametrize("source", [misbehaving.HANG, misbehaving.HANG_DEEP])
async def test_a_hanging_grammar_is_stopped_at_the_limit_and_refused_for_a_while(
    source: str,
) -> None:
    restarts = count("worker_restarts", reason="timeout")
    async with running(workers=2, timeout_s=1.0) as pool:
        asked_at = time.monotonic()
        assert (await refused(pool, source)).reason == "GRAMMAR_COMPILE_TIMEOUT"
        assert time.monotonic() - asked_at > 0.9
        assert (await refused(pool, source)).reason == "GRAMMAR_COMPILE_TIMEOUT"
        assert count("worker_restarts", reason="timeout") == restarts + 1
        (known,) = [known for known in pool._known.values() if known.until < float("inf")]
        assert 0 < known.until - time.monotonic() < pool_module.REMEMBER_S
        known.until = time.monotonic()
        assert (await refused(pool, source)).reason == "GRAMMAR_COMPILE_TIMEOUT"
        await until_restarted(pool, 2)
    assert count("worker_restarts", reason="timeout") == restarts + 2


async def until_restarted(pool: GrammarPool, workers: int) -> None:
    """Wait until so many workers run that were never killed."""
    end = time.monotonic() + 30
    while sum(child.alive for child in pool._children.values()) < workers:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


@pytest.mark.slow
async def test_a_worker_that_has_grown_is_replaced_after_its_answer() -> None:
    restarts = count("worker_restarts", reason="grown")
    async with running() as pool:
        before = pool.pids
        await pool.analyse(schema(misbehaving.GROW), LIMITS)
        await pool.analyse(schema('{"title": "after"}'), LIMITS)
        assert pool.pids != before
    assert count("worker_restarts", reason="grown") == restarts + 1


@pytest.mark.slow
async def test_a_defect_costs_one_request_and_no_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    restarts = count("worker_restarts", reason="defect")
    async with running() as pool:
        before = pool.pids
        with monkeypatch.context() as broken:
            broken.setattr(pool_module, "_size", lambda grammar, result: 1 / 0)
            with pytest.raises(InternalError):
                await asyncio.wait_for(pool.analyse(schema("{}"), LIMITS), 60)
        await asyncio.wait_for(pool.analyse(schema("{}"), LIMITS), 60)
        assert len(pool.pids) == 1
        assert pool.pids != before
    assert count("worker_restarts", reason="defect") == restarts + 1
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.slow
async def test_a_worker_collects_its_garbage_between_requests() -> None:
    async with running() as pool:
        before = pool.pids
        for number in range(3):
            await pool.analyse(schema(f'{{"title": "litter {number}"}}'), LIMITS)
        assert pool.pids == before


@pytest.mark.slow
async def test_a_worker_that_ends_while_idle_is_replaced() -> None:
    async with running() as pool:
        os.kill(pool.pids[0], signal.SIGKILL)
        await asyncio.sleep(0.2)
        await pool.analyse(schema('{"title": "next"}'), LIMITS)


@pytest.mark.slow
async def test_memory_is_limited_and_workers_are_the_first_victims_of_the_oom_killer() -> None:
    mine = Path("/proc/self/oom_score_adj").read_text()
    async with running() as pool:
        (pid,) = pool.pids
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
        assert psutil.Process(pid).rlimit(psutil.RLIMIT_AS)[1] == worker.MEMORY_BYTES
        error = await refused(pool, misbehaving.EAT)
        assert error.reason == "GRAMMAR_TOO_COSTLY"
        assert error.message.endswith("takes too much memory to compile; make it smaller")
        await pool.analyse(schema('{"title": "after"}'), LIMITS)
        assert pool.pids == (pid,)
    assert Path("/proc/self/oom_score_adj").read_text() == mine


@pytest.mark.slow
async def test_the_cache_is_limited_and_evicts_the_oldest() -> None:
    evictions = count("cache_evictions", cache="analysis")
    misses = count("cache_misses", cache="analysis")
    async with running(cache_bytes=5000) as pool:
        kept = [schema(f'{{"title": "{i}"}}') for i in range(8)]
        for one in kept:
            await pool.analyse(one, LIMITS)
            assert 0 < pool.size_bytes <= 5000
        await pool.analyse(kept[-1], LIMITS)
        assert count("cache_misses", cache="analysis") == misses + 8
        await pool.analyse(kept[0], LIMITS)
        assert count("cache_misses", cache="analysis") == misses + 9
    assert count("cache_evictions", cache="analysis") > evictions


def in_order(pool: GrammarPool, caller: str, sources: Sequence[str], done: list[str]) -> Any:
    """Analyse grammars of one caller; ``done`` gets their sources in the order in which they end."""

    async def one(source: str) -> str:
        try:
            await pool.analyse(schema(source), LIMITS, caller)
        except Overloaded:
            return "OVERLOADED"
        done.append(source)
        return "OK"

    return asyncio.gather(*(one(source) for source in sources))


@pytest.mark.slow
async def test_many_grammars_of_one_caller_do_not_keep_another_waiting() -> None:
    done: list[str] = []
    many = [f'{{"title": "slow {number}"}}' for number in range(8)]
    few = ['{"title": "few 1"}', '{"title": "few 2"}']
    async with running() as pool:
        waiting = in_order(pool, "many", many, done)
        await asyncio.sleep(0)  # they are in the queue now
        await in_order(pool, "few", few, done)
        await waiting
    assert done == [many[0], few[0], many[1], few[1], *many[2:]]


@pytest.mark.slow
async def test_a_shared_grammar_takes_the_first_turn_of_its_callers() -> None:
    done: list[str] = []
    many = [f'{{"title": "slow {number}"}}' for number in range(5)]
    async with running() as pool:
        waiting = in_order(pool, "many", many, done)
        await asyncio.sleep(0)
        await in_order(pool, "few", [many[4]], done)
        await waiting
        assert len(pool._jobs) == 0
    assert [done.index(source) for source in many] == [0, 3, 4, 5, 1]


@pytest.mark.slow
async def test_a_full_queue_makes_room_for_a_caller_with_few_grammars() -> None:
    done: list[str] = []
    many = [f'{{"title": "slow {number}"}}' for number in range(5)]
    async with running(max_waiting=3) as pool:
        waiting = in_order(pool, "many", many[:1], done)
        await until(lambda: begun(pool) == 1)
        waiting = asyncio.gather(waiting, in_order(pool, "many", many[1:], done))
        await asyncio.sleep(0)
        assert await in_order(pool, "few", ['{"title": "few"}'], done) == ["OK"]
        assert await waiting == [["OK"], ["OK", "OK", "OVERLOADED", "OVERLOADED"]]
    assert done == [many[0], '{"title": "few"}', *many[1:3]]


@pytest.mark.slow
async def test_a_full_queue_and_a_closing_pool_refuse_grammars() -> None:
    async with running(max_waiting=1) as pool:
        hanging = [asyncio.ensure_future(pool.analyse(schema(misbehaving.HANG), LIMITS))]
        await until(lambda: begun(pool) == 1)
        hanging.append(asyncio.ensure_future(pool.analyse(schema("{}"), LIMITS)))
        await until(lambda: len(pool._jobs) == 1)
        with pytest.raises(Overloaded):
            await pool.analyse(schema("true"), LIMITS)
        await pool.close()
        for one in hanging:
            with pytest.raises(EngineUnavailable):
                await one
        with pytest.raises(EngineUnavailable):
            await pool.analyse(schema("true"), LIMITS)


@pytest.mark.slow
async def test_a_worker_that_cannot_start_fails_the_start_of_the_server() -> None:
    pool = GrammarPool(2, command=(*BAD, "--dead"))
    with pytest.raises(EngineUnavailable, match="cannot be started"):
        await pool.start()
    assert children() == []


PARENT = """
import asyncio, sys
from service.structured_output.pool import GrammarPool
from service.schema_compiler.limits import SchemaLimits
from service.types import Grammar, GrammarKind

async def main():
    pool = GrammarPool(1, 0.2 + float(sys.argv[2]), command=(sys.executable, "-m", sys.argv[1]))
    await pool.start()
    print(*pool.pids, flush=True)
    source = sys.argv[3]
    await pool.analyse(Grammar(GrammarKind.JSON_SCHEMA, source), SchemaLimits())
    await asyncio.sleep(600)

asyncio.run(main())
"""


def orphan(
    source: str, *, timeout_s: float = 60.0, reached: Callable[[int], bool] = lambda pid: True
) -> psutil.Process:
    """The worker of a process that was killed while the worker was at this source. reached: whether the
    worker, given by its process id, has come to the source."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, BAD[2], str(timeout_s), source],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    while not reached(child.pid):
        time.sleep(0.02)
    parent.kill()
    parent.communicate()
    return child


def ignores_sigterm(pid: int) -> bool:
    """Whether a process ignores SIGTERM, which is the last that ``HANG_DEEP`` does before it hangs."""
    status = Path(f"/proc/{pid}/status").read_text()
    (ignored,) = re.findall(r"^SigIgn:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return bool(int(ignored, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
def test_a_worker_ends_with_its_parent() -> None:
    orphan("{}").wait(60)


@pytest.mark.slow
def test_a_worker_that_hangs_ends_soon_after_its_parent() -> None:
    child = orphan(misbehaving.HANG_DEEP, timeout_s=4.0, reached=ignores_sigterm)
    assert child.is_running()
    child.wait(60)
