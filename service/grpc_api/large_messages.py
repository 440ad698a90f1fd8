"""Takes large messages one after the other, with pauses, so that the event loop serves others meanwhile.

gRPC copies a message into a Python object when it has arrived, on the event loop. Parsing the message and
copying its images take the GIL. With 57 MB each step takes about 25 milliseconds of processor time, and on a
busy machine a multiple of it, during which nobody is served; where a step gets the memory of an earlier
one, it takes 5. Many such messages often arrive at the same time: without this module, a health check would
wait for the steps of all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from service import heap

T = TypeVar("T")

LARGE_BYTES = 256 * 1024
"""Size above which a message is worked on in the thread: below, the change of threads costs more."""
ARRIVAL_S = 0.05
"""The size of a message is known only when it was copied. A message that took longer than this to arrive
may be large, and waits for its turn."""
PAUSES = 3.0
"""Pause after a step, times the time that the step took. A health check needs several turns of the event
loop, each of which may wait for a processor; with a pause as long as the step, many of the checks that
waited for one step waited for the next one, too."""
MAX_PAUSE_S = 0.2
"""Maximum pause after a step."""
BRIEF_S = 0.005
"""No pause follows a step that took less: a thread that computes in Python keeps the GIL as long."""
received_bytes: ContextVar[int] = ContextVar("received_bytes", default=LARGE_BYTES + 1)
"""Size of the request of this call; large where the transport does not say. protobuf's ``ByteSize`` writes
the whole message to count its bytes."""
_LARGE = ThreadPoolExecutor(1, thread_name_prefix="large-message")


class LargeMessages:
    """The steps of large messages, one at a time, with a pause after each.

    A message that was copied is parsed, and decoded if possible, before the next one is copied: the
    next one then gets its memory. Not thread-safe: belongs to one event loop.
    """

    def __init__(self) -> None:
        self._turn = _Turn()
        self._blocks = heap.LargeBlocks()

    def next(self) -> Message:
        """A message that is about to arrive."""
        return Message(self._turn, self._blocks)

    async def off_loop(self, size: int, work: Callable[..., T], *arguments: object) -> T:
        """The result of ``work(*arguments)``, which takes its time with ``size`` bytes. With more than
        LARGE_BYTES it runs in a thread, before messages that have not begun."""
        if size <= LARGE_BYTES:
            return work(*arguments)
        with self.next() as message:
            # Images stay: in memory that is used again they would be in the way of the next message.
            return await message._in_thread(nullcontext(), work, *arguments)


class Message:
    """A message that arrives and is parsed, and no other in between. To be used with ``with``."""

    def __init__(self, turn: _Turn, blocks: heap.LargeBlocks) -> None:
        self._turn = turn
        self._blocks = blocks
        self._held = False
        self._pause_ends = 0.0

    def __enter__(self) -> Message:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._held:
            return
        self._held = False
        left_s = self._pause_ends - time.perf_counter()
        if left_s > 0:
            asyncio.get_running_loop().call_later(left_s, self._turn.release)
        else:
            self._turn.release()

    def received(self, read: Awaitable[T]) -> Awaitable[T]:
        """The bytes that gRPC's ``read`` returns, copied when it is their turn.

        Messages that arrive within ARRIVAL_S do not wait.
        """
        return _Read(self, read)

    async def parsed(self, data: bytes, parse: Callable[[bytes], T]) -> T:
        """The result of ``parse(data)``. With more than LARGE_BYTES it runs in a thread."""
        if len(data) <= LARGE_BYTES:
            return parse(data)
        return await self._in_thread(self._blocks, parse, data)

    async def _in_thread(
        self, memory: AbstractContextManager[None], work: Callable[..., T], *arguments: object
    ) -> T:
        await self._begin(first=True)
        begun = time.perf_counter()
        try:
            with memory:
                return await asyncio.get_running_loop().run_in_executor(_LARGE, work, *arguments)
        finally:
            self._end(begun)

    async def _begin(self, *, first: bool = False) -> None:
        """Wait for the turn; where it is ours, for the end of the pause."""
        if not self._held:
            await self._turn.acquire(first=first)
            self._held = True
        elif (left_s := self._pause_ends - time.perf_counter()) > 0:
            await asyncio.sleep(left_s)

    def _end(self, begun: float) -> None:
        """A step has ended; the next one begins after a pause."""
        now = time.perf_counter()
        took_s = now - begun
        self._pause_ends = now + (min(PAUSES * took_s, MAX_PAUSE_S) if took_s >= BRIEF_S else 0.0)


class _Turn:
    """A lock. Those who come with ``first`` get it before the others, else whoever came first."""

    def __init__(self) -> None:
        self._taken = False
        self._places: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())

    @property
    def taken(self) -> bool:
        return self._taken

    @property
    def waiting(self) -> int:
        return sum(not place.done() for places in self._places for place in places)

    async def acquire(self, *, first: bool = False) -> None:
        if not self._taken:
            self._taken = True
            return
        place = asyncio.get_running_loop().create_future()
        self._places[not first].append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it has got the turn meanwhile
                self.release()
            raise

    def release(self) -> None:
        """Pass the turn on."""
        for places in self._places:
            while places:
                place = places.popleft()
                if not place.done():
                    place.set_result(None)
                    return
        self._taken = False


class _Read(Generic[T]):
    """Drives gRPC's coroutine: its last step, after the message has arrived, copies the message."""

    def __init__(self, message: Message, read: Awaitable[T]) -> None:
        self._message = message
        self._read = read

    def __await__(self) -> Generator[Any, Any, T]:
        message, steps = self._message, self._read.__await__()
        error: BaseException | None = None
        called = started = time.perf_counter()
        while True:
            try:
                if error is not None:
                    waits_for = steps.throw(error)
                elif message._held:
                    with message._blocks:
                        waits_for = next(steps)
                else:
                    waits_for = next(steps)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            finally:
                error = None  # its traceback has this frame: a cycle, which would keep the request
                if message._held:
                    message._end(started)
            try:
                yield waits_for
                if time.perf_counter() - called > ARRIVAL_S:
                    yield from message._begin().__await__()
            except BaseException as thrown:
                error = thrown
            started = time.perf_counter()
