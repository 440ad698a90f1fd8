"""A back end of this project, asked over its own gRPC API.

Such a server validates its answers, and tells what it enforces; so ENFORCED stays ENFORCED, and its
errors reach the caller with their reasons.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import CHANNEL_OPTIONS, DIRECTLY, CallError, read_error
from service.engines.remote.answers import invalid
from service.engines.remote.backend import BackEnd
from service.engines.remote.grpc_messages import (
    assumed,
    decode_usage,
    described,
    encode_grammar,
    encode_request,
)
from service.engines.remote.images import Outgoing
from service.engines.remote.members import (
    CHECK_LIMIT_S,
    Member,
    NotBegun,
    Remembered,
    unavailable,
)
from service.engines.remote.own_errors import NOT_NOW, Told, cut, error_of
from service.engines.remote.wire import MAX_BODY_BYTES, WireOptions
from service.errors import (
    BackEndFailed,
    BackEndRefusal,
    GrammarError,
    InferenceTimeout,
    Overloaded,
    ServiceError,
)
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.types import Chunk, FinishReason, GenerateRequest, Grammar, Timings, Usage

SERVICE: str = pb.DESCRIPTOR.services_by_name["VisionService"].full_name
PREPARE_LIMIT_S = 3.0
"""Time limit of the analysis of a grammar; less than this server has for it."""
RECEIVE_LIMIT = "grpc.max_receive_message_length"
_PERMANENT = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)

_NO_ANSWER = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
TOO_LARGE = "CLIENT: Received message larger than max"
"""How gRPC tells that it did not take a message of the server."""
log = logging.getLogger(__name__)


class GrpcMember(Member):
    """See `service.engines.remote.members.Member`.

    url: ``grpc://HOST:PORT``, or ``grpcs://`` with TLS. model: name on the server; None takes its
    first one.
    """

    takes_tools = True
    prepares = True

    def __init__(
        self,
        name: str,
        url: str,
        model: str | None,
        options: WireOptions,
        *,
        silence_s: float,
        limit: int,
    ) -> None:
        super().__init__(name, assumed(url, model or ""), silence_s=silence_s, limit=limit)
        self._url = url
        self._model = model
        self._options = options
        self._channel: grpc.aio.Channel | None = None
        self._watching: asyncio.Task[None] | None = None
        self._closed = False
        self._taken: Remembered[bool] = Remembered()
        """Grammars that the server is known to take."""

    async def prepare(self, grammar: Grammar) -> None:
        if self._taken.get(grammar):
            return
        back_end = self.description
        if back_end is None or self._unknown():
            return
        request = pb.ValidateSchemaRequest(grammar=encode_grammar(grammar), model=back_end.model)
        try:
            await self._stub.ValidateSchema(
                request, timeout=PREPARE_LIMIT_S, metadata=self._metadata()
            )
        except grpc.aio.AioRpcError as error:
            told = read_error(error)
            found = error_of(_told(told)) if told.reason else None
            if isinstance(found, GrammarError):
                raise found from None
            log.debug("back end %s does not analyse a grammar: %s", self.name, told)
            return
        self._taken.keep(grammar, True)

    async def close(self) -> None:
        self._closed = True
        channel, self._channel = self._channel, None
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if channel is not None:
            await channel.close()

    # What the server is

    async def _look(self) -> None:
        await self._ask_health()
        if self._undescribed():
            await self._describe()

    def _unknown(self) -> bool:
        """Also without a connection: a request without one that fails was never sent."""
        return super()._unknown() or not self._connected()

    def _connected(self) -> bool:
        return self._opened().get_state(True) is grpc.ChannelConnectivity.READY

    async def _describe(self) -> None:
        name = self._model or ("" if self.description is None else self.description.model)
        try:
            told = await self._stub.GetModel(
                pb.GetModelRequest(name=name), timeout=CHECK_LIMIT_S, metadata=self._metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise self._not_answered(error) from None
        found = described(self._url, told)
        if self.description is not None and found.version != self.description.version:
            self._taken.forget()
        self.description, self._stale = found, False

    async def _ask_health(self) -> None:
        stub = health_pb2_grpc.HealthStub(self._opened())
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            status = (await stub.Check(request, timeout=CHECK_LIMIT_S)).status
        except grpc.aio.AioRpcError as error:
            raise self._not_answered(error) from None
        if status != health_pb2.HealthCheckResponse.SERVING:
            name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            log.debug("back end %s is %s", self.name, name)
            raise NotBegun.not_now()

    # Answers

    async def _begin(
        self, request: GenerateRequest, images: Outgoing, back_end: BackEnd
    ) -> AsyncGenerator[Chunk, None]:
        if request.enforced and request.grammar is not None and back_end.not_enforced:
            text = "A model server enforces less than was promised for this request; try again."
            raise NotBegun(unavailable(text))
        message = encode_request(request, await images.files(), back_end.model)
        return self._answer(request, message, back_end)

    async def _answer(
        self, request: GenerateRequest, message: pb.StreamTaskRequest, back_end: BackEnd
    ) -> AsyncGenerator[Chunk, None]:
        """The answer as it arrives. Raises ``NotBegun`` only before the first text."""
        call = self._stub.StreamTask(
            message,
            timeout=_left_s(request.deadline),
            metadata=self._metadata(request.request_id),
        )
        pieces = size = 0
        texts: list[str] = []
        try:
            while True:
                event = await asyncio.wait_for(call.read(), self._silence_s)
                if event is grpc.aio.EOF:
                    raise invalid("incomplete", "ends without a result")
                if event.HasField("result"):
                    last = self._last(event.result, "".join(texts), back_end)
                    if await asyncio.wait_for(call.read(), self._silence_s) is not grpc.aio.EOF:
                        raise invalid("content", "goes on after its result")
                    yield last
                    return
                pieces += 1
                size += event.ByteSize()
                if size > MAX_BODY_BYTES:
                    raise invalid("too_large", "is larger than any complete answer")
                texts.append(event.delta)
                if event.delta:
                    yield Chunk(event.delta, usage=Usage(0, 0, pieces))
        except asyncio.CancelledError:
            if self._closed:  # which cancels every call
                raise unavailable("The connections are closed.") from None
            raise
        except asyncio.TimeoutError:
            raise self._stalled() from None
        except grpc.aio.AioRpcError as error:
            told = read_error(error)
            if told.reason == "OUTPUT_TRUNCATED":  # the runner decides what a cut text is worth
                yield cut(told.metadata)
                return
            raise self._failed(error, begun=bool(pieces)) from None
        finally:
            call.cancel()

    def _last(self, result: pb.TaskResult, text: str, back_end: BackEnd) -> Chunk:
        if result.model != back_end.model:
            self.healthy, self._stale = False, True
            raise invalid("model", "is of another model than the one that was asked")
        if not result.text.startswith(text):
            raise invalid("content", "is another text than the one that was streamed")
        rest = result.text[len(text) :]
        timings = Timings(queue_s=result.timings.queue_seconds)
        return Chunk(rest, FinishReason.STOP, decode_usage(result.usage), timings)

    # Errors

    def _not_answered(self, error: grpc.aio.AioRpcError) -> NotBegun:
        """A check that failed: nothing was generated."""
        told = read_error(error)
        if not told.reason and told.code in _NO_ANSWER:
            log.debug("back end %s: %s", self.name, told)
            return NotBegun.unreached(permanent=_untrusted(told))
        found = self._failure(told)
        if isinstance(found, NotBegun):
            return found
        return NotBegun(found, permanent=error.code() in _PERMANENT)

    def _failed(self, error: grpc.aio.AioRpcError, *, begun: bool) -> Exception:
        """A request that failed. begun: whether text has arrived."""
        told = read_error(error)
        found = self._failure(told)
        if not isinstance(found, NotBegun) or not begun:
            return found
        return found.error

    def _failure(self, told: CallError) -> ServiceError | NotBegun:
        """What the error of a call becomes: ``NotBegun`` where nothing was generated."""
        log.warning("back end %s: %s %s", self.name, told.reason or told.code.name, told.message)
        if not told.reason:
            return self._bare_failure(told)
        found = error_of(_told(told))
        if isinstance(found, Overloaded):
            return NotBegun(found, after_s=found.retry_after_s)
        if told.reason in NOT_NOW:
            self.healthy, self._stale = False, True
            return NotBegun(found)
        if told.code in _PERMANENT:
            self._stale = True
            return NotBegun(found, permanent=True)
        return found

    def _bare_failure(self, told: CallError) -> ServiceError | NotBegun:
        """The error of a call that no server of this project has answered."""
        code = told.code
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return InferenceTimeout("The model server did not answer before the deadline.")
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            self._lost(told)
            if _not_connected(told):
                return NotBegun.unreached(permanent=_untrusted(told))
            return self._broken_off()
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and TOO_LARGE in told.message:
            return invalid("too_large", "is larger than any complete answer")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return BackEndRefusal(
                "The model server refuses the request, which is too large for it.",
                metadata={"status": code.name},
            )
        found = BackEndFailed(
            f"The model server failed ({code.name}). The operator has to look at it.",
            metadata={"status": code.name},
        )
        return NotBegun(found, permanent=True) if code in _PERMANENT else found

    # The connection

    @property
    def _stub(self) -> Any:
        return VisionServiceStub(self._opened())

    def _metadata(self, request_id: str = "") -> tuple[tuple[str, str], ...]:
        found = []
        if self._options.key is not None:
            found.append(("authorization", f"Bearer {self._options.key}"))
        if request_id:
            found.append(("x-request-id", request_id))
        return tuple(found)

    def _opened(self) -> grpc.aio.Channel:
        """The channel, opened when it is first used: it belongs to the event loop."""
        if self._closed:
            raise NotBegun.unreached()
        if self._channel is None:
            scheme, address = self._url.split("://")
            options = (
                *(one for one in CHANNEL_OPTIONS if one[0] != RECEIVE_LIMIT),
                (RECEIVE_LIMIT, MAX_BODY_BYTES),
                DIRECTLY,
                ("grpc.min_reconnect_backoff_ms", int(self._options.connect_s * 1000)),
            )
            self._channel = (
                grpc.aio.insecure_channel(address, options)
                if scheme == "grpc"
                else grpc.aio.secure_channel(address, _credentials(self._options), options)
            )
            self._watching = asyncio.ensure_future(self._watch(self._channel))
        return self._channel

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        """Have the server described again after every break of the connection: another one may answer
        then, or another version."""
        state = channel.get_state()
        while True:
            await channel.wait_for_state_change(state)
            state = channel.get_state()
            if state is not grpc.ChannelConnectivity.READY:
                self._stale = True


def _credentials(options: WireOptions) -> grpc.ChannelCredentials:
    files = (options.ca, options.cert_key, options.cert)
    try:
        return grpc.ssl_channel_credentials(
            *(None if one is None else Path(one).read_bytes() for one in files)
        )
    except OSError as error:
        log.warning("TLS cannot be set up: %s", error)
        raise NotBegun.unreached(permanent=True) from None


def _left_s(deadline: float | None) -> float | None:
    """Seconds until a time of the event loop's clock; None where there is none."""
    return None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())


def _told(error: CallError) -> Told:
    return Told(
        error.reason,
        error.message,
        error.metadata,
        error.field_violations,
        error.retry_after_s,
        unavailable=error.code is grpc.StatusCode.UNAVAILABLE,
        invalid=error.code is grpc.StatusCode.INVALID_ARGUMENT,
        status=error.code.name,
    )


def _not_connected(error: CallError) -> bool:
    """Whether no connection could be made, so that nothing was sent."""
    return "failed to connect" in error.message or "resolution failed" in error.message


def _untrusted(error: CallError) -> bool:
    """Whether TLS failed, which another attempt does not change."""
    return "handshake failed" in error.message.lower()
