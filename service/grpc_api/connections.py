"""Connections of the gRPC port: how many, for how long, and what the log says when they run out.

Each connection takes a file descriptor. When a process has none left, gRPC accepts no connection, and
callers wait in the queue of the kernel without an answer. A bound below the limit of descriptors
closes further connections at once instead, so that callers get UNAVAILABLE and can try elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource

from service.logs import pairs
from service.settings import Settings

MAX_DESCRIPTORS = 65_536
"""Up to here the server raises its own limit of file descriptors, where the system lets it."""
RESERVED = 16
"""File descriptors that are kept for the model, the log, metrics and files that are open for a moment."""
RESERVED_PER_WORKER = 4
FEWEST = 8
FEW = 512
"""A limit on connections below this number is worth a warning when nobody asked for it."""
HANDSHAKE_S = 20.0
"""Time limit for the handshakes of TLS and HTTP/2. Without it, gRPC keeps a silent connection for 120 s."""
GRACE_S = 10.0
"""How much longer than ``inference_timeout_s`` a connection that is too old is kept for its calls."""
MAX_PENDING = 768
"""Calls of one method that this process has not accepted yet. gRPC cancels further calls. It accepts some
thousand calls per second, so only a flood fills this; gRPC's own limit is 3,000."""
CHECK_INTERVAL_S = 1.0
FULL, FREE = 0.9, 0.8
"""Parts of the limit: where the log warns, and where it says that the warning is over."""
ADVICE = "raise the limit of file descriptors: ulimit -n, LimitNOFILE= of systemd, --ulimit nofile= of Docker"

log = logging.getLogger(__name__)


def raise_descriptor_limit() -> None:
    """Take as many file descriptors as the system allows, up to MAX_DESCRIPTORS.

    Many systems begin with 1,024 for the sake of programs that use ``select``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS allows less than it says
        log.debug("the limit of file descriptors stays at %d", soft)


def connection_limit(settings: Settings) -> int:
    """The maximum number of connections: the setting, or what the file descriptors allow.

    Warns where they allow less than the setting, or few.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = MAX_DESCRIPTORS
    reserved = RESERVED + RESERVED_PER_WORKER * settings.compile_workers
    allowed = max(FEWEST, soft - open_descriptors() - reserved)
    wanted = settings.max_connections
    if (wanted or FEW) > allowed:
        log.warning(
            "few connections are possible; %s %s",
            ADVICE,
            pairs(connections=allowed, file_descriptors=soft),
        )
    return allowed if wanted is None else min(wanted, allowed)


def connection_options(settings: Settings, limit: int) -> list[tuple[str, int]]:
    """Channel arguments of gRPC core. limit: maximum number of connections.

    Pings keep connections through NATs alive and detect dead peers; a caller may ping every 10 s.

    A request that nobody reads, such as one without a key, takes at most ``read_ahead_bytes``. By
    default gRPC lets a caller with a fast connection send megabytes ahead on each call
    (``bdp_probe``), and 800 calls without a key then take 500 MB.
    """
    found = [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", settings.read_ahead_bytes),
        ("grpc.server.max_pending_requests", MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
        ("grpc.max_allowed_incoming_connections", limit),
        ("grpc.max_concurrent_streams", settings.max_streams),
        ("grpc.server_handshake_timeout_ms", _ms(HANDSHAKE_S)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if settings.max_connection_idle_s:
        found.append(("grpc.max_connection_idle_ms", _ms(settings.max_connection_idle_s)))
    if settings.max_connection_age_s:
        grace_s = settings.inference_timeout_s + GRACE_S
        found.append(("grpc.max_connection_age_ms", _ms(settings.max_connection_age_s)))
        found.append(("grpc.max_connection_age_grace_ms", _ms(grace_s)))
    return found


class ConnectionWatch:
    """Says in the log when nearly all connections are taken, and when that is over."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._others: int | None = None
        self._full = False

    def begin(self) -> None:
        """Call when the server has opened what it needs: what comes now is connections."""
        if self._others is None:
            self._others = open_descriptors()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if self._others is not None:
                self._check(await asyncio.to_thread(open_descriptors) - self._others)

    def _check(self, connections: int) -> None:
        numbers = pairs(connections=connections, limit=self._limit)
        if not self._full and connections >= FULL * self._limit:
            self._full = True
            log.warning("nearly all connections are taken; further ones are closed %s", numbers)
        elif self._full and connections < FREE * self._limit:
            self._full = False
            log.info("connections are free again %s", numbers)


def open_descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(os.listdir("/dev/fd")) - 1  # the folder itself is one of them


def _ms(seconds: float) -> int:
    """For a channel argument, which has 32 bits."""
    return min(round(seconds * 1000), 2**31 - 1)
