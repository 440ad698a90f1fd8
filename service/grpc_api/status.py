"""Converts a ServiceError to a gRPC status with ``google.rpc`` details."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from service.error_table import row_of
from service.errors import DOMAIN, InvalidRequest, Overloaded, ServiceError

DETAILS_KEY = "grpc-status-details-bin"
TEXT_LIMIT = 500
"""Maximum length of a message or a description, in bytes of UTF-8."""
DETAILS_LIMIT = 3000
"""Maximum size of all details, in bytes. Clients refuse trailers above 8 KiB, which carry the
details as base64."""


def status_of(error: ServiceError, request_id: str) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The status code and the rich status of an error.

    The details are an ErrorInfo, a BadRequest for invalid fields, and a RetryInfo if a retry may
    succeed. To fit into a trailer, long texts are truncated and the last metadata and violations
    are omitted.
    """
    code = code_of(error)
    status = status_pb2.Status(code=code.value[0], message=shortened(error.message))
    status.details.add().Pack(error_info(error, request_id))
    if isinstance(error, InvalidRequest):
        status.details.add().Pack(bad_request(error))
    if isinstance(error, Overloaded):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(retry)
    return code, status


def error_info(error: ServiceError, request_id: str) -> error_details_pb2.ErrorInfo:
    """Reason, domain and as much of the metadata as fits into a third of the details."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    info.metadata["request_id"] = request_id
    size = info.ByteSize()
    for key, value in error.metadata.items():
        text = shortened(value)
        size += len(key) + len(text.encode()) + 8
        if size > DETAILS_LIMIT // 3:
            break
        info.metadata[key] = text
    return info


def bad_request(error: InvalidRequest) -> error_details_pb2.BadRequest:
    """The first violations that fit into half of the details; at least one."""
    bad = error_details_pb2.BadRequest()
    for violation in error.violations:
        bad.field_violations.add(
            field=shortened(violation.field, 200), description=shortened(violation.description)
        )
        if bad.ByteSize() > DETAILS_LIMIT // 2:
            del bad.field_violations[max(1, len(bad.field_violations) - 1) :]
            break
    return bad


def code_of(error: ServiceError) -> grpc.StatusCode:
    """The gRPC status of an error, from its row in the table of errors."""
    return grpc.StatusCode[row_of(error).grpc]


def shortened(text: str, limit: int = TEXT_LIMIT) -> str:
    """The text, truncated to ``limit`` bytes of UTF-8; an ellipsis marks the truncation."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode("utf-8", "ignore") + "…"
