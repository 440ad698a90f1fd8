"""The gRPC API over HTTP/1.1: JSON for curl and browsers (the Connect protocol), and gRPC-Web.

The handlers are those of gRPC. The library connectrpc reads and writes the protocols; this module
checks the key before a body is read, converts every error to a status with the details that gRPC
callers get, and records the call.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from connectrpc import errors as connect_errors
from connectrpc.code import Code
from connectrpc.codec import Codec
from connectrpc.errors import ConnectError, ErrorDetail
from connectrpc.interceptor import MetadataInterceptor
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.request import RequestContext
from connectrpc.server import ConnectASGIApplication, Endpoint
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.json_format import MessageToJson, ParseError
from google.protobuf.message import DecodeError, Message
from starlette.types import Message as Event
from starlette.types import Receive, Scope, Send

from service import auth
from service.deadlines import Deadline
from service.errors import (
    InvalidRequest,
    ServiceError,
    forget_frames,
)
from service.grpc_api import strict_json
from service.grpc_api.large_messages import LargeMessages
from service.grpc_api.servicer import VisionServicer
from service.grpc_api.status import status_of
from service.logs import pairs, request_id
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.refusals import error_log, late_request, refusal_of
from service.runtime import Runtime
from service.unread import Answer

M = TypeVar("M", bound=Message)

SERVICE = pb.DESCRIPTOR.services_by_name["VisionService"]
PATH = f"/{SERVICE.full_name}/{{method}}"
TRANSPORT = "connect"
OTHER = "other"
"""Stands in logs and metrics for methods that do not exist."""
LIBRARY_REASONS = {
    Code.INVALID_ARGUMENT: "MALFORMED_REQUEST",
    Code.RESOURCE_EXHAUSTED: "REQUEST_TOO_LARGE",
}
"""Status of an error of the library -> our reason."""
BODY = "body"
UNARY = (
    "application/json",
    "application/proto",
    "application/grpc-web",
    "application/grpc-web+proto",
)
STREAMED = (
    "application/connect+json",
    "application/connect+proto",
    "application/grpc-web",
    "application/grpc-web+proto",
)
TIMEOUT = re.compile(rb"[0-9]{1,10}")
ROUTE_REASONS = {
    400: "MALFORMED_REQUEST",
    404: "UNKNOWN_PATH",
    405: "METHOD_NOT_ALLOWED",
    415: "CONTENT_TYPE_UNSUPPORTED",
}
REASON_KEY = "x-error-reason"
"""Header with the reason of an error, which in the body is a detail in base64."""
INLINE_BYTES = 16 * 1024
"""Size up to which a message is decoded on the event loop: a thread would cost more."""


class ConnectApi:
    """An ASGI application for one path of every method: ``PATH``."""

    def __init__(self, runtime: Runtime) -> None:
        servicer = VisionServicer(runtime, LargeMessages())
        self._runtime = runtime
        self._app = _Application(
            service=servicer,
            endpoints=_endpoints,
            interceptors=[_Guard()],
            read_max_bytes=runtime.settings.max_message_bytes,
            compressions=(),
            codecs=[_Binary(), _Json()],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["method"]
        if name not in SERVICE.methods_by_name:
            name = OTHER
        call = _Call(self._runtime, name, scope, receive, send)
        token = _call.set(call)
        try:
            misdirected = call.misdirected()
            if misdirected is None:
                await self._app(scope, call.receive, call.send)
            else:
                await call.misdirect(*misdirected)
        except asyncio.CancelledError:
            if not (call.answer.dropped or self._runtime.lifecycle.cutting):
                raise
        except ConnectError:
            pass  # its reader has gone; `ended` has told the log
        except Exception as error:  # of the library itself; nothing can be sent any more
            error_log.error("call failed %s", pairs(method=name), exc_info=error)
            call.ended("INTERNAL", "INTERNAL")
        finally:
            call.close()
            _call.reset(token)


class _Call:
    """One call from its headers to its end."""

    def __init__(
        self, runtime: Runtime, name: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.runtime = runtime
        self.name = name
        self._scope, self._receive, self._send = scope, receive, send
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        host, port = scope["client"] or ("-", "-")
        self._record = runtime.observation.begin(
            TRANSPORT,
            name,
            request_id.get(),
            path=f"/{SERVICE.full_name}/{name}",
            peer=f"{host}:{port}",
            metadata=headers,
        )
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._arriving = Deadline(runtime.settings.receive_timeout_s)
        self._arrived = False
        self._leave: Callable[[], None] | None = None
        self.answer = Answer(runtime.lifecycle, self._task)
        limit_s = runtime.settings.receive_timeout_s + runtime.settings.inference_timeout_s
        self.answer.drop_in(limit_s, self._drop)

    def misdirected(self) -> tuple[int, str, str] | None:
        """HTTP status, code and text for what is no call of a method in a known form."""
        if self.name == OTHER:
            known = ", ".join(sorted(SERVICE.methods_by_name))
            return 404, "unimplemented", f"There is no such method; served: {known}."
        if self._scope["method"] != "POST":
            return 405, "unimplemented", "Methods are called with POST."
        headers = dict(self._scope["headers"])
        given = [value for name, value in self._scope["headers"] if name == b"content-type"]
        if len(given) > 1 or not all(value.isascii() for value in headers.values()):
            return 400, "invalid_argument", "Headers must be ASCII, and content-type stands once."
        if not TIMEOUT.fullmatch(headers.get(b"connect-timeout-ms", b"0")):
            return 400, "invalid_argument", "The header connect-timeout-ms is a number of ms."
        kind = b"".join(given).partition(b";")[0].strip().lower()
        if kind == b"application/grpc" or kind.startswith(b"application/grpc+"):
            return 415, "unimplemented", "This port speaks HTTP/1.1; send gRPC to the gRPC port."
        streams = SERVICE.methods_by_name[self.name].server_streaming
        known_kinds = STREAMED if streams else UNARY
        if kind.decode("latin-1") not in known_kinds:
            text = f"The header content-type must be one of: {', '.join(known_kinds)}."
            return 415, "invalid_argument", text
        return None

    async def misdirect(self, status: int, code: str, text: str) -> None:
        body = json.dumps({"code": code, "message": text}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if status == 405:
            headers.append((b"allow", b"POST"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
        self.ended(code.upper(), ROUTE_REASONS[status])

    @property
    def reason(self) -> str:
        """The reason of the error with which the call ended; "-" without one."""
        return self._record.reason

    @property
    def traceparent(self) -> str:
        """The span of the call, for the caller; empty without tracing."""
        return self._record.traceparent

    def admit(self, headers: Mapping[str, str]) -> None:
        """Raise the ``ServiceError`` of a call that is refused by its key or by the phase."""
        caller = self.runtime.access.caller(headers)
        auth.current.set(caller)
        self._record.caller = caller.name
        self._leave = self.runtime.enter(caller, self._task)

    async def receive(self) -> Event:
        """The next part of the body, in time; after it, what tells that the caller has left."""
        if self._arrived:
            return await self._receive()
        try:
            message = cast("Event", await self._arriving.wait(self._receive(), self._late))
        except asyncio.CancelledError as error:
            raise self.cut(error) from None
        self._arrived = not message.get("more_body", False)
        if self._arrived:
            self.answer.drop_in(self.runtime.settings.inference_timeout_s, self._drop)
        return message

    async def send(self, message: Event) -> None:
        """Send, and tell the drain where the caller does not read."""
        self.answer.waits()
        try:
            await self._send(message)
        except asyncio.CancelledError as error:
            raise self.cut(error) from None
        finally:
            self.answer.read()

    def cut(self, error: asyncio.CancelledError) -> BaseException:
        """What a cancelled call raises: the refusal of a drain, else the cancellation."""
        return self.refusal(error) if self.runtime.lifecycle.cutting else error

    def refusal(self, error: BaseException) -> ConnectError:
        """Any error of a handler as the one that the caller gets."""
        refused = refusal_of(error, self.name)
        forget_frames(error)
        code, status = status_of(refused, request_id.get())
        self.ended(code.name, refused.reason)
        connect = Code.CANCELED if code.name == "CANCELLED" else Code[code.name]
        return ConnectError(connect, status.message, [_detail(one) for one in status.details])

    def ended(self, code: str, reason: str = "-") -> None:
        """The call has ended, for metrics, the access log and traces; the first end counts."""
        if self._leave is not None:
            self._leave()
        self.runtime.observation.end(self._record, code, reason)

    def close(self) -> None:
        """The call is over."""
        self.answer.close()
        self.ended("CANCELLED")

    def _late(self) -> ConnectError:
        return self.refusal(late_request(self.runtime.settings.receive_timeout_s))

    def _drop(self) -> None:
        """End a call whose answer nobody reads."""
        self.ended("DEADLINE_EXCEEDED", "NOT_READ")
        self._scope["state"]["abort"]()
        self._task.cancel()


_call: ContextVar[_Call] = ContextVar("connect_call")


class _Guard(MetadataInterceptor[None]):
    """Checks the key and the phase before the body is read, and hears how every call ends."""

    async def on_start(self, ctx: RequestContext[Any, Any]) -> None:
        call = _call.get()
        if call.traceparent:
            ctx.response_headers["traceresponse"] = call.traceparent
        try:
            call.admit(dict(ctx.request_headers.allitems()))
        except ServiceError as error:
            refusal = call.refusal(error)
            ctx.response_headers[REASON_KEY] = call.reason
            raise refusal from None

    async def on_end(
        self, token: None, ctx: RequestContext[Any, Any], error: Exception | None, /
    ) -> None:
        call = _call.get()
        if error is None:
            call.ended("OK")
            return
        if isinstance(error, ConnectError):  # of the library, such as that of a message too large
            name = "CANCELLED" if error.code is Code.CANCELED else error.code.name
            call.ended(name, LIBRARY_REASONS.get(error.code, "-"))
        if call.reason != "-":
            ctx.response_headers[REASON_KEY] = call.reason


def _detail(detail: AnyMessage) -> ErrorDetail:
    """A detail of a status of gRPC, as a message of the library, which has a protobuf of its own."""
    kind = connect_errors.Any  # type: ignore[attr-defined]  # of that protobuf
    return ErrorDetail(kind(type_url=detail.type_url, value=detail.value))


class _Body:
    """The bytes of a request, which its handler decodes: in a thread where they are many."""

    def __init__(self, data: bytes, decode: Callable[[bytes, Message], object]) -> None:
        self._data = data
        self._decode = decode

    async def read(self, kind: type[M]) -> M:
        """The message. Raises ``InvalidRequest``."""
        data, self._data = self._data, b""
        if len(data) <= INLINE_BYTES:
            return self._message(data, kind)
        return await asyncio.to_thread(self._message, data, kind)

    def _message(self, data: bytes, kind: type[M]) -> M:
        message = kind()
        try:
            self._decode(data, message)
        except (ParseError, DecodeError, UnicodeDecodeError, RecursionError) as error:
            text = str(error).replace("qwen3vl.v1.", "").split("\n")[0].rstrip(".")
            text = text if isinstance(error, ParseError) else "not a message of this method"
            unknown = isinstance(error, strict_json.UnknownField)
            reason = "UNKNOWN_FIELD" if unknown else "MALFORMED_REQUEST"
            raise InvalidRequest(BODY, text[:300], reason=reason) from None
        return message


class _Binary(Codec[Message, Any]):
    def name(self) -> str:
        return "proto"

    def encode(self, message: Message) -> bytes:
        return message.SerializeToString()

    def decode(self, data: bytes | bytearray, message_class: type[Any]) -> Any:
        return _Body(bytes(data), lambda given, message: message.ParseFromString(given))


class _Json(Codec[Message, Any]):
    """Protobuf's JSON. Unknown fields are refused: a field that is ignored is a wrong answer."""

    def name(self) -> str:
        return "json"

    def encode(self, message: Message) -> bytes:
        return MessageToJson(message, indent=None, ensure_ascii=False).encode()

    def decode(self, data: bytes | bytearray, message_class: type[Any]) -> Any:
        return _Body(bytes(data), strict_json.parse)


class _Context:
    """The part of gRPC's context that handlers read."""

    def __init__(self, request: RequestContext[Any, Any]) -> None:
        self._request = request

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        left_ms = self._request.timeout_ms
        return None if left_ms is None else max(left_ms / 1000, 0.0)


class _Application(ConnectASGIApplication[VisionServicer]):
    @property
    def path(self) -> str:
        return f"/{SERVICE.full_name}"


def _endpoints(servicer: VisionServicer) -> dict[str, Any]:
    """Every method of the service by its path."""
    found: dict[str, Any] = {}
    for method in SERVICE.methods:
        info = MethodInfo(
            name=method.name,
            service_name=SERVICE.full_name,
            input=getattr(pb, method.input_type.name),
            output=getattr(pb, method.output_type.name),
            idempotency_level=IdempotencyLevel.UNKNOWN,
            stream_type=StreamType.SERVER_STREAM if method.server_streaming else StreamType.UNARY,
        )
        handler = getattr(servicer, method.name)
        found[f"/{SERVICE.full_name}/{method.name}"] = (
            Endpoint.server_stream(info, _streaming(handler, info.input))
            if method.server_streaming
            else Endpoint.unary(info, _unary(handler, info.input))
        )
    return found


def _unary(handler: Any, kind: type[Message]) -> Any:
    async def unary(body: _Body, ctx: RequestContext[Any, Any]) -> Any:
        try:
            return await handler(await body.read(kind), _Context(ctx))
        except asyncio.CancelledError as error:
            raise _call.get().cut(error) from None
        except Exception as error:
            raise _call.get().refusal(error) from None

    return unary


def _streaming(handler: Any, kind: type[Message]) -> Any:
    async def stream(body: _Body, ctx: RequestContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async with aclosing(handler(await body.read(kind), _Context(ctx))) as events:
                async for event in events:
                    yield event
        except asyncio.CancelledError as error:
            raise _call.get().cut(error) from None
        except Exception as error:
            raise _call.get().refusal(error) from None

    return stream
