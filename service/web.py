"""Serves an ASGI application with uvicorn, inside our event loop and under our signals.

For every part of the server that speaks HTTP. uvicorn is used for the protocol alone: sockets, limits,
signals, logs and the end are ours.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from service.reload import stamp

UNIX = "unix:"
BACKLOG = 512
"""Connections that the kernel keeps until they are accepted."""
TICK_S = 1.0
"""How often the ``date`` header of responses is renewed."""
STOP_GRACE_S = 1.0
FREE_PORT_ATTEMPTS = 5
MAX_TINY = 4096
"""Chunks of a body that may be tiny."""
LENGTH = b"\r\ncontent-length: "
"""Stands in the head of an answer whose length is known; h11 refuses line ends within a header."""
TINY_BYTES = 64
"""Mean size of the chunks of a body below which they are tiny."""


@dataclass(frozen=True, slots=True)
class WebLimits:
    """Bounds of one server.

    There is no limit on the body of a request: the application reads the body and limits its size and
    its time.

    Attributes:
        connections: maximum number of open connections, those in their TLS handshake included; a
            further connection is closed at once.
        header_bytes: maximum size of the request line and headers of one request.
        header_s: time limit to receive them, in seconds; also the time limit of a TLS handshake.
        keep_alive_s: time that a connection stays open without a request, in seconds.
        write_s: time after which a connection is dropped whose peer reads nothing of an answer, in
            seconds.
    """

    connections: int = 1000
    header_bytes: int = 32 * 1024
    header_s: float = 10.0
    keep_alive_s: int = 75
    write_s: float = 15.0


class WebServer:
    """One listener for an application. ``start``, then ``stop``, however far it came.

    The application may call ``scope["state"]["abort"]()``, which closes the connection at once; what
    has not been sent is lost.

    host: an address, a name, or ``unix:PATH``.
    port: 0 lets the system choose a port.
    tls: see ``server_tls``.
    bad_request: JSON that is the answer to bytes that are not an HTTP request; by default the answer
        is a line of text.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        limits: WebLimits | None = None,
        bad_request: bytes | None = None,
    ) -> None:
        limits = limits or WebLimits()
        handshakes = _Handshakes(tls, limits)
        self._host, self._port = host, port
        self._sockets: list[socket.socket] = []
        self._serving: asyncio.Task[None] | None = None
        self._server = _Server(
            uvicorn.Config(
                app,
                # uvicorn only calls it.
                http=_limited(limits, bad_request, handshakes),  # type: ignore[arg-type]
                ws="none",
                interface="asgi3",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=limits.header_bytes,
                timeout_keep_alive=limits.keep_alive_s,
                backlog=BACKLOG,
            ),
            handshakes,
            limits.write_s,
        )

    @property
    def port(self) -> int:
        """The TCP port that is bound; what was asked for before ``start``, and for a Unix socket."""
        if not self._sockets or self._sockets[0].family == socket.AF_UNIX:
            return self._port
        return int(self._sockets[0].getsockname()[1])

    @property
    def connections(self) -> int:
        """Connections that are open, those in their TLS handshake included."""
        return len(self._server.server_state.connections) + len(self._server.handshakes)

    async def start(self) -> None:
        """Listen and serve. Raises ``OSError`` when the address cannot be listened on."""
        self._sockets = await _listeners(self._host, self._port)
        self._serving = asyncio.create_task(self._server.serve(self._sockets), name="web")
        up = asyncio.create_task(self._server.up.wait())
        await asyncio.wait((up, self._serving), return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if self._serving.done():
            self._serving.result()
            raise RuntimeError("the HTTP server ended while it started")

    async def serve(self) -> None:
        """Wait while requests are served. Raises when that ends without ``stop``; may be cancelled."""
        assert self._serving is not None
        await asyncio.wait([self._serving])
        self._serving.result()
        raise RuntimeError("the HTTP server ended by itself")

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Close the listener and idle connections, give requests the grace, then cut what is left."""
        if self._serving is not None and not self._serving.done():
            self._server.leave(grace_s)
            await asyncio.wait([self._serving])
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
        for one in self._sockets:
            one.close()
        if self._sockets and self._host.startswith(UNIX):
            with suppress(FileNotFoundError):
                os.unlink(self._host.removeprefix(UNIX))
        self._sockets = []


def server_tls(cert: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """TLS of a server. Files that have changed are used from the next handshake on.

    client_ca: callers then need a certificate of this CA. Raises ``OSError`` for a file that cannot
    be used, also for a key that is not the certificate's or that needs a password.
    """

    def read() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, password=lambda: "")
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    paths = [path for path in (cert, key, client_ca) if path is not None]
    known, current = stamp(paths), read()

    def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal known, current
        try:
            found = stamp(paths)
            if found != known:
                current = read()
                known = found
        except OSError:  # in the middle of a renewal: the old files stay in use
            pass
        connection.context = current

    first = current
    first.sni_callback = renew  # called in every handshake
    return first


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with an end that starts at once."""

    def __init__(self, config: uvicorn.Config, handshakes: _Handshakes, write_s: float) -> None:
        super().__init__(config)
        self.handshakes = handshakes
        self._write_s = write_s
        self.up = asyncio.Event()
        self._leaving = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to ``service.runtime``."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            self._drop_unread()
            leaving = asyncio.ensure_future(self._leaving.wait())
            await asyncio.wait([leaving], timeout=TICK_S)
            leaving.cancel()

    def _drop_unread(self) -> None:
        """Abort connections whose peer has read nothing for too long; closing would wait for it."""
        now = asyncio.get_running_loop().time()
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            if connection.transport.get_write_buffer_size() == 0:
                connection.unread_since = None
            elif connection.unread_since is None:
                connection.unread_since = now
            elif now - connection.unread_since > self._write_s:
                connection.transport.abort()

    def leave(self, grace_s: float) -> None:
        """End ``serve``; requests in flight get the grace, TLS handshakes do not."""
        self.handshakes.close()
        self.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # any number
        self.should_exit = True
        self._leaving.set()


class _Handshakes:
    """The TLS handshakes of a server. They are in its limit on connections, and end in time.

    tls: None for a server without TLS, which has no handshakes.
    """

    def __init__(self, tls: ssl.SSLContext | None, limits: WebLimits) -> None:
        self.tls = tls
        self.limits = limits
        self.closed = False
        self._open: set[_Handshake] = set()

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, one: _Handshake, connections: int) -> bool:
        """Count a handshake. Returns False where there is no room beside that many connections."""
        if self.closed or len(self) + connections >= self.limits.connections:
            return False
        self._open.add(one)
        return True

    def end(self, one: _Handshake) -> None:
        self._open.discard(one)

    def close(self) -> None:
        """Abort what is open, and refuse what comes."""
        self.closed = True
        for one in list(self._open):
            one.abort()


class _Handshake(asyncio.Protocol):
    """A connection up to the end of its TLS handshake, which then goes to the protocol of HTTP.

    asyncio's own listener with TLS tells its protocol of a connection only after the handshake. A peer
    could open any number of connections and leave their handshakes unfinished.
    """

    def __init__(self, protocol: H11Protocol, handshakes: _Handshakes) -> None:
        self._protocol = protocol
        self._handshakes = handshakes
        self._raw: asyncio.Transport | None = None
        self._working: asyncio.Task[None] | None = None
        self._early: list[bytes] = []
        self._lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        if self._handshakes.begin(self, len(self._protocol.connections)):
            self._working = asyncio.create_task(self._secure(transport), name="handshake")
        else:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """What came with the last message of the handshake."""
        self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True

    def abort(self) -> None:
        """Close the connection at once."""
        assert self._raw is not None
        assert self._working is not None
        self._handshakes.end(self)
        self._raw.abort()
        self._working.cancel()

    async def _secure(self, raw: asyncio.Transport) -> None:
        secured = None
        try:
            secured = await asyncio.get_running_loop().start_tls(
                raw,
                self,
                self._handshakes.tls,  # type: ignore[arg-type]  # there are handshakes with TLS alone
                server_side=True,
                ssl_handshake_timeout=self._handshakes.limits.header_s,
            )
        except OSError:  # not TLS, too late, or the peer has gone
            pass
        finally:
            self._handshakes.end(self)
            if secured is None or self._lost:
                raw.abort()
        if secured is None or self._lost:
            return
        secured.set_protocol(self._protocol)
        self._protocol.connection_made(secured)
        for data in self._early:
            self._protocol.data_received(data)


def _limited(
    limits: WebLimits, bad_request: bytes | None, handshakes: _Handshakes
) -> Callable[..., asyncio.Protocol]:
    """Makes the protocol of one connection, with the limits that uvicorn does not have."""

    class Limited(H11Protocol):
        def __init__(self, config: Any, server_state: ServerState, **more: Any) -> None:
            super().__init__(config, server_state, **more)
            self._late: asyncio.TimerHandle | None = None
            self.unread_since: float | None = None
            self._next_event, self._send_event = self.conn.next_event, self.conn.send
            self.conn.next_event = self._counted_event  # type: ignore[method-assign]
            self.conn.send = self._joined  # type: ignore[assignment, method-assign]
            self._pieces = self._piece_bytes = 0
            self._head = b""

        def _counted_event(self) -> Any:
            """The next event of h11. A body in very many tiny chunks is not HTTP that anybody needs:
            each chunk costs as much as a large one, and all that came at once are read in one go.

            ``isinstance`` would ask the metaclass of the events, which takes longer."""
            event = self._next_event()
            if type(event) is h11.Data:
                self._pieces += 1
                self._piece_bytes += len(event.data)
                if self._pieces > MAX_TINY and self._piece_bytes < TINY_BYTES * self._pieces:
                    raise h11.RemoteProtocolError("the chunks of the body are too small")
            elif type(event) is h11.Request:
                self._pieces = self._piece_bytes = 0
            return event

        def _joined(self, event: Any) -> bytes | None:
            """The bytes of an event. The head of an answer whose length is known waits for its body:
            uvicorn writes each event by itself, and a system call costs more than small answers do."""
            found: bytes | None = self._send_event(event)
            if found and type(event) is h11.Response and LENGTH in found:
                self._head = found
                return b""
            if self._head:
                found, self._head = self._head + (found or b""), b""
            return found

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.app_state = {**self.app_state, "abort": transport.abort}
            if len(self.connections) + len(handshakes) > limits.connections:
                transport.abort()
            else:
                self._await_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()  # a request is being answered
            elif self._late is None:
                self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            if bad_request is None:
                super().send_400_response(msg)
                return
            # h11 may have no state left in which it could write this answer.
            head = f"content-type: application/json\r\ncontent-length: {len(bad_request)}\r\n"
            self.transport.write(
                f"HTTP/1.1 400 Bad Request\r\n{head}connection: close\r\n\r\n".encode()
                + bad_request
            )
            self.transport.close()

        def _await_headers(self) -> None:
            self._late = self.loop.call_later(limits.header_s, self.transport.abort)

        def _forget(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    def protocol(**options: Any) -> asyncio.Protocol:
        found = Limited(**options)
        return found if handshakes.tls is None else _Handshake(found, handshakes)

    return protocol


async def _listeners(host: str, port: int) -> list[socket.socket]:
    """Bound sockets, one for each address of the host, all with the same port."""
    if host.startswith(UNIX):
        return [_unix_listener(host.removeprefix(UNIX))]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for _ in range(FREE_PORT_ATTEMPTS if port == 0 else 0):
        try:
            return _bound(addresses, port)
        except OSError as error:  # the port that one address got may be taken at another
            if error.errno != errno.EADDRINUSE:
                raise
    return _bound(addresses, port)


def _bound(addresses: Sequence[tuple[int, Any]], port: int) -> list[socket.socket]:
    bound: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in addresses:
            try:
                # With its protocol: asyncio sets TCP_NODELAY for these alone. Without it, the end of
                # a response waits 40 ms for an acknowledgement.
                one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
                bound.append(one)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
                one.bind((address[0], bound[0].getsockname()[1] or port, *address[2:]))
            except OSError as error:
                # A name may have addresses that this machine has not, such as ::1 without IPv6.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
                while bound and bound[-1].getsockname()[1] == 0:
                    bound.pop().close()
        if not bound and missing is not None:
            raise missing
    except OSError:
        for one in bound:
            one.close()
        raise
    return bound


def _unix_listener(path: str) -> socket.socket:
    """A Unix socket in place of the file of a server that has ended, never of one that listens."""
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as attempt:
                if attempt.connect_ex(path) == 0:
                    raise OSError(f"another process listens on {UNIX}{path}")
            os.unlink(path)
        one.bind(path)
    except OSError:
        one.close()
        raise
    return one
