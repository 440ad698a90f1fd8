"""The blocking and the asyncio client for a qwen3vl server, with channels and parsed errors."""

from __future__ import annotations

import asyncio
import collections
import ipaddress
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from qwen3vl.v1 import vision_pb2 as pb
from qwen3vl.v1.vision_pb2_grpc import VisionServiceStub

DEFAULT_ADDRESS = "localhost:50051"
TIMEOUT_S = 120.0
ATTEMPTS = 3
DETAILS_KEY = "grpc-status-details-bin"

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),  # the server's limit decides, and its error names it
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # a server that comes up is found within a second
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_Response = TypeVar("_Response")

DIRECTLY = ("grpc.enable_http_proxy", 0)
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Variables in which gRPC looks for a proxy, in this order. gRPC reads neither upper-case names nor
``all_proxy``."""
EXCLUSION_VARIABLES = ("no_grpc_proxy", "no_proxy")


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy: its HOST:PORT, without user and password, and the variable that sets it."""

    address: str
    variable: str


class CallError(Exception):
    """The parsed error of a call; ``__cause__`` is the error of gRPC.

    Attributes:
        code: gRPC status.
        message: a text for people that says what to change; its wording may change.
        reason: stable reason from ErrorInfo; empty if the error does not come from a qwen3vl
            server.
        metadata: metadata from ErrorInfo, such as limits and actual values.
        field_violations: pairs of a field's path and a description of the problem; a field may have
            several.
        retry_after_s: seconds to wait before a retry, if the server recommends one.
        request_id: id of the call in the server's log.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field_violations: Sequence[tuple[str, str]] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(code, message, reason)
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.field_violations = tuple(field_violations)
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    @property
    def fields(self) -> dict[str, str]:
        """Path of a field -> its first problem."""
        found: dict[str, str] = {}
        for path, what in self.field_violations:
            found.setdefault(path, what)
        return found

    def __str__(self) -> str:
        lines = [f"{self.code.name}: {self.message}"]
        if self.reason:
            lines.append(f"reason {self.reason}, request id {self.request_id}")
        lines += [f"{path} {what}" for path, what in self.field_violations]
        return "\n  ".join(lines)


class Client:
    """A blocking client. Use it in a ``with`` block, or close it. Thread-safe.

    Args:
        address: HOST:PORT.
        api_key: API key, sent with every call.
        tls: use TLS, and verify the server's certificate with the root certificates of gRPC.
        ca: PEM file with the certificate of a CA; turns TLS on.
        cert, key: PEM files with the caller's certificate and private key, for mutual TLS.
        tls_name: expected name in the server's certificate, if it differs from the host name.
        timeout_s: deadline of a call, in seconds, for all attempts together.
        attempts: maximum number of attempts of a call, 1 to 5; 1 turns retries off.

    A call is retried only if no part of an answer has arrived. gRPC retries UNAVAILABLE, and this
    class retries errors with a retry delay (RetryInfo). Every method raises `CallError`.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: bool = False,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        tls_name: str | None = None,
        timeout_s: float = TIMEOUT_S,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._retries = _Retries(address, attempts, timeout_s)
        self._metadata = _metadata(api_key)
        self._channel = open_channel(
            address, tls=tls, ca=ca, cert=cert, key=key, tls_name=tls_name, attempts=attempts
        )
        self._stub = VisionServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        self._channel.close()

    def analyze_image(
        self, request: pb.AnalyzeImageRequest, *, timeout_s: float | None = None
    ) -> pb.AnalyzeImageResponse:
        """Describe an image, or keyframes of one scene."""
        return self._call(self._stub.AnalyzeImage, request, timeout_s)

    def run_task(
        self, request: pb.RunTaskRequest, *, timeout_s: float | None = None
    ) -> pb.RunTaskResponse:
        """Run a task and return the complete answer."""
        return self._call(self._stub.RunTask, request, timeout_s)

    def stream_task(
        self, request: pb.StreamTaskRequest, *, timeout_s: float | None = None
    ) -> Iterator[pb.StreamTaskResponse]:
        """Run a task; yields the text while it is generated, then the result. The call starts when
        the first event is requested, and is cancelled when the iterator is closed."""
        tries = self._retries.begin(timeout_s)
        while True:
            call = self._stub.StreamTask(request, timeout=tries.left_s(), metadata=self._metadata)
            begun = False
            try:
                for event in call:
                    begun = True
                    yield event
                return
            except grpc.RpcError as error:
                pause_s = tries.pause_s(error, begun)
            finally:
                call.cancel()
            time.sleep(pause_s)

    def list_tasks(
        self, request: pb.ListTasksRequest | None = None, *, timeout_s: float | None = None
    ) -> pb.ListTasksResponse:
        """List the registered tasks."""
        return self._call(self._stub.ListTasks, request or pb.ListTasksRequest(), timeout_s)

    def get_task(
        self, request: pb.GetTaskRequest, *, timeout_s: float | None = None
    ) -> pb.GetTaskResponse:
        """Describe one registered task."""
        return self._call(self._stub.GetTask, request, timeout_s)

    def validate_schema(
        self, request: pb.ValidateSchemaRequest, *, timeout_s: float | None = None
    ) -> pb.ValidateSchemaResponse:
        """Report which keywords of a schema are enforced."""
        return self._call(self._stub.ValidateSchema, request, timeout_s)

    def get_model(
        self, request: pb.GetModelRequest | None = None, *, timeout_s: float | None = None
    ) -> pb.GetModelResponse:
        """Describe a served model and the limits of the server."""
        return self._call(self._stub.GetModel, request or pb.GetModelRequest(), timeout_s)

    def list_models(
        self, request: pb.ListModelsRequest | None = None, *, timeout_s: float | None = None
    ) -> pb.ListModelsResponse:
        """List the served models."""
        return self._call(self._stub.ListModels, request or pb.ListModelsRequest(), timeout_s)

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Any, _Response],
        request: Any,
        timeout_s: float | None,
    ) -> _Response:
        tries = self._retries.begin(timeout_s)
        while True:
            try:
                return method(request, timeout=tries.left_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                pause_s = tries.pause_s(error)
            time.sleep(pause_s)


class AsyncClient:
    """The client for asyncio, with the same arguments, methods and errors as `Client`.

    Use it in an ``async with`` block, or close it. It belongs to one event loop.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: bool = False,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        tls_name: str | None = None,
        timeout_s: float = TIMEOUT_S,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._retries = _Retries(address, attempts, timeout_s)
        self._metadata = _metadata(api_key)
        credentials, options = (
            _credentials(tls, ca, cert, key),
            _options(address, tls_name, attempts),
        )
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        self._stub: Any = VisionServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        await self._channel.close()

    async def analyze_image(
        self, request: pb.AnalyzeImageRequest, *, timeout_s: float | None = None
    ) -> pb.AnalyzeImageResponse:
        """See `Client.analyze_image`."""
        found: pb.AnalyzeImageResponse = await self._call("AnalyzeImage", request, timeout_s)
        return found

    async def run_task(
        self, request: pb.RunTaskRequest, *, timeout_s: float | None = None
    ) -> pb.RunTaskResponse:
        """See `Client.run_task`."""
        found: pb.RunTaskResponse = await self._call("RunTask", request, timeout_s)
        return found

    async def stream_task(
        self, request: pb.StreamTaskRequest, *, timeout_s: float | None = None
    ) -> AsyncIterator[pb.StreamTaskResponse]:
        """See `Client.stream_task`."""
        tries = self._retries.begin(timeout_s)
        while True:
            call = self._stub.StreamTask(request, timeout=tries.left_s(), metadata=self._metadata)
            begun = False
            try:
                async for event in call:
                    begun = True
                    yield event
                return
            except grpc.aio.AioRpcError as error:
                pause_s = tries.pause_s(error, begun)
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    async def list_tasks(
        self, request: pb.ListTasksRequest | None = None, *, timeout_s: float | None = None
    ) -> pb.ListTasksResponse:
        """See `Client.list_tasks`."""
        request = request or pb.ListTasksRequest()
        found: pb.ListTasksResponse = await self._call("ListTasks", request, timeout_s)
        return found

    async def get_task(
        self, request: pb.GetTaskRequest, *, timeout_s: float | None = None
    ) -> pb.GetTaskResponse:
        """See `Client.get_task`."""
        found: pb.GetTaskResponse = await self._call("GetTask", request, timeout_s)
        return found

    async def validate_schema(
        self, request: pb.ValidateSchemaRequest, *, timeout_s: float | None = None
    ) -> pb.ValidateSchemaResponse:
        """See `Client.validate_schema`."""
        found: pb.ValidateSchemaResponse = await self._call("ValidateSchema", request, timeout_s)
        return found

    async def get_model(
        self, request: pb.GetModelRequest | None = None, *, timeout_s: float | None = None
    ) -> pb.GetModelResponse:
        """See `Client.get_model`."""
        request = request or pb.GetModelRequest()
        found: pb.GetModelResponse = await self._call("GetModel", request, timeout_s)
        return found

    async def list_models(
        self, request: pb.ListModelsRequest | None = None, *, timeout_s: float | None = None
    ) -> pb.ListModelsResponse:
        """See `Client.list_models`."""
        request = request or pb.ListModelsRequest()
        found: pb.ListModelsResponse = await self._call("ListModels", request, timeout_s)
        return found

    async def _call(self, name: str, request: Any, timeout_s: float | None) -> Any:
        tries = self._retries.begin(timeout_s)
        method = getattr(self._stub, name)
        while True:
            try:
                return await method(request, timeout=tries.left_s(), metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                pause_s = tries.pause_s(error)
            await asyncio.sleep(pause_s)


@dataclass(frozen=True)
class _Retries:
    """How often a call to an address is tried, and its deadline in seconds."""

    address: str
    attempts: int
    timeout_s: float

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 5:
            raise ValueError(f"attempts must be 1 to 5, not {self.attempts}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {self.timeout_s:g}")

    def begin(self, timeout_s: float | None) -> _Tries:
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        return _Tries(self.address, self.attempts, deadline)


class _Tries:
    """The attempts of one call after errors with RetryInfo. gRPC's own retries happen within each
    attempt."""

    def __init__(self, address: str, attempts: int, deadline: float) -> None:
        self._address = address
        self._more = attempts - 1
        self._deadline = deadline

    def left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def pause_s(self, error: grpc.RpcError, begun: bool = False) -> float:
        """Seconds to wait before the next attempt. Raises ``CallError`` if there is none.

        begun: whether part of an answer has arrived.
        """
        found = read_error(error)
        proxy = None if found.reason else proxy_of(self._address)
        if proxy is not None:  # the error may be that of the proxy
            found.message += f" (through the proxy {proxy.address} that {proxy.variable} names)"
        if found.retry_after_s is None or begun or not self._more:
            raise found from error
        # Random, so that callers that were refused together do not retry at the same time.
        pause_s = found.retry_after_s * random.uniform(1, 1.25)
        if pause_s >= self.left_s():
            raise found from error
        self._more -= 1
        return pause_s


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def open_channel(
    address: str,
    *,
    api_key: str | None = None,
    tls: bool = False,
    ca: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    tls_name: str | None = None,
    attempts: int = 1,
) -> grpc.Channel:
    """Open a blocking channel, for calls with a stub. For the arguments see `Client`.

    A proxy from the environment is used as in gRPC, but never for servers on the same machine.
    """
    credentials, options = _credentials(tls, ca, cert, key), _options(address, tls_name, attempts)
    channel = (
        grpc.insecure_channel(address, options)
        if credentials is None
        else grpc.secure_channel(address, credentials, options)
    )
    return channel if api_key is None else grpc.intercept_channel(channel, _ApiKey(api_key))


def _credentials(
    tls: bool, ca: str | Path | None, cert: str | Path | None, key: str | Path | None
) -> grpc.ChannelCredentials | None:
    """None without TLS."""
    if (cert is not None and key is None) or (key is not None and cert is None):
        raise ValueError("cert and key belong together: give both or neither")
    if not tls and ca is None:
        if cert is not None:
            raise ValueError("cert and key need TLS: give ca, or tls=True")
        return None
    return grpc.ssl_channel_credentials(
        *(None if p is None else Path(p).read_bytes() for p in (ca, key, cert))
    )


def _options(address: str, tls_name: str | None, attempts: int) -> tuple[tuple[str, Any], ...]:
    """Channel arguments. With more than one attempt, gRPC's retry policy retries UNAVAILABLE."""
    options: tuple[tuple[str, Any], ...] = CHANNEL_OPTIONS
    if is_loopback(address):
        options = (*options, DIRECTLY)
    if tls_name is not None:
        options = (*options, ("grpc.ssl_target_name_override", tls_name))
    if attempts == 1:
        return options
    policy = {
        "maxAttempts": attempts,
        "initialBackoff": "0.2s",
        "maxBackoff": "5s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": "qwen3vl.v1.VisionService"}]
    config = {"methodConfig": [{"name": names, "retryPolicy": policy}]}
    return (
        *options,
        ("grpc.service_config", json.dumps(config)),
        # By default gRPC does not retry requests above 256 KiB, and images are larger.
        ("grpc.per_rpc_retry_buffer_size", 2**31 - 1),
    )


def host_of(address: str) -> str:
    """The host of HOST:PORT, or of an address with a gRPC scheme; IPv6 without brackets."""
    target = re.sub(r"^(dns|ipv4|ipv6):(//[^/]*/)?/*", "", address)
    return re.sub(r":\d+$", "", target).strip("[]")


def is_loopback(address: str) -> bool:
    """Whether an address belongs to this machine: localhost, 127.0.0.1, [::1], 0.0.0.0, a socket
    file."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = host_of(address).lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    return found.is_loopback or found.is_unspecified


def proxy_of(address: str) -> Proxy | None:
    """The proxy through which ``open_channel`` connects to an address; None for a direct
    connection."""
    variable = _first_set(PROXY_VARIABLES)
    if variable is None or is_loopback(address):
        return None
    url = urlsplit(os.environ[variable])
    excluded = _first_set(EXCLUSION_VARIABLES)
    entries = os.environ[excluded].split(",") if excluded else []
    if url.scheme != "http" or any(_covers(one.strip(), host_of(address)) for one in entries):
        return None
    return Proxy(url.netloc.rpartition("@")[2], variable)


def _first_set(variables: tuple[str, ...]) -> str | None:
    return next((name for name in variables if os.environ.get(name)), None)


def _covers(entry: str, host: str) -> bool:
    """Whether an entry of ``no_proxy``, a name suffix or a network, matches a host."""
    if entry and host.lower().endswith(entry.lower()):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:  # a name
        return False


def read_error(error: grpc.RpcError) -> CallError:
    """Parse the status and the ``google.rpc`` details of a failed call, blocking or asyncio."""
    call: Any = error
    metadata = dict(call.trailing_metadata() or ())
    code, message = call.code(), call.details() or ""
    status = _status(metadata.get(DETAILS_KEY, b""))
    info = _unpacked(status, error_details_pb2.ErrorInfo())
    bad = _unpacked(status, error_details_pb2.BadRequest())
    retry = _unpacked(status, error_details_pb2.RetryInfo())
    return CallError(
        code=code,
        message=message,
        reason=info.reason if info else "",
        metadata=dict(info.metadata) if info else {},
        field_violations=[(one.field, one.description) for one in bad.field_violations]
        if bad
        else (),
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
        request_id=str(metadata.get("x-request-id", "")),
    )


def _status(data: Any) -> status_pb2.Status:
    try:
        return status_pb2.Status.FromString(data)
    except DecodeError:  # a trailer from a proxy: use only the code and the message
        return status_pb2.Status()


def _unpacked(status: status_pb2.Status, into: Any) -> Any:
    """The detail of the same type as ``into``, or None."""
    for detail in status.details:
        if detail.Unpack(into):
            return into
    return None


class _Details(
    collections.namedtuple(
        "_Details",
        ("method", "timeout", "metadata", "credentials", "wait_for_ready", "compression"),
    ),
    grpc.ClientCallDetails,
):
    """The details of a call with changed metadata; gRPC has no public class for this."""


class _ApiKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the API key to every call."""

    def __init__(self, key: str) -> None:
        self._entry = ("authorization", f"Bearer {key}")

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def _with_key(self, details: Any) -> _Details:
        return _Details(
            details.method,
            details.timeout,
            [*(details.metadata or ()), self._entry],
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
