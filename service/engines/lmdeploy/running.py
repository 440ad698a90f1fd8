"""One request inside LMDeploy, and the end of it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

logger = logging.getLogger(__name__)

END_LIMIT_S = 5.0
"""How long a caller who goes away waits for the engine to let its request go."""


class Instance(Protocol):
    """A request handle of LMDeploy: ``TurboMindInstance``, or the PyTorch ``EngineInstance``."""

    def async_stream_infer(self, session_id: int, **arguments: Any) -> AsyncGenerator[Any, None]:
        """Outputs with ``status`` and ``token_ids``; the last has another status than SUCCESS."""
        ...

    async def async_cancel(self, session_id: int) -> None:
        """Ask the engine to end the request."""
        ...


class Run:
    """Iterates one request of LMDeploy in a task of its own.

    LMDeploy's generator swallows a cancellation that is thrown into it and then waits inside. So
    nothing is ever thrown into it: ``stop`` asks the engine to cancel, and the generator comes to
    its end by itself.
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
        """Call back when LMDeploy holds nothing of the request any more; at once if it does not."""
        if self._pump.done():
            callback()
        else:
            self._pump.add_done_callback(lambda _: callback())

    async def outputs(self) -> AsyncGenerator[Any, None]:
        """LMDeploy's outputs as they come. Raises what LMDeploy raised."""
        while (output := await self._outputs.get()) is not None:
            if isinstance(output, Exception):
                try:
                    raise output
                finally:
                    del output  # its traceback holds this frame
            yield output

    async def stop(self) -> None:
        """End the request in the engine, if it has not ended, and wait until it has.

        A caller who is cancelled while he waits does not keep that from happening.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name=f"stop-{self._session_id}")
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        if self._pump.done():
            return
        if not self._sent:
            self._pump.cancel()  # LMDeploy has not seen it
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
            )  # pixels need not outlive the hand-over
            stream = self._instance.async_stream_infer(self._session_id, **arguments)
            del arguments
            self._sent = True
            async for output in stream:
                self._outputs.put_nowait(output)
        except Exception as error:  # handed to whoever reads
            self._outputs.put_nowait(error)
        finally:
            self._outputs.put_nowait(None)


class ImageGate:
    """Bounds how many images are in the engine and have not been looked at yet.

    First come, first served; a request with more images than the bound goes alone. Lives on one
    event loop.
    """

    def __init__(self, most: int | None) -> None:
        """most: None lets everything through."""
        self.most = most
        self.inside = 0
        self.waiting: deque[Place] = deque()

    def place(self, images: int) -> Place:
        """A place for the images of a request, not entered yet."""
        return Place(self, 0 if self.most is None else min(images, self.most))

    def admit(self) -> None:
        """Let in who fits, in order."""
        while self.waiting and self.inside + self.waiting[0].weight <= (self.most or 0):
            self.waiting.popleft().let_in()


class Place:
    """A request at a `ImageGate`: outside, waiting, inside, and gone for good."""

    def __init__(self, gate: ImageGate, weight: int) -> None:
        self.weight = weight
        self._gate = gate
        self._inside = False
        self._turn: asyncio.Future[None] | None = None

    async def enter(self) -> None:
        """Wait until the images may go in. Whoever calls this calls ``leave``, whatever happens."""
        if not self.weight:
            return
        self._turn = asyncio.get_running_loop().create_future()
        self._gate.waiting.append(self)
        self._gate.admit()
        await self._turn

    def let_in(self) -> None:
        """Called by the gate."""
        self._inside = True
        self._gate.inside += self.weight
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    def leave(self) -> None:
        """The images have been looked at, or never will be. A second call does nothing."""
        if self._inside:
            self._inside = False
            self._gate.inside -= self.weight
        elif self in self._gate.waiting:
            self._gate.waiting.remove(self)
        self._gate.admit()
