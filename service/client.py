"""What callers in Python need beside the generated stub: a channel, and errors that can be read."""

from __future__ import annotations

import collections
import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from service.status import DETAILS_KEY

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),  # the server's limit decides, and its error names it
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # a server that comes up is found within a second
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
DIRECTLY = ("grpc.enable_http_proxy", 0)
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where gRPC looks for a proxy, in this order; it reads neither upper case nor ``all_proxy``."""
EXCLUSION_VARIABLES = ("no_grpc_proxy", "no_proxy")


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy: HOST:PORT without user and password, and the variable that names it."""

    address: str
    variable: str


@dataclass(frozen=True)
class CallError:
    """An error of a call, unpacked.

    reason: of ErrorInfo; empty where the error did not come from our server. violations: path of a
    field and what is wrong with it; a field may come several times. retry_after_s: when to come
    again, where the server says so.
    """

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    retry_after_s: float | None = None
    request_id: str = ""

    @property
    def fields(self) -> dict[str, str]:
        """Path of a field -> the first thing that is wrong with it."""
        found: dict[str, str] = {}
        for path, what in self.violations:
            found.setdefault(path, what)
        return found


def open_channel(
    address: str,
    *,
    api_key: str | None = None,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    tls_name: str | None = None,
) -> grpc.Channel:
    """A blocking channel. ``ca`` turns TLS on; ``cert`` and ``key`` are the caller's, for mTLS.

    tls_name: the name that the certificate of the server must be for, in place of the host's.
    A proxy of the environment is used as gRPC does, but never for this machine.
    """
    options: tuple[tuple[str, Any], ...] = CHANNEL_OPTIONS
    if is_loopback(address):
        options = (*options, DIRECTLY)
    if tls_name is not None:
        options = (*options, ("grpc.ssl_target_name_override", tls_name))
    if ca is None:
        channel = grpc.insecure_channel(address, options)
    else:
        credentials = grpc.ssl_channel_credentials(
            ca.read_bytes(),
            key.read_bytes() if key else None,
            cert.read_bytes() if cert else None,
        )
        channel = grpc.secure_channel(address, credentials, options)
    return channel if api_key is None else grpc.intercept_channel(channel, _ApiKey(api_key))


def host_of(address: str) -> str:
    """The host of HOST:PORT, or of an address with a scheme of gRPC; IPv6 without brackets."""
    target = re.sub(r"^(dns|ipv4|ipv6):(//[^/]*/)?/*", "", address)
    return re.sub(r":\d+$", "", target).strip("[]")


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine: localhost, 127.0.0.1, [::1], 0.0.0.0, a socket file."""
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
    """The proxy through which ``open_channel`` calls an address; None where it calls directly."""
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
    """Whether an entry of ``no_proxy``, the end of a name or a network, covers a host."""
    if entry and host.lower().endswith(entry.lower()):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:  # a name
        return False


def read_error(error: grpc.RpcError) -> CallError:
    """Unpack the status and the ``google.rpc`` details of a failed call, blocking or asyncio."""
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
        violations=tuple((one.field, one.description) for one in bad.field_violations)
        if bad
        else (),
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
        request_id=str(metadata.get("x-request-id", "")),
    )


def _status(data: Any) -> status_pb2.Status:
    try:
        return status_pb2.Status.FromString(data)
    except DecodeError:  # a proxy's own trailer: the code and the message still say something
        return status_pb2.Status()


def _unpacked(status: status_pb2.Status, into: Any) -> Any:
    """The detail of the type of ``into``, or None."""
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
    """Details of a call with other metadata; gRPC has no public class to build one."""


class _ApiKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends the key with every call."""

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
