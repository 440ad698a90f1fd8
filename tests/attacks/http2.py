"""A small HTTP/2 client that does what no gRPC client does: no flow control window, half a body."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 1, 4
DEFAULT_WINDOW = 65_535
MAX_FRAME = 16_384

Pairs = Sequence[tuple[bytes, bytes]]


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream)
    return head + payload


def header(name: bytes, value: bytes) -> bytes:
    """HPACK: a literal without index and without Huffman code; at most 126 bytes each."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def headers(path: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """The header block of a gRPC call."""
    pairs: Pairs = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"test"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *extra,
    )
    return b"".join(header(*pair) for pair in pairs)


def message(body: bytes, *, compressed: bool = False, length: int | None = None) -> bytes:
    """A gRPC message with its prefix. length: what the prefix says, in place of the true one."""
    size = len(body) if length is None else length
    return bytes([compressed]) + struct.pack(">I", size) + body


class Connection:
    """One connection. Obeys the server's flow control, so that the server has nothing to object to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._next = 1
        self._window = self._initial = DEFAULT_WINDOW
        self._windows: dict[int, int] = {}
        self._grown = asyncio.Event()
        self.ended: dict[int, asyncio.Future[str]] = {}
        self.data: dict[int, bytes] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, host: str, port: int, window: int = DEFAULT_WINDOW) -> Connection:
        """Connect. window: bytes that the server may send on each stream before it is told more."""
        reader, writer = await asyncio.open_connection(host, port)
        # Without a table every header comes as text.
        settings = struct.pack(">HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, window)
        writer.write(PREFACE + frame(SETTINGS, 0, 0, settings))
        return cls(reader, writer)

    @property
    def initial_window(self) -> int:
        """Bytes that the server lets a caller send on a stream that it has not read yet."""
        return self._initial

    def call(self, path: bytes, body: bytes | None, *extra: tuple[bytes, bytes]) -> int:
        """Begin a call; returns its stream. body: all of a small request; None sends none yet.

        ``ended[stream]`` gets ``trailers``, ``reset`` or ``closed``.
        """
        stream, self._next = self._next, self._next + 2
        self._windows[stream] = self._initial
        self.ended[stream] = asyncio.get_running_loop().create_future()
        self.data[stream] = b""
        self._writer.write(frame(HEADERS, END_HEADERS, stream, headers(path, *extra)))
        if body is not None:
            parts = [body[at : at + MAX_FRAME] for at in range(0, len(body), MAX_FRAME)] or [b""]
            for part in parts[:-1]:
                self._writer.write(frame(DATA, 0, stream, part))
            self._writer.write(frame(DATA, END_STREAM, stream, parts[-1]))
            self._window -= len(body)
        return stream

    async def send(self, stream: int, body: bytes) -> None:
        """Send a part of a body, as fast as the server's windows allow; ends early with the call."""
        rest = memoryview(body)
        while rest and not self.ended[stream].done():
            room = min(self._window, self._windows[stream], MAX_FRAME, len(rest))
            if room <= 0:
                self._grown.clear()
                await self._grown.wait()
                continue
            self._window -= room
            self._windows[stream] -= room
            self._writer.write(frame(DATA, 0, stream, bytes(rest[:room])))
            rest = rest[room:]
            await self._writer.drain()

    def finish(self, stream: int) -> None:
        """No more of the body comes."""
        self._writer.write(frame(DATA, END_STREAM, stream, b""))

    async def close(self) -> None:
        """Close the connection."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._take(head[3], head[4], int.from_bytes(head[5:9], "big"), payload)
        except (asyncio.IncompleteReadError, OSError):
            for ended in self.ended.values():
                if not ended.done():
                    ended.set_result("closed")
            self._grown.set()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, at)
                if name == INITIAL_WINDOW_SIZE:
                    change, self._initial = value - self._initial, value
                    self._windows = {key: had + change for key, had in self._windows.items()}
            self._writer.write(frame(SETTINGS, ACK, 0, b""))
            self._grown.set()
        elif kind == PING and not flags & ACK:
            self._writer.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            (more,) = struct.unpack(">I", payload)
            if stream:
                self._windows[stream] = self._windows.get(stream, 0) + more
            else:
                self._window += more
            self._grown.set()
        elif kind in (DATA, HEADERS) and stream in self.data:
            self.data[stream] += payload
        if stream in self.ended and not self.ended[stream].done():
            if kind == RST_STREAM:
                self.ended[stream].set_result("reset")
            elif flags & END_STREAM and kind in (DATA, HEADERS):
                self.ended[stream].set_result("trailers")
            self._grown.set()
