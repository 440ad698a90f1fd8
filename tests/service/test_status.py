"""Every error class has a status and details; nothing leaks, nothing is too long for a trailer."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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
    """Of the service: classes of tests live on until a collection finds them."""
    for child in kind.__subclasses__():
        if child.__module__.startswith("service."):
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


# The page of errors

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(?P<reason>[A-Z_]+)` \| (?P<status>[A-Z_]+) \|", re.MULTILINE)
NO_REASONS = {"API_KEY", "GRPC_VERBOSITY", "TM_LOG_LEVEL"}  # names of environment variables
NO_REASONS |= {"MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
NO_REASONS |= {"MAX_STATES"}  # in a module's __all__


def reasons_in_the_code() -> set[str]:
    """Every constant of the service that reads like a reason."""
    found = set()
    for path in (ROOT / "service").rglob("*.py"):
        if path.parts[len(ROOT.parts) + 1] not in ("pb", "cli"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.update(re.findall(r"\A(?:[A-Z]+(?:_[A-Z]+)+)\Z", node.value))
    return (found - NO_REASONS) | {kind.reason for kind in subclasses(ServiceError)}


def test_the_page_of_errors_has_every_reason_and_no_other() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    listed = [found["reason"] for found in ROW.finditer(page)]
    assert len(listed) == len(set(listed))
    assert set(listed) == reasons_in_the_code()


def test_the_page_of_errors_has_the_status_of_the_table() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    statuses = {found["reason"]: found["status"] for found in ROW.finditer(page)}
    for kind in subclasses(ServiceError):
        assert statuses[kind.reason] == STATUS[kind].name
    assert {statuses[name] for name in statuses if name.startswith("ENGINE_")} == {"UNAVAILABLE"}
