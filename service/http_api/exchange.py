"""What every HTTP request goes through: API key, phase, body, answer, errors, access log.

The counterpart of `service.grpc_api.interceptors`. Errors leave here and nowhere else. The key is
checked before the body is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from starlette.types import Message, Receive, Scope, Send

from service import auth
from service.deadlines import Deadline
from service.error_table import row_of
from service.errors import (
    InvalidRequest,
    ServiceError,
    forget_frames,
)
from service.http_api.answers import dumps
from service.http_api.errors import body_of, headers_of
from service.http_api.reading import BODY
from service.logs import request_id
from service.quotas import ANONYMOUS
from service.refusals import late_request, refusal_of
from service.request_ids import TRACE_KEY
from service.runtime import Runtime
from service.unread import Answer

T = TypeVar("T")

TRANSPORT = "http"
JSON = "application/json"
PING_S = 15.0
"""Time without an event after which a stream gets a comment, which keeps proxies from closing it."""
PING = b": ping\n\n"
STREAM_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-store"),
    ("x-accel-buffering", "no"),
)

Handler = Callable[["Exchange"], Awaitable[None]]


class Form(Protocol):
    """How a stream of events ends."""

    closing: bytes

    def failed(self, error: dict[str, Any]) -> bytes:
        """The last events where the call fails. error: see ``errors.body_of``."""
        ...


class CallerLeft(Exception):
    """The connection was closed before the answer."""


class Endpoint:
    """A handler as an ASGI application.

    name: of the method in logs and metrics. public: anybody may call it, in every phase.
    """

    def __init__(
        self, runtime: Runtime, name: str, handler: Handler, *, public: bool = False
    ) -> None:
        self._runtime = runtime
        self._name = name
        self._handler = handler
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._runtime, self._name, scope, receive, send)
        try:
            if not self._public:
                exchange.admit()
            await self._handler(exchange)
        except asyncio.CancelledError as error:
            await exchange.cancelled(error)
        except CallerLeft:
            exchange.left()
        except Exception as error:
            await exchange.fail(error)
        else:
            exchange.ended("OK")


class Exchange:
    """One request from its headers to the end of its answer.

    fields: how errors of the inference layer name the fields of this request; see ``codec.path_of``.
    """

    def __init__(
        self, runtime: Runtime, name: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.runtime = runtime
        self.scope = scope
        self.request_id = request_id.get()
        self.caller = ANONYMOUS
        self.fields: Mapping[str, str] = {}
        self.headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self._name = name
        self._receive = receive
        self._send = send
        self._task = _current_task()
        host, port = scope["client"] or ("-", "-")
        self._record = runtime.observation.begin(
            TRANSPORT,
            name,
            self.request_id,
            peer=f"{host}:{port}",
            probe=name == "health",
            metadata=self.headers,
        )
        self._leave: Callable[[], None] | None = None
        self._begun = False
        self._form: Form | None = None
        self._gone = False
        self._answer = Answer(runtime.lifecycle, self._task)

    def admit(self) -> None:
        """Raise the ``ServiceError`` of a request that is refused by its key or by the phase."""
        self.caller = self.runtime.access.caller(self.headers)
        auth.current.set(self.caller)
        self._record.caller = self.caller.name
        self._leave = self.runtime.enter(self.caller, self._task)

    # The request

    async def body(self) -> bytes:
        """The body of a request in JSON, refused as soon as it is too large, late or not JSON."""
        self._check_type()
        limit = self.runtime.settings.max_message_bytes
        if int(self.headers.get("content-length", 0)) > limit:
            raise _too_large(limit)
        limit_s = self.runtime.settings.receive_timeout_s
        return await Deadline(limit_s).wait(self._read(limit), lambda: late_request(limit_s))

    def _check_type(self) -> None:
        given = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != JSON:
            raise InvalidRequest(
                BODY, f"needs the header content-type: {JSON}", reason="CONTENT_TYPE_UNSUPPORTED"
            )
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise InvalidRequest(
                BODY, "must not be compressed; images are", reason="CONTENT_TYPE_UNSUPPORTED"
            )

    async def _read(self, limit: int) -> bytes:
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise CallerLeft
            piece = message.get("body", b"")
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            pieces.append(piece)
            more = message.get("more_body", False)
        return b"".join(pieces)

    # The answer

    async def while_connected(self, work: Awaitable[T]) -> T:
        """The result of the work, which is cancelled when the caller leaves."""
        watching = asyncio.create_task(self._watch(), name="watch")
        try:
            return await work
        finally:
            watching.cancel()

    async def answer(
        self, content: Any, status: int = 200, headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Send a JSON value as the answer."""
        await self.send(dumps(content), JSON, status, headers)

    async def send(
        self,
        body: bytes,
        content_type: str,
        status: int = 200,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Send a body as the answer."""
        length = ("content-length", str(len(body)))
        self._answer.waits()
        await self._begin(status, (("content-type", content_type), length, *headers))
        await self._send({"type": "http.response.body", "body": body})
        self._answer.read()

    async def stream(self, events: AsyncGenerator[bytes, None], form: Form) -> None:
        """Send server-sent events, then what closes a stream of this form.

        The status is sent with the first event, so that an error before it has a status of its own.
        A reader who does not read is dropped soon after the time limit of a call.
        """
        self._form = form
        self._answer.drop_in(self.runtime.settings.inference_timeout_s, self._task.cancel)
        watching = asyncio.create_task(self._watch(), name="watch")
        pinging = asyncio.create_task(self._ping(), name="ping")
        try:
            async with aclosing(events) as opened:
                async for event in opened:
                    await self._event(event)
            await self._end_stream(form.closing)
        finally:
            for task in (watching, pinging):
                task.cancel()
            self._answer.keep()

    async def _event(self, event: bytes) -> None:
        self._answer.waits()
        await self._begin(200, STREAM_HEADERS)
        await self._send({"type": "http.response.body", "body": event, "more_body": True})
        self._answer.read()

    async def _end_stream(self, events: bytes) -> None:
        if events:
            await self._event(events)
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """Send status and headers, once."""
        if self._begun:
            return
        self._begun = True
        traced = self._record.traceparent
        headers = [*headers, (TRACE_KEY, traced)] if traced else headers
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            await self._event(PING)

    async def _watch(self) -> None:
        """Cancel the call when the caller leaves: ASGI does not."""
        while True:
            message: Message = await self._receive()
            if message["type"] == "http.disconnect":
                self._gone = True
                self._task.cancel()
                return

    # The end

    async def cancelled(self, error: asyncio.CancelledError) -> None:
        """The task was cancelled: the caller left, does not read, or the server stops."""
        if self._answer.dropped or self._answer.stalled:
            self.ended("DEADLINE_EXCEEDED", "NOT_READ")
            await self._abort()
        elif self._gone or not self.runtime.lifecycle.cutting:
            self.left()
        else:
            await self.fail(error)
        forget_frames(error)

    async def _abort(self) -> None:
        """Close the connection, with everything that waits for its reader."""
        self.scope["state"]["abort"]()
        while (await self._receive())["type"] != "http.disconnect":
            continue

    def left(self) -> None:
        """The caller went before the answer was complete, which needs no answer."""
        self.ended("CANCELLED")

    async def fail(self, error: BaseException) -> None:
        """Send an error: as the answer, or in a stream as an event before its end."""
        refused = refusal_of(error, self._name)
        row = row_of(refused)
        self.ended(row.grpc, refused.reason)
        content = body_of(refused, self.fields)
        forget_frames(error)
        if self._begun:
            assert self._form is not None
            await self._end_stream(self._form.failed(content["error"]))
        else:
            await self.answer(content, row.http, headers_of(refused))

    def ended(self, code: str, reason: str = "-") -> None:
        """Tell metrics, log and trace how the call ended, by the name of gRPC's status."""
        self._answer.read()
        if self._leave is not None:
            self._leave()
        self.runtime.observation.end(self._record, code, reason)


def _too_large(limit: int) -> ServiceError:
    return InvalidRequest(
        BODY,
        f"is larger than {limit} bytes",
        reason="REQUEST_TOO_LARGE",
        metadata={"limit": str(limit)},
    )


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
