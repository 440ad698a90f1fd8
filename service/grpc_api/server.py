"""The gRPC server: port, health, reflection, loading, heartbeat and an orderly end.

The port is bound and health answers while the model loads; health turns SERVING after a warm-up
generation. SIGTERM and SIGINT let calls in flight finish; a second signal cuts them.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service import metrics
from service.auth import ApiKeys
from service.engine import Engine
from service.grpc_api import guard as grpc_guard
from service.grpc_api.health import HealthServicer
from service.grpc_api.interceptors import CallInterceptor
from service.grpc_api.servicer import VisionServicer
from service.grpc_api.tls import server_credentials
from service.heartbeat import Heartbeat, generate_one_token
from service.inference.pipeline import schema_limits
from service.lifecycle import Lifecycle, Phase
from service.logs import pairs
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1 import vision_pb2_grpc as pb_grpc
from service.settings import Settings, SettingsError
from service.structured_output.analyser import Analyser, in_thread
from service.structured_output.pool import GrammarPool
from service.tasks.registry import Registry, try_grammars

SERVICE: str = pb.DESCRIPTOR.services_by_name["VisionService"].full_name
HEALTH: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
STATUS_OF_PHASE = {
    Phase.LOADING: health_pb2.HealthCheckResponse.NOT_SERVING,
    Phase.SERVING: health_pb2.HealthCheckResponse.SERVING,
    Phase.UNHEALTHY: health_pb2.HealthCheckResponse.NOT_SERVING,
    Phase.DRAINING: health_pb2.HealthCheckResponse.NOT_SERVING,
}
IDENTITY_ONLY = ("grpc.compression_enabled_algorithms_bitset", 1)
"""Compressed requests are refused by their headers, with UNIMPLEMENTED and the name of the method."""
DAY_S = 86_400.0
CLOSE_LIMIT_S = 10.0
"""How long an engine may take to close before the process ends without it."""
EXIT_LIMIT_S = 5.0
"""How long the process then may take to end."""

log = logging.getLogger(__name__)


class VisionServer:
    """One server on one port. ``start``, ``load``, then ``stop``, however far it came.

    analyser: makes grammars of callers ready for the engine. pool: processes that do it in its
    place; the server starts and closes them.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        registry: Registry,
        analyser: Analyser = in_thread,
        *,
        pool: GrammarPool | None = None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._registry = registry
        self._pool = pool
        self._metrics = ExitStack()
        self._heartbeat: asyncio.Task[None] | None = None
        self._health = HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.lifecycle = Lifecycle()
        analyser = analyser if pool is None else pool.analyse
        self.servicer = VisionServicer(engine, registry, settings, analyser)
        self.port = settings.port
        self.metrics_port: int | None = None

    async def start(self) -> None:
        """Bind the port and answer health checks; calls are refused until ``load`` is done.

        Raises ``SettingsError`` when the port, the certificates or the keys cannot be used.
        """
        settings = self._settings
        keys = ApiKeys.read(settings.api_keys_file) if settings.api_keys_file else None
        grpc_guard.install()
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(self.lifecycle, keys, settings)],
            options=options(settings),
        )
        pb_grpc.add_VisionServiceServicer_to_server(self.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            names = (SERVICE, HEALTH, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self._enter(Phase.LOADING)
        self.port = self._bind()
        self.metrics_port = self._serve_metrics()
        await self._server.start()
        log.info("listening %s", pairs(address=settings.address, port=self.port, tls=settings.tls))

    async def run(self, on_ready: Callable[[VisionServer], None] | None = None) -> None:
        """``start``, ``load``, and then serve until cancelled.

        Ends only with an error: that of ``start`` or ``load``, ``EngineUnavailable`` when the
        engine does not come back, or the error that ended gRPC's server.
        """
        await self.start()
        await self.load()
        if on_ready is not None:
            on_ready(self)
        assert self._heartbeat is not None
        ended = asyncio.create_task(self._grpc_ended(), name="grpc-ended")
        try:
            done, _ = await asyncio.wait(
                (ended, self._heartbeat), return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        finally:
            ended.cancel()

    async def _grpc_ended(self) -> None:
        """Raises an error when gRPC's server has ended without being told to."""
        assert self._server is not None
        # With a time limit gRPC shields its own future from the cancellation of this task.
        while await self._server.wait_for_termination(DAY_S):
            continue
        raise RuntimeError("gRPC's server ended by itself")

    async def load(self) -> None:
        """Load the engine, warm it up, turn SERVING and watch its health from then on.

        Raises ``EngineUnavailable``, and ``TaskSourceError`` for grammars of tasks that cannot be
        compiled.
        """
        started = asyncio.get_running_loop().time()
        await self._start_parts()
        await asyncio.wait_for(
            generate_one_token(self._engine, "warm-up"), self._settings.inference_timeout_s
        )
        self._enter(Phase.SERVING)
        heartbeat = Heartbeat(
            self._engine,
            self._settings,
            idle=lambda: self.servicer.inference.admission.active == 0,
            progress=lambda: self.servicer.inference.progress,
            enter=self._follow,
        )
        self._heartbeat = asyncio.create_task(heartbeat.run(), name="heartbeat")
        took_s = asyncio.get_running_loop().time() - started
        capabilities = self._engine.capabilities
        metrics.describe_engine(capabilities)
        log.info(
            "serving %s",
            pairs(engine=capabilities.engine, model=capabilities.model, seconds=took_s),
        )

    async def stop(self, grace_s: float | None = None) -> bool:
        """Refuse new calls, let those in flight finish within the grace, close everything.

        Returns False where the engine did not close in time.
        """
        if self.lifecycle.phase is Phase.DRAINING:
            return True
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        grace_s = self._settings.drain_grace_s if grace_s is None else grace_s
        log.info("draining %s", pairs(calls=self.lifecycle.calls_in_flight, grace_s=grace_s))
        self._enter(Phase.DRAINING)
        cut = await self.lifecycle.drain(grace_s)
        if self._server is not None:
            await self._server.stop(None)
            self._server = None  # its destructor needs the loop, so not one moment later
        closed = True
        try:
            await asyncio.wait_for(self._engine.close(), CLOSE_LIMIT_S)
        except asyncio.TimeoutError:
            closed = False
            log.error("engine did not close %s", pairs(seconds=CLOSE_LIMIT_S))
        if self._pool is not None:
            await self._pool.close()
        await asyncio.to_thread(self._metrics.close)
        log.info("stopped %s", pairs(calls_cut=cut))
        return closed

    @property
    def place(self) -> str:
        """Where the server listens, for people."""
        settings = self._settings
        return settings.address if settings.socket is not None else f"port {self.port}"

    def hurry(self) -> None:
        """Cut the grace of ``stop`` short."""
        self.lifecycle.hurry()

    def _bind(self) -> int:
        assert self._server is not None
        address = self._settings.address
        if self._settings.socket is not None:
            _refuse_a_socket_in_use(self._settings.socket)
        try:
            if self._settings.tls:
                return self._server.add_secure_port(address, server_credentials(self._settings))
            return self._server.add_insecure_port(address)
        except RuntimeError:  # ends here: its traceback would keep the server alive
            log.debug("bind failed", exc_info=True)
        raise SettingsError(
            f"port: cannot listen on {address}; it is taken, or the address is not of this host"
        )

    def _serve_metrics(self) -> int | None:
        settings = self._settings
        if settings.metrics_port is None:
            return None
        try:
            serving = metrics.serving(settings.metrics_port, settings.metrics_host)
            return self._metrics.enter_context(serving)
        except OSError:
            address = f"{settings.metrics_host}:{settings.metrics_port}"
            raise SettingsError(
                f"metrics_port: cannot listen on {address}; it is taken, or the address is not of "
                "this host"
            ) from None

    async def _start_parts(self) -> None:
        """The engine, and meanwhile the processes that analyse grammars; they try those of tasks."""
        if self._pool is None:
            await self._engine.start()
            return
        workers = asyncio.create_task(self._pool.start(), name="grammar-pool")
        try:
            await self._engine.start()
            await workers
            limits = schema_limits(self._settings)
            await try_grammars(self._registry, self._pool.analyse, limits)
        finally:
            if not workers.done():
                workers.cancel()
                await asyncio.wait([workers])

    def _follow(self, phase: Phase) -> None:
        """Enter a phase that the heartbeat has found."""
        if phase is not self.lifecycle.phase:
            log.info("phase %s", pairs(now=phase.value))
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self.lifecycle.phase = phase
        for name in ("", SERVICE):
            self._health.set(name, STATUS_OF_PHASE[phase])


async def serve(
    settings: Settings,
    engine: Engine,
    registry: Registry,
    *,
    pool: GrammarPool | None = None,
    on_ready: Callable[[VisionServer], None] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it. Returns after an orderly end.

    pool: see ``VisionServer``. on_ready: called once, when health has turned SERVING. Raises
    ``SettingsError`` when a port cannot be used, ``EngineUnavailable`` when the engine or the pool
    cannot be started or the engine does not come back, ``TaskSourceError`` when the
    grammar of a task cannot be compiled.
    """
    server = VisionServer(settings, engine, registry, pool=pool)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            server.hurry()
        stop.set()

    def ready(server: VisionServer) -> None:
        gc.collect()
        gc.freeze()  # model and modules stay: no full collection walks them while callers wait
        if on_ready is not None:
            on_ready(server)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    running = asyncio.create_task(server.run(ready), name="run")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            server.hurry()  # without an engine no call can finish
            running.result()
    finally:
        running.cancel()
        stopping.cancel()
        if not await server.stop():
            _end_without_the_engine()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _refuse_a_socket_in_use(path: Path) -> None:
    """gRPC replaces the file of any socket, also of a server that still listens on it."""
    with socket.socket(socket.AF_UNIX) as attempt:
        try:
            attempt.connect(str(path))
        except OSError:  # there is none, or the server that made it has ended
            return
    raise SettingsError(f"host: cannot listen on unix:{path}; another process listens on it")


def _end_without_the_engine() -> None:
    """End the process soon, even where threads of the engine never end: Python would wait for them."""
    timer = threading.Timer(EXIT_LIMIT_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


def options(settings: Settings) -> list[tuple[str, int]]:
    """Channel arguments of gRPC core.

    Pings keep connections through NATs and find dead peers; a caller may ping every 10 s.
    """
    compression = [] if settings.compressed_requests else [IDENTITY_ONLY]
    return [
        *compression,
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server behind it
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
