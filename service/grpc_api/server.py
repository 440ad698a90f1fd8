"""The gRPC front end of a ``Runtime``: port, TLS, health and reflection.

While the model loads, the port is bound and health checks are answered; health becomes SERVING
after a warm-up generation. SIGTERM or SIGINT lets calls in flight finish; a second signal cancels
them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service import runtime
from service.engine import Engine
from service.grpc_api import guard as grpc_guard
from service.grpc_api.connections import ConnectionWatch, connection_limit, connection_options
from service.grpc_api.health import HealthServicer
from service.grpc_api.interceptors import CallInterceptor
from service.grpc_api.large_messages import LargeMessages
from service.grpc_api.servicer import VisionServicer
from service.grpc_api.tls import server_credentials
from service.lifecycle import Phase
from service.logs import pairs
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1 import vision_pb2_grpc as pb_grpc
from service.runtime import Runtime
from service.settings import Settings, SettingsError
from service.structured_output.analyser import Analyser, in_thread
from service.structured_output.pool import GrammarPool
from service.tasks.registry import Registry

SERVICE: str = pb.DESCRIPTOR.services_by_name["VisionService"].full_name
HEALTH: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
STATUS_OF_PHASE = {
    Phase.LOADING: health_pb2.HealthCheckResponse.NOT_SERVING,
    Phase.SERVING: health_pb2.HealthCheckResponse.SERVING,
    Phase.UNHEALTHY: health_pb2.HealthCheckResponse.NOT_SERVING,
    Phase.DRAINING: health_pb2.HealthCheckResponse.NOT_SERVING,
}
AS_SENT = ("grpc.per_message_decompression", 0)
"""gRPC core passes compressed messages on as they are, and the interceptor refuses them after the key
was checked. Core could refuse them itself, by their headers, but would tell the caller at once and
keep the request until Python takes it: one caller could thus leave thousands of requests in memory."""
DAY_S = 86_400.0

log = logging.getLogger(__name__)


class GrpcFrontEnd:
    """The gRPC front end: one port with the vision service, health and reflection. See
    ``FrontEnd``."""

    def __init__(self, runtime: Runtime) -> None:
        self._settings = settings = runtime.settings
        self._lifecycle = runtime.lifecycle
        self._enter = runtime.enter
        self._access = runtime.access
        self._reloader = runtime.reloader
        self._observation = runtime.observation
        self._health = HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._connections: ConnectionWatch | None = None
        self._watching: asyncio.Task[None] | None = None
        self._large = LargeMessages()
        self.servicer = VisionServicer(runtime, self._large)
        self.port = settings.port

    @property
    def place(self) -> str:
        """The address for log messages and people."""
        settings = self._settings
        return settings.address if settings.socket is not None else f"port {self.port}"

    def enter(self, phase: Phase) -> None:
        """Report the phase through the health service."""
        for name in ("", SERVICE):
            self._health.set(name, STATUS_OF_PHASE[phase])
        if phase is Phase.SERVING and self._connections is not None:
            self._connections.begin()

    async def start(self) -> None:
        """Bind the port and answer health checks.

        Raises ``SettingsError`` when the port or the certificates cannot be used.
        """
        settings = self._settings
        grpc_guard.install()
        limit = connection_limit(settings)
        self._server = grpc.aio.server(
            interceptors=[
                CallInterceptor(
                    self._lifecycle,
                    self._access,
                    self._observation,
                    settings,
                    self._enter,
                    self._large,
                )
            ],
            options=options(settings, limit),
        )
        pb_grpc.add_VisionServiceServicer_to_server(self.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            names = (SERVICE, HEALTH, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self.port = self._bind()
        await self._server.start()
        self._connections = ConnectionWatch(limit)
        self._watching = asyncio.create_task(self._connections.run(), name="connections")
        log.info("listening %s", pairs(address=settings.address, port=self.port, tls=settings.tls))

    async def serve(self) -> None:
        """Wait while calls are served. Raises when gRPC's server ends unexpectedly."""
        assert self._server is not None
        # With a time limit gRPC shields its own future from the cancellation of this task.
        while await self._server.wait_for_termination(DAY_S):
            continue
        raise RuntimeError("gRPC's server ended by itself")

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._watching is not None:
            self._watching.cancel()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None  # its destructor needs the event loop, so delete it now

    def _bind(self) -> int:
        assert self._server is not None
        address = self._settings.address
        if self._settings.socket is not None:
            _refuse_a_socket_in_use(self._settings.socket)
        try:
            if self._settings.tls:
                return self._server.add_secure_port(
                    address, server_credentials(self._settings, self._reloader)
                )
            return self._server.add_insecure_port(address)
        except RuntimeError:  # do not chain the error: its traceback would keep the server alive
            log.debug("bind failed", exc_info=True)
        raise SettingsError(
            f"port: cannot listen on {address}; it is taken, or the address is not of this host"
        )


class VisionServer:
    """A runtime with gRPC as its only front end, for one engine or several.

    Call ``start``, ``load``, and finally ``stop``, also after a failure. See ``Runtime`` for these
    methods, analyser and pool.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine | Sequence[Engine],
        registry: Registry,
        analyser: Analyser = in_thread,
        *,
        pool: GrammarPool | None = None,
    ) -> None:
        engines = engine if isinstance(engine, Sequence) else [engine]
        self.runtime = Runtime(settings, engines, registry, analyser, pool=pool)
        self.front_end = GrpcFrontEnd(self.runtime)
        self.servicer = self.front_end.servicer
        self.lifecycle = self.runtime.lifecycle

    @property
    def port(self) -> int:
        """The TCP port that gRPC listens on."""
        return self.front_end.port

    @property
    def place(self) -> str:
        """The address of the gRPC port for log messages and people."""
        return self.front_end.place

    @property
    def admin_port(self) -> int | None:
        """The TCP port of the admin pages; None without them."""
        return self.runtime.admin_port

    async def start(self) -> None:
        """Bind the port and answer health checks; calls are refused until ``load`` has finished."""
        await self.runtime.start([self.front_end])

    async def load(self) -> None:
        """Load the engine, warm it up and serve."""
        await self.runtime.load()

    async def stop(self, grace_s: float | None = None) -> bool:
        """Drain and close the server. Returns False if the engine did not close in time."""
        return await self.runtime.stop(grace_s)


async def serve(
    settings: Settings,
    engine: Engine,
    registry: Registry,
    *,
    pool: GrammarPool | None = None,
    on_ready: Callable[[VisionServer], None] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; see ``service.runtime.serve``.

    on_ready: called once, when health has become SERVING.
    """
    server = VisionServer(settings, engine, registry, pool=pool)
    ready = None if on_ready is None else partial(on_ready, server)
    await runtime.serve(server.runtime, [server.front_end], on_ready=ready)


def _refuse_a_socket_in_use(path: Path) -> None:
    """Refuse a Unix socket on which another process listens; gRPC would replace its file."""
    with socket.socket(socket.AF_UNIX) as attempt:
        try:
            attempt.connect(str(path))
        except OSError:  # no such file, or the server that created it has ended
            return
    raise SettingsError(f"host: cannot listen on unix:{path}; another process listens on it")


def options(settings: Settings, connections: int) -> list[tuple[str, int]]:
    """Channel arguments of gRPC core. connections: maximum number of them."""
    compression = [] if settings.compressed_requests else [AS_SENT]
    return [
        *compression,
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.so_reuseport", 0),  # without it, two servers could share a port
        *connection_options(settings, connections),
    ]
