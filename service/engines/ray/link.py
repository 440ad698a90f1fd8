"""Links: one connection between a server and each replica, for small requests and their answers.

A call of Ray Serve costs about 1.5 ms of processor time, and each message of its answer more. A link
is a TCP connection for all requests that a server has on a replica, on which everything that is ready
at the same time travels in one message. Ray Serve still places, starts, checks and replaces the
replicas; it carries large requests, and those for which no linked replica has room.

Both ends prove that they know a secret, which travels through Ray, before either reads a pickle.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import pickle
import secrets
import socket
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from service.engines.ray.collecting import Generate, Outbox, Room
from service.engines.ray.messages import Batch

NONCE_BYTES, PROOF_BYTES, LENGTH_BYTES = 32, 32, 8
HELLO_LIMIT_S = 10.0
"""Maximum time to connect, and for the proofs of both ends, in seconds."""
LIVENESS = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
"""Seconds and attempts after which a machine that has vanished is noticed where nothing was sent to it, and
milliseconds where something was. Without the last one that takes a quarter of an hour, and an end that is
there and does not read is never noticed."""
MOST_UNSENT = 4 << 20
"""Number of bytes that wait to be sent to a replica, above which it gets no further requests."""
AGAIN_S = 60.0
"""Time before another attempt to reach a replica that could not be reached, in seconds."""

log = logging.getLogger(__name__)


class LinkLost(Exception):
    """The connection to the replica ended while it had a request."""


class NoRoom(Exception):
    """The replica has as many requests as it may have, or ends; it has not begun this one."""


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where a replica listens, and the secret that both ends know."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class _End(asyncio.Protocol):
    """One end: nonces and proofs, then messages, each of which is a list of values."""

    side, other = b"server", b"replica"

    def __init__(self, secret: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._secret = secret
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._read = bytearray()
        self._hello = deque([(NONCE_BYTES, self._answer_nonce), (PROOF_BYTES, self._check_proof)])
        self._transport: asyncio.Transport | None = None
        self._proven = False
        self._limit: asyncio.TimerHandle | None = None

    @property
    def open(self) -> bool:
        """Whether the other end has proven itself and is there."""
        return self._proven and self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Ray Serve runs uvloop, whose transports are of no class of asyncio.
        self._transport = cast("asyncio.Transport", transport)
        self._limit = self._loop.call_later(HELLO_LIMIT_S, self._transport.abort)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in LIVENESS.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._transport.write(self._nonce)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._limit is not None:
            self._limit.cancel()

    def data_received(self, data: bytes) -> None:
        self._read += data
        while self._hello and len(self._read) >= self._hello[0][0]:
            size, step = self._hello.popleft()
            part = bytes(self._read[:size])
            del self._read[:size]
            if not step(part):
                self.abort()
                return
        while not self._hello and len(self._read) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._read[:LENGTH_BYTES], "big")
            if len(self._read) < end:
                return
            with memoryview(self._read) as view, view[LENGTH_BYTES:end] as packed:
                values = pickle.loads(packed)
            del self._read[:end]
            for value in values:
                self.received(value)

    def _proof(self, side: bytes, nonce: bytes) -> bytes:
        return hmac.digest(self._secret, side + nonce, "sha256")

    def _answer_nonce(self, nonce: bytes) -> bool:
        assert self._transport is not None
        self._transport.write(self._proof(self.side, nonce))
        return True

    def _check_proof(self, proof: bytes) -> bool:
        if not hmac.compare_digest(proof, self._proof(self.other, self._nonce)):
            log.warning("a connection between a server and a replica did not prove itself")
            return False
        assert self._limit is not None
        self._limit.cancel()
        self._proven = True
        self.proven()
        return True

    def send(self, values: list[Any]) -> None:
        if self._transport is not None:
            packed = pickle.dumps(values, pickle.HIGHEST_PROTOCOL)
            self._transport.write(len(packed).to_bytes(LENGTH_BYTES, "big") + packed)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def proven(self) -> None:
        """The other end has proven itself."""

    def received(self, value: Any) -> None:
        raise NotImplementedError


class Link(_End):
    """The end of a server. Use `connect`."""

    def __init__(self, address: LinkAddress) -> None:
        super().__init__(address.secret)
        self.address = address
        self.leaving = False
        """The replica has said that it ends: it finishes the requests that it has."""
        self.listed = True
        """Ray Serve has the replica, and it has answered when it was asked for its address."""
        self.chosen = 0
        """When the link was chosen for the last time, as a number that grows."""
        self.stuck = False
        """The replica does not read."""
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[Batch | Exception]] = {}
        self._out: list[Any] = []
        self._there = self._loop.create_future()

    @property
    def takes(self) -> bool:
        """Whether the replica takes requests."""
        return self.open and self.listed and not self.leaving

    @property
    def active(self) -> int:
        """Number of requests on the link."""
        return len(self._waiting)

    @classmethod
    async def connect(cls, address: LinkAddress) -> Link:
        """Raises ``OSError`` or ``TimeoutError`` where the replica cannot be reached."""
        loop = asyncio.get_running_loop()

        async def connected() -> Link:
            _, link = await loop.create_connection(lambda: cls(address), address.host, address.port)
            try:
                await link._there
            except BaseException:
                link.abort()
                raise
            return link

        return await asyncio.wait_for(connected(), HELLO_LIMIT_S)

    async def run(self, packed: bytes, left_s: float | None) -> AsyncGenerator[Batch, None]:
        """Run one request, as the pickled `GenerateRequest`. Closing the iterator cancels it.

        left_s: as of `Replica.generate`. Raises ``LinkLost``, and ``NoRoom`` before the first batch.
        """
        number, ended = next(self._numbers), False
        answer = self._waiting[number] = asyncio.Queue()
        self._push((number, packed, left_s))
        del packed
        try:
            if not self.open:
                raise LinkLost
            while not ended:
                found = await answer.get()
                if isinstance(found, Exception):
                    ended = True
                    raise found
                ended = found.last
                yield found
        finally:
            del self._waiting[number]
            if not ended:
                self._push((number, None, None))

    def fail(self, error: Exception) -> None:
        """End all requests with an error, and the link."""
        for answer in self._waiting.values():
            answer.put_nowait(error)
        self.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).set_write_buffer_limits(high=MOST_UNSENT)
        super().connection_made(transport)

    def pause_writing(self) -> None:
        self.stuck = True

    def resume_writing(self) -> None:
        self.stuck = False

    def proven(self) -> None:
        if not self._there.done():
            self._there.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if not self._there.done():
            self._there.set_exception(ConnectionError("the replica ended the connection"))
        for answer in self._waiting.values():
            answer.put_nowait(LinkLost())

    def received(self, value: Any) -> None:
        number, batch = value
        if number == LEAVING:
            self.leaving = True
        elif (answer := self._waiting.get(number)) is not None:
            answer.put_nowait(NoRoom() if batch is None else batch)

    def _push(self, value: Any) -> None:
        """Send a value, together with the others of this turn of the event loop."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(value)

    def _flush(self) -> None:
        values, self._out = self._out, []
        self.send(values)


LEAVING = 0
"""In place of the number of a request: the replica takes no further ones."""


class Links:
    """The links of a server to the replicas of a deployment.

    ongoing: maximum number of requests of this server on one replica.
    """

    def __init__(self, ongoing: int) -> None:
        self._ongoing = ongoing
        self._links: list[Link] = []
        self._unreached: dict[LinkAddress, float] = {}
        """Replicas that cannot be reached, and when the next attempt is due."""
        self._turns = itertools.count(1)

    @property
    def count(self) -> int:
        """Number of replicas that take requests."""
        return sum(link.takes for link in self._links)

    @property
    def settled(self) -> int:
        """Number of replicas that are linked, or for which no attempt is due."""
        now = asyncio.get_running_loop().time()
        return self.count + sum(due > now for due in self._unreached.values())

    def choose(self) -> Link | None:
        """The link with the fewest requests; None where none has room."""
        with_room = [
            link
            for link in self._links
            if link.takes and not link.stuck and link.active < self._ongoing
        ]
        if not with_room:
            return None
        link = min(with_room, key=lambda one: (one.active, one.chosen))
        link.chosen = next(self._turns)
        return link

    async def update(self, addresses: Sequence[LinkAddress]) -> None:
        """Connect to the replicas that are new."""
        self._links = [link for link in self._links if link.open]
        for link in self._links:
            link.listed = link.address in addresses
        now = asyncio.get_running_loop().time()
        self._unreached = {one: due for one, due in self._unreached.items() if one in addresses}
        waits = {link.address for link in self._links}
        waits.update(one for one, due in self._unreached.items() if due > now)
        await asyncio.gather(*(self._connect(one) for one in addresses if one not in waits))

    async def _connect(self, address: LinkAddress) -> None:
        try:
            self._links.append(await Link.connect(address))
            self._unreached.pop(address, None)
        except (OSError, asyncio.TimeoutError) as error:
            log.log(
                logging.DEBUG if address in self._unreached else logging.WARNING,
                "a replica cannot be reached directly (%s): Ray Serve carries all requests to it",
                type(error).__name__,
            )
            self._unreached[address] = asyncio.get_running_loop().time() + AGAIN_S

    def close(self, error: Exception) -> None:
        """End all requests with an error."""
        for link in self._links:
            link.fail(error)
        self._links = []


class Listener:
    """Accepts the links of servers in a replica.

    generate: runs a request. room: for requests at the same time. delay_s: maximum time for which text
    is collected.
    """

    def __init__(
        self,
        generate: Generate,
        room: Room,
        delay_s: float,
    ) -> None:
        self.generate = generate
        self.room = room
        self.delay_s = delay_s
        self.leaving = False
        self._secret = secrets.token_bytes(32)
        self._server: asyncio.Server | None = None
        self._ends: set[_ReplicaEnd] = set()

    async def start(self, host: str) -> LinkAddress:
        """Listen on any free port of this address."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _ReplicaEnd(self._secret, self, self._ends), host, 0
        )
        return LinkAddress(host, self._server.sockets[0].getsockname()[1], self._secret)

    def leave(self) -> None:
        """Tell servers to send no further requests. Those that have begun go on."""
        self.leaving = True
        if self._server is not None:
            self._server.close()
        for end in self._ends:
            if end.open:
                end.send([(LEAVING, None)])


class _ReplicaEnd(_End):
    """The end of a replica: the requests of one server."""

    side, other = b"replica", b"server"

    def __init__(self, secret: bytes, listener: Listener, ends: set[_ReplicaEnd]) -> None:
        super().__init__(secret)
        self._listener = listener
        self._ends = ends
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._outbox = Outbox(listener.delay_s, self.send)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._ends.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._ends.discard(self)
        for task in self._tasks.values():
            task.cancel()

    def received(self, value: Any) -> None:
        number, packed, left_s = value
        if packed is None:
            if (running := self._tasks.get(number)) is not None:
                running.cancel()
        else:
            task = self._loop.create_task(self._answer(number, packed, left_s), name="link-request")
            self._tasks[number] = task
            task.add_done_callback(lambda _: self._tasks.pop(number))

    async def _answer(self, number: int, packed: bytes, left_s: float | None) -> None:
        listener = self._listener
        if listener.leaving or listener.room.full:
            self.send([(number, None)])
            return
        async with listener.room:  # at once
            await self._outbox.answer(number, listener.generate, packed, left_s)
