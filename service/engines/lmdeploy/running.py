"""Runs and cancels one request inside LMDeploy."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

logger = logging.getLogger(__name__)

END_LIMIT_S = 5.0
"""Maximum time, in seconds, that a cancelled caller waits for LMDeploy to release its request."""


class Instance(Protocol):
    """A request handle of LMDeploy: ``TurboMindInstance``, or the PyTorch ``EngineInstance``."""

    def async_stream_infer(self, session_id: int, **arguments: Any) -> AsyncGenerator[Any, None]:
        """Outputs with ``status`` and ``token_ids``; the last has another status than SUCCESS."""
        ...

    async def async_cancel(self, session_id: int) -> None:
        """Ask the engine to end the request."""
        ...


class Run:
    """Iterates over one request of LMDeploy in a separate task.

    LMDeploy's generator swallows a cancellation and then waits forever. So the task is never
    cancelled: ``stop`` asks the engine to cancel the request, and the generator then ends normally.
    """

    def __init__(self, instance: Instance, session_id: int, arguments: dict[str, Any]) -> None:
        self._instance = instance
        self._session_id = session_id
        self._arguments = arguments
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._sent = False
        self._stopping: asyncio.Task[None] | None = None
        self._pump = asyncio.create_task(self._iterate(), name=f"lmdeploy-{session_id}")

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when LMDeploy has released the request; at once if it already has."""
        if self._pump.done():
            callback()
        else:
            self._pump.add_done_callback(lambda _: callback())

    async def outputs(self) -> AsyncGenerator[Any, None]:
        """Yield LMDeploy's outputs. Raises the errors of LMDeploy."""
        while (output := await self._outputs.get()) is not None:
            if isinstance(output, Exception):
                try:
                    raise output
                finally:
                    del output  # its traceback references this frame
            yield output

    async def stop(self) -> None:
        """Cancel the request in the engine if it still runs, and wait for its end.

        The cancellation in the engine continues even if this coroutine is cancelled.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name=f"stop-{self._session_id}")
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        if self._pump.done():
            return
        if not self._sent:
            self._pump.cancel()  # LMDeploy has not received the request yet
        else:
            try:
                await self._instance.async_cancel(self._session_id)
            except Exception:
                logger.exception("LMDeploy could not cancel request %d", self._session_id)
        _, pending = await asyncio.wait({self._pump}, timeout=END_LIMIT_S)
        if pending:
            logger.error("request %d did not end %.0f s after it was cancelled",
                         self._session_id, END_LIMIT_S)  # fmt: skip

    async def _iterate(self) -> None:
        try:
            arguments, self._arguments = (
                self._arguments,
                {},
            )  # release the pixels after they were passed on
            stream = self._instance.async_stream_infer(self._session_id, **arguments)
            del arguments
            self._sent = True
            async for output in stream:
                self._outputs.put_nowait(output)
        except Exception as error:  # passed to the reader
            self._outputs.put_nowait(error)
        finally:
            self._outputs.put_nowait(None)


class ImageGate:
    """Limits the number of images in the engine that are not encoded yet.

    First come, first served. A request with more images than the limit enters alone. Not
    thread-safe: belongs to one event loop.
    """

    def __init__(self, most: int | None) -> None:
        """most: maximum number of images; None means no limit."""
        self.most = most
        self.inside = 0
        self.waiting: deque[Place] = deque()

    def place(self, images: int) -> Place:
        """A place for the images of a request, outside the gate."""
        return Place(self, 0 if self.most is None else min(images, self.most))

    def admit(self) -> None:
        """Let waiting requests in, in order, as long as they fit."""
        while self.waiting and self.inside + self.waiting[0].weight <= (self.most or 0):
            self.waiting.popleft().let_in()


class Place:
    """The state of a request at an `ImageGate`: outside, waiting, inside or left."""

    def __init__(self, gate: ImageGate, weight: int) -> None:
        self.weight = weight
        self._gate = gate
        self._inside = False
        self._turn: asyncio.Future[None] | None = None

    async def enter(self) -> None:
        """Wait until the images may enter. The caller must call ``leave`` afterwards, also after an
        error."""
        if not self.weight:
            return
        self._turn = asyncio.get_running_loop().create_future()
        self._gate.waiting.append(self)
        self._gate.admit()
        await self._turn

    def let_in(self) -> None:
        """Enter. Called by the gate only."""
        self._inside = True
        self._gate.inside += self.weight
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    def leave(self) -> None:
        """Leave: the images are encoded, or will never be. A second call does nothing."""
        if self._inside:
            self._inside = False
            self._gate.inside -= self.weight
        elif self in self._gate.waiting:
            self._gate.waiting.remove(self)
        self._gate.admit()
