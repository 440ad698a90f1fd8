"""Every error class has a status and details; nothing leaks, nothing is too long for a trailer."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2

from service import errors
from service.errors import (
    DOMAIN,
    STATUS,
    FieldViolation,
    InvalidRequest,
    OutputTruncated,
    Overloaded,
    ServiceError,
)
from service.status import code_of, status_of

TRAILER_LIMIT = 8 * 1024
"""What clients accept by default for all trailers together."""


def subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def make(kind: type[ServiceError]) -> ServiceError:
    if issubclass(kind, InvalidRequest):
        return kind("field", "wrong")
    if issubclass(kind, Overloaded):
        return kind("busy", retry_after_s=1.5)
    return kind("message")


def detail(status: object, kind: type) -> object | None:
    for packed in status.details:  # type: ignore[attr-defined]
        found = kind()
        if packed.Unpack(found):
            return found
    return None


def test_the_table_is_exhaustive() -> None:
    declared = {kind for kind in subclasses(ServiceError) if kind.__module__ == errors.__name__}
    assert set(STATUS) == declared
    assert len(declared) > 10


@pytest.mark.parametrize("kind", list(STATUS), ids=lambda kind: kind.__name__)
def test_every_error_has_an_error_info(kind: type[ServiceError]) -> None:
    code, status = status_of(make(kind), "id-1")
    assert code is STATUS[kind]
    assert status.code == code.value[0]
    info = detail(status, error_details_pb2.ErrorInfo)
    assert info.reason == kind.reason
    assert info.reason == info.reason.upper()
    assert (info.domain, info.metadata["request_id"]) == (DOMAIN, "id-1")
    bad = detail(status, error_details_pb2.BadRequest)
    assert (bad is not None) == issubclass(kind, InvalidRequest)
    retry = detail(status, error_details_pb2.RetryInfo)
    assert (retry is not None) == issubclass(kind, Overloaded)


def test_overload_says_when_to_return() -> None:
    _, status = status_of(Overloaded("busy", retry_after_s=1.5), "id")
    retry = detail(status, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_an_error_of_an_engine_gets_the_status_of_its_nearest_class() -> None:
    class TooSlow(OutputTruncated):
        pass

    class Strange(ServiceError):
        pass

    assert code_of(TooSlow("x")) is grpc.StatusCode.OUT_OF_RANGE
    assert code_of(Strange("x")) is grpc.StatusCode.INTERNAL


def test_the_longest_error_fits_into_the_trailers() -> None:
    long = "€" * 5000
    violations = tuple(FieldViolation(long, long) for _ in range(100))
    metadata = {f"key{index}": long for index in range(100)}
    error = InvalidRequest(long, long, metadata=metadata, more=violations)
    code, status = status_of(error, "i" * 128)
    encoded = len(status.SerializeToString()) * 4 / 3 + len(status.message.encode()) * 3
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert encoded < TRAILER_LIMIT
    assert detail(status, error_details_pb2.ErrorInfo).reason == "INVALID_FIELD"
    assert len(detail(status, error_details_pb2.BadRequest).field_violations) >= 1
