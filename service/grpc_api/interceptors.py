"""The interceptor of every call: request id, API key, phase, errors, access log.

A single interceptor guarantees the order of these steps: the id comes first so that every refusal
has one, the status comes last so that every error gets one. All errors reach the client through
this module.

Every method is registered with gRPC as a method with a stream of requests. For a unary method gRPC
would read the message before any code of this service runs; from a stream it reads nothing until
asked. So a call without a key is refused before its body is read, and receiving the body has a time
limit.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, without a stub

from service import auth
from service.deadlines import Deadline
from service.errors import (
    InferenceTimeout,
    InvalidRequest,
    ServiceError,
    forget_frames,
)
from service.grpc_api import guard as grpc_guard
from service.grpc_api.large_messages import LargeMessages, received_bytes
from service.grpc_api.status import DETAILS_KEY, status_of
from service.lifecycle import REFUSALS, Lifecycle, Phase
from service.logs import request_id
from service.observation import Observation
from service.quotas import ANONYMOUS, Caller
from service.refusals import late_request, refusal_of
from service.request_ids import REQUEST_ID_KEY, TRACE_KEY, chosen_id
from service.settings import Settings
from service.unread import Answer

CERTIFICATE_NAMES = ("x509_common_name", "x509_subject_alternative_name")
HEALTH_PREFIX = "/grpc.health.v1.Health/"
OUR_PREFIX = "/qwen3vl.v1."
OUR_SERVICE = f"{OUR_PREFIX}VisionService/"
TRANSPORT = "grpc"
NO_RETRY = ("grpc-retry-pushback-ms", "-1")
"""Trailer that keeps the retry policy of a client from sending the call again."""
PROBE_RECEIVE_S = 5.0
"""Time limit to receive a health check, in seconds. Short, because anybody may send one."""
PROBE_SLOW_S = 0.25
MAX_SLOW_PROBES = 8
"""Maximum number of health checks that take longer than PROBE_SLOW_S to arrive. The parts of a
large message take memory before its size is known."""
Context = grpc.aio.ServicerContext[Any, Any]
Enter = Callable[[Caller, "asyncio.Task[Any]"], Callable[[], None]]


class Undecodable(enum.Enum):
    """Placeholder for a request whose bytes are not a valid message of its type."""

    MALFORMED = enum.auto()
    COMPRESSED = enum.auto()


GZIP, ZLIB = b"\x1f\x8b", b"\x78"
"""First bytes of compressed messages. No message of any type begins as gzip does."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules for the calls of a method.

    name: of the method in metrics, without the package and the service where they are ours.
    ours: a method of this service: the phase may refuse it, and a drain waits for it.
    probe: a health check, which needs no key.
    receive_s: limit on receiving one message. call_s: limit on the rest of the call; of a method
        that streams without end (``endless``), on each message to the caller.
    read: the bytes of a message -> the message.
    """

    method: str
    name: str
    ours: bool
    probe: bool
    endless: bool
    read: Callable[[bytes], Any]
    receive_s: float
    call_s: float


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method. Health checks are answered in every phase and need no key."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        access: auth.Access,
        observation: Observation,
        settings: Settings,
        enter: Enter,
        large: LargeMessages,
    ) -> None:
        """enter: see ``Runtime.enter``. large: of all calls of the server."""
        self.lifecycle = lifecycle
        self.enter = enter
        self.observation = observation
        self.access = access
        self.large = large
        self.slow_probes = 0
        self._settings = settings
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Find the handler and wrap it, once per method. Only existing names are cached."""
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        self._wrapped[method] = wrapped = self._wrap(handler, self._rules(handler, method))
        return wrapped

    def _rules(self, handler: grpc.RpcMethodHandler[Any, Any], method: str) -> Rules:
        health, ours = method.startswith(HEALTH_PREFIX), method.startswith(OUR_PREFIX)
        settings = self._settings
        return Rules(
            method=method,
            name=method.removeprefix(OUR_SERVICE).removeprefix("/"),
            ours=ours,
            probe=health,
            endless=handler.response_streaming and not ours,
            read=tolerant(handler.request_deserializer),
            receive_s=PROBE_RECEIVE_S if health else settings.receive_timeout_s,
            call_s=settings.inference_timeout_s,
        )

    def _wrap(
        self, handler: grpc.RpcMethodHandler[Any, Any], rules: Rules
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.request_streaming:  # reflection; the vision service has no such method
            answer = self._streaming(handler.stream_stream, rules, Call.requests)
        elif handler.response_streaming:
            answer = self._streaming(handler.unary_stream, rules, Call.request)
        else:
            unary = self._unary(handler.unary_unary, rules)
            return grpc.stream_unary_rpc_method_handler(unary, None, handler.response_serializer)
        return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)

    def _unary(self, behaviour: Any, rules: Rules) -> Any:
        async def unary(_: object, context: Context) -> Any:
            call = Call(self, rules, context)
            async with call:
                # gRPC keeps this frame after an abort, so the request is in no variable of it.
                return await behaviour(await call.request(), context)
            return await call.abort()

        return unary

    def _streaming(self, behaviour: Any, rules: Rules, requests: Callable[[Call], Any]) -> Any:
        async def stream(_: object, context: Context) -> None:
            call = Call(self, rules, context)
            # Written here instead of yielded: a call that is cancelled during a write then closes
            # the handler, and the work in the engine, at once.
            async with (
                call,
                aclosing(behaviour(await requests(call), context)) as responses,
            ):
                async for response in responses:
                    await call.send(response)
                return
            await call.abort()

        return stream


@dataclass(frozen=True, slots=True)
class Refusal:
    """The end of a failed call: arguments of gRPC's ``abort``."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


class Call:
    """One call from its start to its end.

    The body of ``async with`` does the work. An error of the body is converted to a refusal and not
    raised; call ``abort`` after the body to send the refusal.
    """

    __slots__ = (
        "_access",
        "_answer",
        "_caller",
        "_context",
        "_held",
        "_id",
        "_interceptor",
        "_large",
        "_leave",
        "_lifecycle",
        "_metadata",
        "_observation",
        "_record",
        "_refusal",
        "_rules",
        "_task",
    )

    def __init__(self, interceptor: CallInterceptor, rules: Rules, context: Context) -> None:
        self._interceptor = interceptor
        self._lifecycle = interceptor.lifecycle
        self._access = interceptor.access
        self._large = interceptor.large
        self._rules = rules
        self._context = context
        self._task = current_task()
        self._answer = Answer(self._lifecycle, self._task)
        self._held = grpc_guard.holder.get()
        self._caller = ANONYMOUS
        self._leave: Callable[[], None] | None = None
        self._refusal: Refusal | None = None
        self._metadata = dict(context.invocation_metadata() or ())
        self._id = chosen_id(self._metadata.get(REQUEST_ID_KEY))
        self._observation = interceptor.observation
        self._record = self._observation.begin(
            TRANSPORT,
            rules.name,
            self._id,
            path=rules.method,
            peer=context.peer(),
            probe=rules.probe,
            metadata=self._metadata,
        )

    async def __aenter__(self) -> None:
        request_id.set(self._id)
        self._context.set_trailing_metadata(self._names())
        self._task.add_done_callback(self._ended)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._answer.waits()  # time limit of the last message, or of the status
        if self._leave is not None:
            self._leave()  # before the caller learns that the call has ended, and makes the next one
        if error is None:
            self._end("OK")
            return False
        if isinstance(error, grpc.aio.AbortError):  # from a handler of another service
            self._observation.end(self._record, self._aborted_with())
            return False
        if isinstance(error, asyncio.CancelledError):
            dropped = self._answer.dropped
            if dropped or not self._lifecycle.cutting:
                # The caller has disconnected, or does not read the answer.
                self._end(*(("DEADLINE_EXCEEDED", "NOT_READ") if dropped else ("CANCELLED",)))
                return False
        elif not isinstance(error, Exception):
            return False
        refused = refusal_of(error, self._rules.method)
        code, status = status_of(refused, self._id)
        trailers = ((DETAILS_KEY, status.SerializeToString()), *self._names())
        if code is grpc.StatusCode.UNAVAILABLE and self._generated(refused):
            trailers = (*trailers, NO_RETRY)
        self._refusal = Refusal(code, status.message, trailers)
        self._end(code.name, refused.reason)
        forget_frames(error)
        return True

    async def request(self) -> Any:
        """The request message of a unary call. Raises a ``ServiceError``, before the message is
        read, for a call that is refused independent of its content."""
        self._admit()
        request = await self._receive()
        if request is grpc.aio.EOF:
            raise InvalidRequest(
                "request", "the call ended without a message", reason="MALFORMED_REQUEST"
            )
        if self._rules.endless:
            self._answer.keep()
        else:
            left_s, call_s = self._context.time_remaining(), self._rules.call_s
            limit_s = call_s if left_s is None else min(call_s, left_s)
            self._answer.drop_in(limit_s, self._drop)
        return request

    async def requests(self) -> AsyncIterator[Any]:
        """Yield the request messages of a streaming call."""
        self._admit()

        async def received() -> AsyncIterator[Any]:
            while (request := await self._receive()) is not grpc.aio.EOF:
                yield request

        return received()

    async def send(self, response: Any) -> None:
        """Write one message of a stream. Raises ``CancelledError`` if the call ends meanwhile.

        If the caller disconnects during the write, gRPC core raises its own error, often before it
        cancels this task. That is not a bug of the server.
        """
        if self._rules.endless:
            self._answer.drop_in(self._rules.call_s, self._drop)
        self._answer.waits()
        try:
            await self._context.write(response)
        except cygrpc.ExecuteBatchError:
            raise asyncio.CancelledError from None
        finally:
            self._answer.read()
        if self._rules.endless:
            self._answer.keep()

    async def abort(self) -> None:
        """Send the refusal. Always raises, as gRPC's abort does.

        Must be called outside the ``except`` block: gRPC keeps the exception that it raises here as
        long as the call, including the exception's context.
        """
        assert self._refusal is not None
        refusal, self._refusal = self._refusal, None
        try:
            await self._context.abort(refusal.code, refusal.message, refusal.trailers)
        except cygrpc.ExecuteBatchError:  # the caller has just disconnected, or reads nothing
            raise asyncio.CancelledError from None

    def _admit(self) -> None:
        """Raise a ``ServiceError`` if the API key or the phase refuses the call."""
        if not self._rules.probe:
            self._caller = self._access.caller(self._metadata, self._certificate())
            auth.current.set(self._caller)
            self._record.caller = self._caller.name
        if self._rules.ours:
            self._leave = self._interceptor.enter(self._caller, self._task)

    def _certificate(self) -> list[str] | None:
        """The names in the certificate of the caller; None where callers have none."""
        if not self._access.mutual_tls:
            return None
        found = self._context.auth_context()
        names = [name for kind in CERTIFICATE_NAMES for name in found.get(kind, ())]
        return [name.decode("utf-8", "replace") for name in names if name]

    async def _receive(self) -> Any:
        """The next message, or EOF."""
        self._answer.drop_in(self._rules.receive_s, self._drop)
        with self._large.next() as message:
            reading = self._context.read()
            if self._rules.probe:
                data = await self._probe(reading)
            else:
                data = await self._within(message.received(reading))
            if data is grpc.aio.EOF:
                return data
            received_bytes.set(len(data))
            request = await message.parsed(data, self._rules.read)
        if request is Undecodable.COMPRESSED:
            raise InvalidRequest(
                "request",
                "is compressed with gzip or deflate; send it without compression, or ask the "
                "operator of the server to accept compressed requests",
                reason="REQUEST_COMPRESSED",
            )
        if request is Undecodable.MALFORMED:
            raise InvalidRequest(
                "request",
                "the bytes are not a message of this method, or a text field is not UTF-8",
                reason="MALFORMED_REQUEST",
            )
        return request

    async def _within(self, reading: Awaitable[Any]) -> Any:
        """Await ``read``. Raises the error for a request that did not arrive in time."""
        return await Deadline(self._rules.receive_s).wait(reading, self._late)

    def _late(self) -> InferenceTimeout:
        return late_request(self._rules.receive_s)

    async def _probe(self, reading: Awaitable[Any]) -> Any:
        """Receive a health check. Only a few may be slow at the same time."""
        work = asyncio.ensure_future(reading)
        slow = False
        try:
            done, _ = await asyncio.wait([work], timeout=PROBE_SLOW_S)
            if done:
                return work.result()
            if self._interceptor.slow_probes >= MAX_SLOW_PROBES:
                raise self._late()
            self._interceptor.slow_probes += 1
            slow = True
            return await self._within(work)
        finally:
            work.cancel()
            self._interceptor.slow_probes -= slow

    def _drop(self) -> None:
        """End a call whose caller reads no messages."""
        grpc_guard.drop(self._task, self._held)

    def _ended(self, _: object) -> None:
        """Called when gRPC has sent the status, or given up."""
        self._answer.close()

    def _aborted_with(self) -> str:
        """The status that a handler aborted with."""
        code = self._context.code()
        return next((one.name for one in grpc.StatusCode if code in (one, one.value[0])), "UNKNOWN")

    def _end(self, code: str, reason: str = "-") -> None:
        self._observation.end(self._record, code, reason)

    def _generated(self, refused: ServiceError) -> bool:
        """Whether the engine failed while it generated the answer. The request may be the cause, and
        would then harm one server after the other; that of a drain is not."""
        draining, _ = REFUSALS[Phase.DRAINING]
        return self._record.first_token_s is not None and refused.reason != draining

    def _names(self) -> tuple[tuple[str, str], ...]:
        """Trailers that name the call, in the log and in a trace."""
        found = ((REQUEST_ID_KEY, self._id),)
        traced = self._record.traceparent
        return (*found, (TRACE_KEY, traced)) if traced else found


def tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Wrap a deserialiser: it returns an ``Undecodable`` for bytes that are not a valid message.

    gRPC would answer an exception with status UNKNOWN and the text of the exception.
    """
    assert deserialize is not None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:  # the protobuf runtime raises DecodeError, RecursionError, …
            compressed = data.startswith((GZIP, ZLIB))
            return Undecodable.COMPRESSED if compressed else Undecodable.MALFORMED

    return read


def current_task() -> asyncio.Task[Any]:
    """The asyncio task of this call; grpc.aio runs every call in its own task."""
    task = asyncio.current_task()
    assert task is not None
    return task
