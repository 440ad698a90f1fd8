"""Analyses grammars of callers in worker processes that can be killed, and caches the results.

A request uses at most two processes, each for at most the time limit. Equal requests share one
analysis. Results are cached, refusals too. A grammar that reached the time limit, or that crashed its
process and then a fresh one, is refused for a while without another attempt. A process that was
killed or stopped from outside never counts against its grammar.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service import metrics
from service.errors import EngineUnavailable, GrammarError, InternalError, Overloaded
from service.fairness import FairQueue
from service.schema_compiler.grammar_checks import check_grammar
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import Analysed
from service.structured_output import wire
from service.structured_output.analyser import ANYBODY
from service.structured_output.child import COMMAND, Child, ChildEnded
from service.types import Grammar, PropertyOrder

log = logging.getLogger(__name__)

CACHE = "analysis"
CACHE_BYTES = 32 << 20
MAX_WAITING = 256
REMEMBER_S = 60.0
"""Time, in seconds, for which a grammar that timed out or crashed twice is refused without another
attempt. Not for ever, because a busy machine may have been the cause."""
RESTART_PAUSE_S = 1.0
"""Time between two attempts to start a process, in seconds."""
END_LIMIT_S = 5.0
"""Time limit for the end of a process that has closed its pipes, in seconds."""
FROZEN_S = 2.0
"""If a timeout fires this much too late, in seconds, the server itself was paused, for example with its
container."""
CRASH, TIMEOUT, OUTSIDE, DEFECT = "crash", "timeout", "outside", "defect"
"""Reasons to replace a process: its grammar crashed it or reached the time limit, the process was
killed or stopped from outside, or this module failed. Another reason, "grown", is for a process that
has become too large."""
OWN_SIGNALS = frozenset(
    (
        signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL,
        signal.SIGTRAP, signal.SIGSYS, signal.SIGALRM,
    )
)  # fmt: skip
"""Signals of a process that crashed. Other signals are sent from outside, or by a system that is short
of memory."""
_ENTRY_BYTES = 1024

Key = tuple[str, bytes, tuple[PropertyOrder | None, bool | None, bool], SchemaLimits]


@dataclass(slots=True)
class _Known:
    """The cached result for a grammar. until: time at which the result expires."""

    result: Analysed | GrammarError
    size_bytes: int
    until: float = float("inf")


@dataclass(frozen=True, slots=True)
class _Tried:
    """The outcome of an attempt. why: reason to replace the process; None: keep it."""

    result: Analysed | GrammarError | EngineUnavailable
    why: str | None


@dataclass(slots=True, eq=False)
class _Job:
    """A grammar to analyse, and the future of its result, for which callers wait.

    callers: callers in whose queues it was put.
    queued: number of queues that still hold it.
    begun: whether a process has started to analyse it.
    """

    key: Key
    grammar: Grammar
    limits: SchemaLimits
    result: asyncio.Future[Analysed] = field(repr=False)
    callers: set[str] = field(default_factory=set)
    queued: int = 0
    begun: bool = False


class GrammarPool:
    """An ``Analyser`` that uses worker processes. Not thread-safe: belongs to one event loop.

    workers: number of processes; each analyses one grammar at a time.
    timeout_s: time limit of one analysis, without the wait for a process.
    cache_bytes: maximum size of the cached results, by estimate.
    command: command line of a worker process.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 5.0,
        *,
        cache_bytes: int = CACHE_BYTES,
        max_waiting: int = MAX_WAITING,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._count = workers
        self._timeout_s = timeout_s
        self._cache_bytes = cache_bytes
        self._command = tuple(command)
        self._max_waiting = max_waiting
        self._jobs: FairQueue[_Job] = FairQueue()
        self._arrived = asyncio.Event()
        self._running: dict[Key, _Job] = {}
        self._known: OrderedDict[Key, _Known] = OrderedDict()
        self._children: dict[int, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        self._oom_kills = oom_kills()
        self.size_bytes = 0

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that are ready or busy."""
        return tuple(child.pid for child in self._children.values())

    async def start(self) -> None:
        """Start the worker processes and wait until they are ready.

        Raises ``EngineUnavailable`` when a process cannot be started.
        """

        async def begin(place: int) -> None:
            self._children[place] = await Child.start(self._command)

        begun = await asyncio.gather(*map(begin, range(self._count)), return_exceptions=True)
        for error in begun:
            if isinstance(error, BaseException):
                log.error("grammar worker does not start: %s", error)
                await self.close()
                raise EngineUnavailable(
                    "The processes that analyse grammars cannot be started; the log may say why."
                )
        for place in range(self._count):
            work = asyncio.create_task(self._work(place), name=f"grammar-worker-{place}")
            self._tasks.append(work)

    async def analyse(
        self, grammar: Grammar, limits: SchemaLimits, caller: str = ANYBODY
    ) -> Analysed:
        """See ``Analyser``. Also raises ``Overloaded`` when too many grammars wait, and
        ``EngineUnavailable`` when the processes that had the grammar were ended or stopped by others."""
        if len(grammar.source) > limits.max_bytes:
            check_grammar(grammar, limits)  # checks the size before anything is copied
        if self._closed or not self._tasks:
            raise EngineUnavailable("The server is stopping.", reason="ENGINE_CLOSED")
        key = _key(grammar, limits)
        known = self._find(key)
        if known is not None:
            metrics.grammar_cache_hits.labels(CACHE).inc()
            return _given(known)
        job = self._running.get(key)
        if job is None:
            metrics.grammar_cache_misses.labels(CACHE).inc()
            job = self._job(key, grammar, limits, caller)
        else:
            metrics.grammar_cache_hits.labels(CACHE).inc()
            if not job.begun and caller not in job.callers:
                self._put(job, caller)  # its turn may come before that of the first caller
        # A caller that is cancelled must not cancel the analysis for which other callers wait.
        return await asyncio.shield(job.result)

    async def close(self) -> None:
        """End the processes. Waiting callers get ``EngineUnavailable``."""
        self._closed = True
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in list(self._running.values()):
            if not job.result.done():
                error = EngineUnavailable("The server is stopping.", reason="ENGINE_CLOSED")
                job.result.set_exception(error)
        children, self._children = list(self._children.values()), {}
        await asyncio.gather(*(child.end() for child in children))

    def _job(self, key: Key, grammar: Grammar, limits: SchemaLimits, caller: str) -> _Job:
        """A new job, which waits for a process. Raises ``Overloaded``."""
        if len(self._jobs) >= self._max_waiting:
            last = self._jobs.make_room(caller)
            if last is None:
                raise self._full()
            last.queued -= 1
            if not (last.queued or last.begun or last.result.done()):
                last.result.set_exception(self._full())
        job = _Job(key, grammar, limits, asyncio.get_running_loop().create_future())
        self._running[key] = job
        job.result.add_done_callback(lambda done: self._forget(key, done))
        self._put(job, caller)
        return job

    def _put(self, job: _Job, caller: str) -> None:
        job.callers.add(caller)
        job.queued += 1
        self._jobs.put(caller, job)
        self._arrived.set()

    def _full(self) -> Overloaded:
        return Overloaded(
            "Too many new grammars are waiting to be analysed.", retry_after_s=self._timeout_s
        )

    async def _next(self) -> tuple[str, _Job]:
        """Wait for the job whose turn it is, and its caller."""
        while True:
            while not len(self._jobs):
                self._arrived.clear()
                await self._arrived.wait()
            caller, job = self._jobs.take()
            job.queued -= 1
            if not job.begun:
                job.begun = True
                return caller, job
            self._jobs.give_back(caller)  # already begun in another caller's turn

    def _forget(self, key: Key, done: asyncio.Future[Analysed]) -> None:
        self._running.pop(key, None)
        if not done.cancelled():
            done.exception()  # all callers have gone: mark the exception as retrieved

    async def _work(self, place: int) -> None:
        """Run jobs on one worker process, and replace the process when it can no longer be used."""
        while True:
            caller, job = await self._next()
            try:
                why = await self._run(place, job)
            except Exception:  # a defect, which must not cost the server this process for good
                log.exception("grammar worker %d: a grammar failed", self._children[place].pid)
                why = DEFECT
                if not job.result.done():
                    job.result.set_exception(InternalError("The analysis of the grammar failed."))
            self._jobs.give_back(caller)
            if why is not None:
                await self._replace(place, why)

    async def _run(self, place: int, job: _Job) -> str | None:
        """Run a job and give it its result. Returns a reason to replace the process; None: keep it."""
        tried = await self._attempt(job, await self._fresh(place))
        if tried.why in (CRASH, OUTSIDE):
            # Earlier grammars may have damaged the process, or it was killed from outside. A fresh
            # process has analysed no other grammar.
            first = tried.why
            await self._replace(place, first)
            tried = self._second(job, first, await self._attempt(job, self._children[place]))
        self._settle(job, tried)
        return tried.why

    async def _attempt(self, job: _Job, child: Child) -> _Tried:
        """Have the process analyse the grammar."""
        request = wire.write_request(job.grammar, job.limits, self._timeout_s)
        begun = time.perf_counter()
        try:
            answer = await child.ask(request, self._timeout_s)
            result = wire.read_answer(job.grammar, answer)
            return _Tried(result, "grown" if answer.get("last") else None)
        except asyncio.TimeoutError:
            # A stopped or frozen process did not use its time on the grammar, so the grammar is not
            # blamed.
            late = time.perf_counter() - begun > self._timeout_s + FROZEN_S
            why = OUTSIDE if late or child.stopped else TIMEOUT
            return _Tried(_too_slow(job.grammar, self._timeout_s), why)
        except ChildEnded as error:
            status = await child.ended_by_itself(END_LIMIT_S)
            own = status is None or status >= 0 or -status in OWN_SIGNALS
            why = CRASH if own or self._short_of_memory() else OUTSIDE
            log.error("grammar worker %d: %s, status %s", child.pid, error, status)
        except Exception as error:  # a process that sends a malformed answer cannot be trusted
            why = CRASH
            log.error("grammar worker %d: %s: %s", child.pid, type(error).__name__, error)
        finally:
            metrics.grammar_compile_seconds.labels(CACHE).observe(time.perf_counter() - begun)
        return _Tried(_crashed(job.grammar), why)

    def _short_of_memory(self) -> bool:
        """Whether the system has killed a process for its memory since this was last asked."""
        before, self._oom_kills = self._oom_kills, oom_kills()
        return self._oom_kills > before

    def _second(self, job: _Job, first: str, tried: _Tried) -> _Tried:
        """The outcome of the second attempt. Only if the second process timed out, or if both crashed,
        the grammar is blamed; if the second process ended for another reason, the error is
        GRAMMAR_WORKER_LOST."""
        if tried.why == OUTSIDE or (tried.why == CRASH and first != CRASH):
            return _Tried(_lost(), tried.why)
        return tried

    def _settle(self, job: _Job, tried: _Tried) -> None:
        """Give the job its result, and cache the result, except for ``EngineUnavailable``."""
        result = tried.result
        if not isinstance(result, EngineUnavailable):
            refused = tried.why in (TIMEOUT, CRASH)
            until = time.monotonic() + REMEMBER_S if refused else float("inf")
            self._keep(job.key, _Known(result, _size(job.grammar, result), until))
        if job.result.done():
            return
        if isinstance(result, EngineUnavailable):
            job.result.set_exception(result)
        elif isinstance(result, GrammarError):
            job.result.set_exception(_again(result))
        else:
            job.result.set_result(result)

    async def _fresh(self, place: int) -> Child:
        """The worker process, replaced by a new one if it ended since its last job."""
        if not self._children[place].alive:
            await self._replace(place, OUTSIDE)
        return self._children[place]

    async def _replace(self, place: int, reason: str) -> None:
        """Replace a worker process that can no longer be used."""
        metrics.grammar_worker_restarts.labels(reason).inc()
        old = self._children[place]
        try:
            status = await old.end()
            log.warning("grammar worker %d is replaced: %s, status %d", old.pid, reason, status)
        except Exception:
            log.exception("grammar worker %d does not end", old.pid)
        while True:
            try:
                self._children[place] = await Child.start(self._command)
                return
            except Exception as error:  # whatever it is, it must not end the attempts
                log.error(
                    "grammar worker does not start: %s",
                    error,
                    exc_info=None if isinstance(error, ChildEnded | OSError) else error,
                )
                await asyncio.sleep(RESTART_PAUSE_S)

    def _find(self, key: Key) -> _Known | None:
        known = self._known.get(key)
        if known is None:
            return None
        if time.monotonic() >= known.until:
            self._drop(key)
            return None
        self._known.move_to_end(key)
        return known

    def _keep(self, key: Key, known: _Known) -> None:
        if known.size_bytes > self._cache_bytes:
            return
        if key in self._known:
            self._drop(key)
        self._known[key] = known
        self.size_bytes += known.size_bytes
        while self.size_bytes > self._cache_bytes:
            self._drop(next(iter(self._known)))
            metrics.grammar_cache_evictions.labels(CACHE).inc()

    def _drop(self, key: Key) -> None:
        self.size_bytes -= self._known.pop(key).size_bytes


def _key(grammar: Grammar, limits: SchemaLimits) -> Key:
    """The cache key: a digest of the grammar, which needs little memory and compares fast."""
    source = grammar.source.encode("utf-8", "surrogatepass")
    options = grammar.property_order, grammar.close_objects, grammar.lengths_beside
    return grammar.kind.value, hashlib.sha256(source).digest(), options, limits


def _given(known: _Known) -> Analysed:
    if isinstance(known.result, GrammarError):
        raise _again(known.result)
    return known.result


def _again(error: GrammarError) -> GrammarError:
    """A copy of a cached exception. Raising the cached exception itself would keep the stack frames
    of its callers in memory."""
    first, *more = error.violations
    return GrammarError(
        first.field,
        first.description,
        reason=error.reason,
        metadata=error.metadata,
        more=tuple(more),
    )


def _size(grammar: Grammar, result: Analysed | GrammarError) -> int:
    """Approximate memory of a result, in bytes."""
    if isinstance(result, GrammarError):
        return _ENTRY_BYTES + sum(len(v.description) for v in result.violations)
    texts: list[Any] = [
        result.grammar.source,
        result.grammar.ebnf,
        result.grammar.prompt_schema,
    ]
    for keyword in result.report.keywords:
        texts += [keyword.pointer, keyword.keyword, keyword.why, " " * 200]
    for rewrite in result.report.rewrites:
        texts += [rewrite.pointer, rewrite.what, " " * 150]
    for warning in result.report.warnings:
        texts += [warning.pointer, warning.message, " " * 150]
    return _ENTRY_BYTES + sum(map(len, texts)) + len(result.grammar.lengths)


def _too_slow(grammar: Grammar, limit_s: float) -> GrammarError:
    return GrammarError(
        f"grammar.{grammar.kind.value}",
        f"takes longer than {limit_s:g} s to compile; make it smaller",
        reason="GRAMMAR_COMPILE_TIMEOUT",
        metadata={"limit_s": f"{limit_s:g}"},
    )


def _crashed(grammar: Grammar) -> GrammarError:
    return GrammarError(
        f"grammar.{grammar.kind.value}",
        "ended the process that compiles it, and will not be tried again for a while; change it",
        reason="GRAMMAR_COMPILE_CRASHED",
    )


def _lost() -> EngineUnavailable:
    return EngineUnavailable(
        "The process that compiles grammars was ended or stopped, twice; try again.",
        reason="GRAMMAR_WORKER_LOST",
    )


def oom_kills() -> int:
    """How many processes the system has killed because it was short of memory; 0 where it does not
    tell."""
    try:
        with open("/proc/vmstat") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0
