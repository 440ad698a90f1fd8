"""What every call goes through, unary or streaming: request id, API key, phase, errors, access log.

One interceptor, because one order is right: the id comes first so that every refusal carries it,
the status comes last so that every error gets one. Errors leave here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, without a stub

from service.auth import ApiKeys
from service.errors import EngineUnavailable, InternalError, InvalidRequest, ServiceError
from service.lifecycle import REFUSALS, Lifecycle, Phase
from service.logs import pairs, request_id
from service.status import DETAILS_KEY, status_of

REQUEST_ID_KEY = "x-request-id"
new_ids = random.Random()  # an id is a name, not a secret: no system call for each
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
HEALTH_PREFIX = "/grpc.health.v1.Health/"
OUR_PREFIX = "/qwen3vl.v1."
INTERNAL_TEXT = "Internal error. The operator finds the cause in the log under the request id."

access_log = logging.getLogger("service.access")
error_log = logging.getLogger("service.errors")

Context = grpc.aio.ServicerContext[Any, Any]


class Undecodable:
    """Stands in for a request whose bytes are not a message of its type."""


UNDECODABLE = Undecodable()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method but health, which has to answer probes that know no key."""

    def __init__(self, lifecycle: Lifecycle, keys: ApiKeys | None) -> None:
        self.lifecycle = lifecycle
        self.keys = keys
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Find the handler and wrap it. Wrapped once per method: only names that exist are kept."""
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(HEALTH_PREFIX):
            return handler
        self._wrapped[method] = wrapped = self._wrap(handler, method)
        return wrapped

    def _wrap(
        self, handler: grpc.RpcMethodHandler[Any, Any], method: str
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.request_streaming:  # reflection; nothing of ours takes a stream
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(handler.stream_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(handler.unary_stream, method),
                tolerant(handler.request_deserializer),
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, method),
            tolerant(handler.request_deserializer),
            handler.response_serializer,
        )

    def _unary(self, behaviour: Any, method: str) -> Any:
        async def unary(request: Any, context: Context) -> Any:
            async with Call(self, method, context):
                return await behaviour(decoded(request), context)

        return unary

    def _streaming(self, behaviour: Any, method: str) -> Any:
        async def stream(request: Any, context: Context) -> None:
            # Written from here, not yielded: a call that is cancelled while a message is on its way
            # then closes the handler at once, and with it the work in the engine.
            async with (
                Call(self, method, context),
                aclosing(behaviour(decoded(request), context)) as responses,
            ):
                async for response in responses:
                    await send(context, response)

        return stream


class Call:
    """One call from its first to its last moment."""

    __slots__ = ("_caller", "_context", "_id", "_interceptor", "_method", "_ours", "_started")

    def __init__(self, interceptor: CallInterceptor, method: str, context: Context) -> None:
        self._interceptor = interceptor
        self._method = method
        self._context = context
        self._ours = method.startswith(OUR_PREFIX)
        self._started = time.perf_counter()
        self._caller = "-"
        self._id = ""

    async def __aenter__(self) -> None:
        metadata = dict(self._context.invocation_metadata() or ())
        self._id = chosen_id(metadata.get(REQUEST_ID_KEY))
        request_id.set(self._id)
        self._context.set_trailing_metadata(((REQUEST_ID_KEY, self._id),))
        try:
            if self._interceptor.keys is not None:
                self._caller = self._interceptor.keys.caller(metadata)
            if self._ours:
                self._interceptor.lifecycle.enter(current_task())
        except ServiceError as error:
            await self._refuse(error)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ours:
            self._interceptor.lifecycle.leave(current_task())
        if error is None:
            self._log("OK")
        elif isinstance(error, ServiceError) and not isinstance(error, InternalError):
            await self._refuse(error)
        elif isinstance(error, asyncio.CancelledError):
            await self._cancelled()
        elif isinstance(error, Exception):  # a defect: its own text and trace stay in the log
            error_log.error("call failed %s", pairs(method=self._method), exc_info=error)
            await self._refuse(InternalError(INTERNAL_TEXT))

    async def _cancelled(self) -> None:
        """The caller has gone, which needs no answer; or the server cuts its last calls."""
        if not self._interceptor.lifecycle.cutting:
            self._log("CANCELLED")
            return
        reason, message = REFUSALS[Phase.DRAINING]
        await self._refuse(EngineUnavailable(message, reason=reason))

    async def _refuse(self, error: ServiceError) -> None:
        """End the call with the status of the error. Always raises: gRPC's abort does."""
        code, status = status_of(error, self._id)
        self._log(code.name, error.reason)
        await self._context.abort(
            code,
            status.message,
            ((DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, self._id)),
        )

    def _log(self, code: str, reason: str = "-") -> None:
        if access_log.isEnabledFor(logging.INFO):
            seconds = time.perf_counter() - self._started
            # Names of ours and of gRPC's: none of them needs the quotes of ``pairs``.
            access_log.info(
                f"call method={self._method} code={code} reason={reason} seconds={seconds:.4f} "
                f"caller={self._caller} peer={self._context.peer()}"
            )


async def send(context: Context, response: Any) -> None:
    """Write one message of a stream; ``CancelledError`` when the call has ended under it.

    The message of a caller who goes at that moment fails with an error of gRPC core's own, often
    before this task is cancelled. It is no defect of ours.
    """
    try:
        await context.write(response)
    except cygrpc.ExecuteBatchError:
        raise asyncio.CancelledError from None


def tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Turn bytes that are no such message into UNDECODABLE.

    gRPC would answer an exception of the deserialiser with UNKNOWN and the text of the exception.
    """
    assert deserialize is not None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:  # whatever the protobuf runtime raises: DecodeError, RecursionError, …
            return UNDECODABLE

    return read


def decoded(request: Any) -> Any:
    """The request itself. Raises ``InvalidRequest`` when its bytes could not be read."""
    if request is UNDECODABLE:
        raise InvalidRequest(
            "request",
            "the bytes are not a message of this method, or a text field is not UTF-8",
            reason="MALFORMED_REQUEST",
        )
    return request


def chosen_id(given: str | bytes | None) -> str:
    """The caller's request id where it is a sensible one, else a new one."""
    if isinstance(given, str) and REQUEST_ID.fullmatch(given):
        return given
    return f"{new_ids.getrandbits(64):016x}"


def current_task() -> asyncio.Task[Any]:
    """The task of this call; every call of grpc.aio has its own."""
    task = asyncio.current_task()
    assert task is not None
    return task
