"""Takes large messages one after the other, with pauses, so that the event loop serves others meanwhile.

gRPC copies a message into a Python object when it has arrived, on the event loop. Parsing the message and
copying its images take the GIL. With 57 MB each step takes 20 to 60 milliseconds, during which nobody
is served; gRPC's copy takes 10 where it gets the memory of an earlier one. Many such messages often
arrive at the same time: without this module, a health check would wait for the steps of all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from service import heap

T = TypeVar("T")

LARGE_BYTES = 256 * 1024
"""Size above which a message is worked on in the thread: below, the change of threads costs more."""
ARRIVAL_S = 0.05
"""The size of a message is known only when it was copied. A message that took longer than this to arrive
may be large, and waits for its turn."""
MAX_PAUSE_S = 0.05
"""Maximum pause after a step. A health check needs a few turns of the event loop, some milliseconds."""
BRIEF_S = 0.001
"""No pause follows a step that took less."""
received_bytes: ContextVar[int] = ContextVar("received_bytes", default=LARGE_BYTES + 1)
"""Size of the request of this call; large where the transport does not say. protobuf's ``ByteSize`` writes
the whole message to count its bytes."""
_LARGE = ThreadPoolExecutor(1, thread_name_prefix="large-message")


class LargeMessages:
    """The steps of large messages, one at a time, in the order in which they are ready.

    A pause as long as the step follows each step. Not thread-safe: belongs to one event loop.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._blocks = heap.LargeBlocks()

    def received(self, read: Awaitable[T]) -> Awaitable[T]:
        """The message that gRPC's ``read`` returns, copied when it is its turn.

        Messages that arrive within ARRIVAL_S do not wait.
        """
        return _Read(self, read)

    async def off_loop(self, size: int, work: Callable[..., T], *arguments: object) -> T:
        """The result of ``work(*arguments)``, which takes its time with ``size`` bytes. With more than
        LARGE_BYTES it runs in a thread."""
        if size <= LARGE_BYTES:
            return work(*arguments)
        await self._turn.acquire()
        begun = time.perf_counter()
        try:
            return await asyncio.get_running_loop().run_in_executor(_LARGE, work, *arguments)
        finally:
            self._end_turn(begun)

    def _end_turn(self, begun: float) -> None:
        """Let the next step begin after a pause."""
        took_s = time.perf_counter() - begun
        if took_s < BRIEF_S:
            self._turn.release()
        else:
            pause_s = min(took_s, MAX_PAUSE_S)
            asyncio.get_running_loop().call_later(pause_s, self._turn.release)


class _Read(Generic[T]):
    """Drives gRPC's coroutine: its last step, after the message has arrived, copies the message."""

    def __init__(self, messages: LargeMessages, read: Awaitable[T]) -> None:
        self._messages = messages
        self._read = read

    def __await__(self) -> Generator[Any, Any, T]:
        turn, steps = self._messages._turn, self._read.__await__()
        error: BaseException | None = None
        called = started = time.perf_counter()
        held = False
        while True:
            try:
                if error is not None:
                    waits_for = steps.throw(error)
                elif held:
                    with self._messages._blocks:
                        waits_for = next(steps)
                else:
                    waits_for = next(steps)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            finally:
                error = None  # its traceback has this frame: a cycle, which would keep the request
                if held:
                    self._messages._end_turn(started)
                    held = False
            try:
                yield waits_for
                if time.perf_counter() - called > ARRIVAL_S:
                    yield from turn.acquire().__await__()
                    held = True
            except BaseException as thrown:
                error = thrown
            started = time.perf_counter()
