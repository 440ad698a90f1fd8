"""ServiceError -> gRPC status with ``google.rpc`` details: where errors become bytes."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from service.errors import DOMAIN, STATUS, InvalidRequest, Overloaded, ServiceError

DETAILS_KEY = "grpc-status-details-bin"
TEXT_LIMIT = 400
"""Characters of a message or a description. Trailers above 8 KiB are refused by clients."""
VIOLATION_LIMIT = 8
METADATA_LIMIT = 16


def status_of(error: ServiceError, request_id: str) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The status code and the rich status of an error.

    Always an ErrorInfo; a BadRequest where fields are wrong; a RetryInfo where coming again helps.
    """
    code = code_of(error)
    status = status_pb2.Status(code=code.value[0], message=shortened(error.message))
    metadata = dict(list(error.metadata.items())[:METADATA_LIMIT])
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={
            "request_id": request_id,
            **{key: shortened(value) for key, value in metadata.items()},
        },
    )
    status.details.add().Pack(info)
    if isinstance(error, InvalidRequest):
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[:VIOLATION_LIMIT]:
            bad.field_violations.add(
                field=shortened(violation.field), description=shortened(violation.description)
            )
        status.details.add().Pack(bad)
    if isinstance(error, Overloaded):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(retry)
    return code, status


def code_of(error: ServiceError) -> grpc.StatusCode:
    """The status code of the nearest class in the table; INTERNAL for one that is not in it."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return grpc.StatusCode.INTERNAL


def shortened(text: str) -> str:
    """At most TEXT_LIMIT characters, the last one an ellipsis where something was cut."""
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1] + "…"
