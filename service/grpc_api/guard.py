"""Extends grpcio's asyncio server: it survives a malformed path, and can drop a call.

grpcio (seen in 1.85.1) decodes the path of a call to an unregistered method as UTF-8, in the loop
that accepts calls and without a ``try``. A path that is not UTF-8 ends this loop and thereby the
server, before any API key is checked. This service registers all its methods, which grpcio handles
separately. So this module answers calls to all other methods with UNIMPLEMENTED and never reads
their path.

Remove this module when grpcio passes ``tests/service/test_wire.py`` without it.

grpcio cannot end a call whose caller does not read its messages, because it cannot send a status
while a message waits. ``drop`` cancels the grpcio task that keeps the call alive in gRPC core; core
then resets the call.
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
"""The grpcio task of the current call, which keeps the call alive in gRPC core."""


def install() -> bool:
    """Make ``grpc.aio.server`` return guarded servers from now on. Idempotent.

    Returns False, and logs a warning, if the internals of this grpcio differ from those that this
    module knows.
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
    """Wrap grpcio's function that runs one call: remember its task for ``drop``."""

    async def scheduled(*arguments: Any) -> None:
        running = schedule(*arguments)
        del arguments  # a cancelled task keeps this frame, and thus the call, in memory
        holder.set(asyncio.current_task())
        try:
            await running
        finally:
            holder.set(None)

    return scheduled


def drop(call: asyncio.Task[Any], held: asyncio.Task[None] | None) -> None:
    """Cancel the handler task of a call and reset the call; the caller gets CANCELLED.

    held: the value of ``holder`` in that task. If it is None, the call stays in core until its
    caller disconnects. grpcio keeps the newest call of the server until the next call arrives.
    """

    def release(_: object) -> None:
        if held is not None:
            # In the next turn of the event loop: the task may be about to end by itself.
            asyncio.get_running_loop().call_soon(held.cancel)

    call.add_done_callback(release)
    call.cancel()


def worth_a_line(record: logging.LogRecord) -> bool:
    """Whether to keep a log record of grpcio: False if it only reports that a caller
    disconnected."""
    kind = record.exc_info[0] if isinstance(record.exc_info, tuple) else None
    return kind is None or not issubclass(kind, cygrpc.ExecuteBatchError)


def guarded(base: Any) -> Any:
    """A subclass of grpcio's server that answers calls to unregistered methods without reading
    their path."""

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
