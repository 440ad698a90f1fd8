"""What grpcio's asyncio server lacks: it survives one bad packet, and can drop a call.

grpcio (seen in 1.85.1) decodes the path of a call to an unregistered method as UTF-8, in the loop
that accepts calls and without a ``try``. A path with other bytes ends that loop and with it the
server, before any key is asked for. All our methods are registered and arrive by another way, so
calls to all others are answered here with UNIMPLEMENTED, without looking at their path.

Remove when the server of an unguarded grpcio survives ``tests/service/test_wire.py``.

grpcio has no way to end a call whose messages its caller does not read: a status cannot be sent
while a message waits. ``drop`` ends the task that holds the call in core, and core resets the call.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, without a stub

from service import metrics

log = logging.getLogger(__name__)

NEEDED = ("AioServer", "_MethodResolver", "_RequestCallError", "_handle_rpc", "_schedule_rpc_coro")
NAME = "unregistered method"
holder: ContextVar[asyncio.Task[None] | None] = ContextVar("holder", default=None)
"""Of a call: the task of grpcio that holds it in core until it has ended."""


def install() -> bool:
    """Let ``grpc.aio.server`` make guarded servers from now on. Idempotent.

    Returns False, and logs it, where grpcio is no longer built as it was when this was written.
    """
    if getattr(cygrpc.AioServer, "guarded", False):
        return True
    missing = [name for name in NEEDED if not hasattr(cygrpc, name)]
    if missing or not hasattr(cygrpc.AioServer, "_make_request_call_future"):
        log.warning("grpcio %s cannot be guarded: it lacks %s", grpc.__version__, missing)
        return False
    cygrpc.AioServer = guarded(cygrpc.AioServer)
    cygrpc._schedule_rpc_coro = holding(cygrpc._schedule_rpc_coro)
    logging.getLogger(cygrpc.__name__).addFilter(worth_a_line)
    return True


def holding(schedule: Any) -> Any:
    """grpcio's function that runs one call; notes its task for ``drop``."""

    async def scheduled(*arguments: Any) -> None:
        running = schedule(*arguments)
        del arguments  # a task that was cancelled keeps this frame, and would keep the call with it
        holder.set(asyncio.current_task())
        try:
            await running
        finally:
            holder.set(None)

    return scheduled


def drop(call: asyncio.Task[Any], held: asyncio.Task[None] | None) -> None:
    """Cancel a call, by the task of its handler, and reset it; the caller gets CANCELLED.

    held: what ``holder`` was in that task. Where it is None the call stays in core until the
    caller goes. grpcio keeps the newest call of the server until another one comes.
    """

    def release(_: object) -> None:
        if held is not None:
            # A turn later: it may be waiting for this call as its last act.
            asyncio.get_running_loop().call_soon(held.cancel)

    call.add_done_callback(release)
    call.cancel()


def worth_a_line(record: logging.LogRecord) -> bool:
    """Whether a record of grpcio says more than that a caller went while it was answered."""
    kind = record.exc_info[0] if isinstance(record.exc_info, tuple) else None
    return kind is None or not issubclass(kind, cygrpc.ExecuteBatchError)


def guarded(base: Any) -> Any:
    """A subclass of grpcio's server that answers calls to unregistered methods itself."""

    class GuardedServer(base):  # type: ignore[misc]
        guarded = True

        def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
            if method is not None:
                future: asyncio.Future[Any] = super()._make_request_call_future(method)
                return future
            return asyncio.get_running_loop().create_task(self._refuse_unregistered())

        async def _refuse_unregistered(self) -> None:
            """Never returns while the server runs, so that grpcio never sees such a call."""
            loop = asyncio.get_running_loop()
            nothing = cygrpc._MethodResolver([], {})
            refusals: set[asyncio.Task[None]] = set()
            while True:
                try:
                    call = await super()._request_call()
                except cygrpc._RequestCallError:
                    if not self.is_running():
                        raise
                    continue
                metrics.count_unknown_method("grpc")
                answer = cygrpc._handle_rpc(NAME, nothing, (), call, loop, False)
                task = loop.create_task(cygrpc._schedule_rpc_coro(answer, call, loop, NAME))
                refusals.add(task)
                task.add_done_callback(refusals.discard)

    return GuardedServer
