"""A server without a transport: engines, tasks, grammar workers, limits, phases and shutdown.

A front end decodes calls, passes them to ``Runtime.inference_for`` and encodes the answers. A
runtime can have several front ends: they share its engines and limits, the runtime informs them of
its phases, and its drain waits for the calls of all of them.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from service import __version__, heap, metrics, traces
from service.access_log import AccessLog
from service.admin import AdminServer
from service.auth import Access
from service.engine import Engine, load_of
from service.errors import EngineUnavailable, UnknownModel
from service.heartbeat import Heartbeat, generate_one_token
from service.inference.budgets import Budgets
from service.inference.pipeline import Inference, schema_limits
from service.lifecycle import REFUSALS, Lifecycle, Phase
from service.logs import pairs
from service.observation import Observation
from service.quotas import Caller
from service.reload import Reloader
from service.settings import Settings, SettingsError
from service.structured_output.analyser import Analyser, in_thread
from service.structured_output.pool import GrammarPool
from service.tasks.registry import Registry, try_grammars

CLOSE_LIMIT_S = 10.0
"""Maximum time for an engine to close, in seconds; after it the process ends without waiting."""
EXIT_LIMIT_S = 5.0
"""Maximum time, in seconds, for the process to exit after the server has stopped."""

log = logging.getLogger(__name__)


class FrontEnd(Protocol):
    """A transport that uses a runtime.

    A front end registers the asyncio task of every call with ``Runtime.lifecycle``. The lifecycle
    refuses the call if the phase does not accept calls; during a drain it waits for the call and
    cancels it when the grace period is over.
    """

    def enter(self, phase: Phase) -> None:
        """Called with the first phase before ``start``, then with every change. Must not block."""
        ...

    async def start(self) -> None:
        """Start to listen. Raises ``SettingsError`` when the address cannot be used."""
        ...

    async def serve(self) -> None:
        """Wait while calls are served. Raises when serving ends without ``stop``. May be
        cancelled."""
        ...

    async def stop(self) -> None:
        """Close everything that ``start`` opened, also after a failed start. No call is in flight
        any more."""
        ...


class Runtime:
    """The engines, tasks and limits of a server, for its front ends. Call ``start``, ``load``, and
    finally ``stop``, also after a failure.

    engines: calls that name no model go to the first one.
    analyser: turns schemas of callers into grammars.
    pool: worker processes that do this instead of ``analyser``; the runtime starts and closes them.
    """

    def __init__(
        self,
        settings: Settings,
        engines: Sequence[Engine],
        registry: Registry,
        analyser: Analyser = in_thread,
        *,
        pool: GrammarPool | None = None,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.access = Access(settings)
        self.reloader = Reloader()
        self.budgets = Budgets(settings)
        self.lifecycle = Lifecycle()
        self.observation = Observation(
            metrics.count, AccessLog(settings.log_every), log_output=settings.log_output
        )
        self._admin = None
        if settings.admin_port is not None:
            self._admin = AdminServer(settings, self.lifecycle, self.state, self.version)
        self._engines = tuple(engines)
        self._pool = pool
        analyser = analyser if pool is None else pool.analyse
        self._inferences = tuple(
            Inference(engine, registry, settings, analyser, self.budgets) for engine in engines
        )
        self._models: dict[str, Inference] = {}
        self._front_ends: tuple[FrontEnd, ...] = ()
        self._heartbeats: list[asyncio.Task[None]] = []
        self._housekeeping: list[asyncio.Task[None]] = []
        self._found: dict[Inference, Phase] = {}

    @property
    def models(self) -> Mapping[str, Inference]:
        """The inference of each model, by model name. Empty until ``load`` has started the
        engines."""
        return self._models

    def inference_for(self, model: str | None = None) -> Inference:
        """The inference of a model; that of the first engine if ``model`` is None.

        Raises ``UnknownModel`` for a model that is not served.
        """
        if model is None:
            return self._inferences[0]
        try:
            return self._models[model]
        except KeyError:
            known = ", ".join(sorted(self._models)) or "none yet"
            raise UnknownModel(
                f"There is no model of this name. Served: {known}.", metadata={"known": known}
            ) from None

    def enter(self, caller: Caller, call: asyncio.Task[Any]) -> Callable[[], None]:
        """Register a call, before its body is read. It ends with its asyncio task; call the returned
        function to end it for the quota of the caller before its answer is sent.

        Raises ``EngineUnavailable`` when the phase accepts no calls, ``QuotaExceeded`` when the
        caller has too many calls at the same time.
        """
        self.lifecycle.enter(call)
        leave = self.budgets.quotas.enter(caller)
        call.add_done_callback(lambda _: leave())
        return leave

    async def start(self, front_ends: Sequence[FrontEnd]) -> None:
        """Start the front ends; calls are refused until ``load`` has finished.

        Raises ``SettingsError`` when a port, the certificates or the keys cannot be used.
        """
        self._front_ends = tuple(front_ends)
        # Files are read in threads, calls are counted on this loop.
        loop = asyncio.get_running_loop()
        self.access.changed = lambda added, removed: loop.call_soon_threadsafe(
            metrics.change_callers, added, removed
        )
        for path, read in self.access.files:
            self.reloader.watch([path], read)
        if self.settings.traces:
            self.observation.tracing = _traces()
        self.access.read()
        self._enter(Phase.LOADING)
        if self._admin is not None:
            await self._admin.start()
        for front_end in self._front_ends:
            await front_end.start()
        self._housekeeping = [
            asyncio.create_task(self.reloader.run(), name="reload"),
            asyncio.create_task(heap.run(), name="heap"),
        ]

    async def load(self) -> None:
        """Load the engines, warm them up, enter SERVING and start to watch their health.

        Raises ``EngineUnavailable``, or ``TaskSourceError`` for tasks whose grammar cannot be
        compiled.
        """
        started = asyncio.get_running_loop().time()
        await self._start_parts()
        unhealthy = await self._warm_up()
        self._models = self._by_name()
        self._enter(Phase.SERVING)
        self._watch()
        for inference in unhealthy:
            self._follow(inference, Phase.UNHEALTHY)
        took_s = asyncio.get_running_loop().time() - started
        for engine in self._engines:
            capabilities = engine.capabilities
            metrics.describe_engine(capabilities)
            log.info(
                "serving %s",
                pairs(engine=capabilities.engine, model=capabilities.model, seconds=took_s),
            )

    async def run(
        self, front_ends: Sequence[FrontEnd], on_ready: Callable[[], None] | None = None
    ) -> None:
        """Call ``start`` and ``load``, then serve until cancelled.

        Always ends with an error: that of ``start`` or ``load``, ``EngineUnavailable`` when an
        engine does not recover, or the error that ended a front end.
        """
        await self.start(front_ends)
        await self.load()
        if on_ready is not None:
            on_ready()
        serving = [asyncio.create_task(one.serve(), name="front-end") for one in self._front_ends]
        try:
            done, _ = await asyncio.wait(
                (*serving, *self._heartbeats), return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        finally:
            for task in serving:
                task.cancel()

    async def stop(self, grace_s: float | None = None) -> bool:
        """Refuse new calls, wait for calls in flight up to the grace period, then close everything.

        Returns False if an engine did not close in time.
        """
        if self.lifecycle.phase is Phase.DRAINING:
            return True
        for task in (*self._heartbeats, *self._housekeeping):
            task.cancel()
        grace_s = self.settings.drain_grace_s if grace_s is None else grace_s
        log.info("draining %s", pairs(calls=self.lifecycle.calls_in_flight, grace_s=grace_s))
        self._enter(Phase.DRAINING)
        cut = await self.lifecycle.drain(grace_s)
        for front_end in self._front_ends:
            try:
                await front_end.stop()
            except Exception:  # a defect; the others and the engine must close, too
                log.exception("a front end did not stop")
        closed = all([await _closed(engine) for engine in self._engines])
        if self._pool is not None:
            await self._pool.close()
        if self._admin is not None:
            await self._admin.stop()
        if self.observation.tracing is not None:
            await asyncio.to_thread(self.observation.tracing.close)
        log.info("stopped %s", pairs(calls_cut=cut))
        return closed

    def hurry(self) -> None:
        """End the grace period of ``stop`` now."""
        self.lifecycle.hurry()

    @property
    def admin_port(self) -> int | None:
        """The TCP port of the admin pages; None where there is none."""
        return None if self._admin is None else self._admin.port

    async def state(self) -> metrics.ServerState:
        """What the server is doing at this moment."""
        budgets, settings = self.budgets, self.settings
        loads = [load for engine in self._engines if (load := await load_of(engine)) is not None]
        in_engine_queue = sum(load.waiting for load in loads)
        slots = budgets.admission
        return metrics.ServerState(
            phase=self.lifecycle.phase,
            in_flight=self.lifecycle.calls_in_flight,
            running=max(0, slots.active - in_engine_queue),
            running_limit=settings.slots,
            queued=budgets.waiting.calls + in_engine_queue,
            queued_limit=settings.max_queue,
            memory=budgets.memory,
            kv_cache={
                load.model: load.kv_cache_used for load in loads if load.kv_cache_used is not None
            },
        )

    def version(self) -> dict[str, str]:
        """Of the server, and what is known of its first model."""
        found = {"version": __version__}
        if self._models:
            capabilities = self._engines[0].capabilities
            found |= {"model": capabilities.model, "engine": capabilities.engine}
            commit = capabilities.details.get("commit")
            found |= {} if commit is None else {"commit": commit}
        return found

    async def _start_parts(self) -> None:
        """Start the engines and the grammar workers side by side; the workers then test the
        grammars of the tasks."""
        if self._pool is None:
            await self._start_engines()
            return
        workers = asyncio.create_task(self._pool.start(), name="grammar-pool")
        try:
            await self._start_engines()
            await workers
            limits = schema_limits(self.settings)
            await try_grammars(self.registry, self._pool.analyse, limits)
        finally:
            if not workers.done():
                workers.cancel()
                await asyncio.wait([workers])

    async def _start_engines(self) -> None:
        for engine in self._engines:
            await engine.start()

    async def _warm_up(self) -> list[Inference]:
        """Have every engine generate a token. Returns those that cannot and may recover by
        themselves.

        Raises the error of an engine that a new process may cure, or the first error when no engine
        works.
        """
        errors: dict[Inference, EngineUnavailable] = {}
        for engine, inference in zip(self._engines, self._inferences, strict=True):
            work = generate_one_token(engine, "warm-up")
            try:
                await asyncio.wait_for(work, self.settings.inference_timeout_s)
            except EngineUnavailable as error:
                if engine.capabilities.restart_helps:
                    raise
                log.warning("no warm-up %s", pairs(model=engine.capabilities.model, error=error))
                errors[inference] = error
        if len(errors) == len(self._engines):
            raise next(iter(errors.values()))
        return list(errors)

    def _by_name(self) -> dict[str, Inference]:
        found = {one.capabilities.model: one for one in self._inferences}
        if len(found) < len(self._inferences):
            names = ", ".join(sorted(one.capabilities.model for one in self._inferences))
            raise ValueError(f"two engines have a model of the same name: {names}")
        return found

    def _watch(self) -> None:
        """Follow the health of every engine."""
        self._found = dict.fromkeys(self._inferences, Phase.SERVING)
        for engine, inference in zip(self._engines, self._inferences, strict=True):
            heartbeat = Heartbeat(
                engine,
                self.settings,
                idle=partial(_idle, inference),
                progress=partial(getattr, inference, "progress"),
                enter=partial(self._follow, inference),
            )
            self._heartbeats.append(asyncio.create_task(heartbeat.run(), name="heartbeat"))

    def _follow(self, inference: Inference, phase: Phase) -> None:
        """Follow what the heartbeat of an engine reports. Calls to an unhealthy engine are refused;
        the server is unhealthy when no engine is healthy."""
        if phase is not self._found[inference]:
            model = inference.capabilities.model
            log.info("engine %s", pairs(model=model, phase=phase.value))
        self._found[inference] = phase
        inference.refusal = REFUSALS.get(phase)
        healthy = any(found is Phase.SERVING for found in self._found.values())
        phase = Phase.SERVING if healthy else Phase.UNHEALTHY
        if phase is not self.lifecycle.phase:
            log.info("phase %s", pairs(now=phase.value))
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self.lifecycle.phase = phase
        for front_end in self._front_ends:
            front_end.enter(phase)


async def serve(
    runtime: Runtime,
    front_ends: Sequence[FrontEnd],
    *,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Run a runtime with its front ends until SIGTERM or SIGINT, then drain it and return. SIGHUP
    reloads keys, names and certificates.

    on_ready: called once, when the server enters SERVING. Raises ``SettingsError`` when a port
    cannot be used, ``EngineUnavailable`` when an engine or the pool cannot be started or an engine
    does not recover, ``TaskSourceError`` when the grammar of a task cannot be compiled.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            runtime.hurry()
        stop.set()

    def ready() -> None:
        gc.collect()
        gc.freeze()  # exclude the model and the modules from garbage collection
        if on_ready is not None:
            on_ready()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, runtime.reloader.now)
    running = asyncio.create_task(runtime.run(front_ends, ready), name="run")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            runtime.hurry()  # without an engine no call can finish
            running.result()
    finally:
        running.cancel()
        stopping.cancel()
        if not await runtime.stop():
            end_soon(1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


def _idle(inference: Inference) -> bool:
    """Whether no call is in the engine."""
    return inference.active == 0


def _traces() -> traces.Traces:
    try:
        return traces.from_environment()
    except ImportError:
        text = "traces: the extra otel is not installed: pip install 'qwen3vl-grpc[otel]'"
    except ValueError as error:
        text = f"traces: {error}"
    raise SettingsError(text)


async def _closed(engine: Engine) -> bool:
    """Close the engine. Returns False if it did not close in time."""
    try:
        await asyncio.wait_for(engine.close(), CLOSE_LIMIT_S)
    except asyncio.TimeoutError:
        log.error("engine did not close %s", pairs(seconds=CLOSE_LIMIT_S))
        return False
    return True


def end_soon(code: int) -> None:
    """End the process soon, even if a thread does not end: Python would wait for it.

    Threads of an engine may hang, and an image that is being decoded cannot be interrupted.
    """
    timer = threading.Timer(EXIT_LIMIT_S, os._exit, (code,))
    timer.daemon = True
    timer.start()
