"""Every error class has a status and details; nothing leaks, nothing is too long for a trailer."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from docs.generate import PAGE, errors_page
from service import errors
from service.error_table import REASONS, Reason
from service.errors import (
    DOMAIN,
    FieldViolation,
    InvalidRequest,
    OutputTruncated,
    Overloaded,
    ServiceError,
)
from service.grpc_api.status import code_of, status_of

HTTP_OF = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "OUT_OF_RANGE": 422,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
HTTP_ALONE = {
    "UNKNOWN_PATH": 404,
    "METHOD_NOT_ALLOWED": 405,
    "REQUEST_TOO_LARGE": 413,
    "CONTENT_TYPE_UNSUPPORTED": 415,
    "REQUEST_COMPRESSED": 415,
    "BACKEND_FAILED": 502,
    "BACKEND_ANSWER_INVALID": 502,
}
"""Reasons whose HTTP status says more than that of gRPC: gRPC has none for them, or one for many."""
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


KINDS = [kind for kind in subclasses(ServiceError) if kind.__module__ == errors.__name__]


def test_every_class_has_a_reason_of_the_table() -> None:
    assert {kind.reason for kind in KINDS} <= set(REASONS)
    assert len(KINDS) > 10


@pytest.mark.parametrize("row", REASONS.values(), ids=lambda row: row.name)
def test_statuses_exist_and_a_retry_is_offered_where_it_can_help(row: Reason) -> None:
    assert row.name == row.name.upper()
    assert row.retry == (row.grpc in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"))
    assert row.retry == (row.http in (429, 503))
    assert HTTP_ALONE.get(row.name) or HTTP_OF[row.grpc] == row.http
    assert HTTP_ALONE.get(row.name, row.http) == row.http


def test_an_error_has_the_status_of_its_reason_and_not_of_its_class() -> None:
    assert code_of(ServiceError("x", reason="UNKNOWN_TASK")) is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_survive_another_process(kind: type[ServiceError]) -> None:
    error = make(kind)
    error.metadata["limit"] = "1"
    error.__cause__ = ValueError("stays here")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert str(found) == str(error)
    assert vars(found) == vars(error)
    assert found.__cause__ is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_has_an_error_info(kind: type[ServiceError]) -> None:
    code, status = status_of(make(kind), "id-1")
    assert code is grpc.StatusCode[REASONS[kind.reason].grpc]
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
NO_REASONS = {"API_KEY", "GRPC_VERBOSITY", "TM_LOG_LEVEL"}  # names of environment variables
NO_REASONS |= {"MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
NO_REASONS |= {"GLIBC_TUNABLES", "VLLM_MLX_ENDPOINT"}
NO_REASONS |= {"OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL"}
NO_REASONS |= {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"}
NO_REASONS |= {"DATA_LOSS", "INVALID_ARGUMENT"}  # gRPC statuses
NO_REASONS |= {"MAX_STATES"}  # in a module's __all__
NO_REASONS |= {"DEADLINE_EXCEEDED", "NOT_READ"}  # in the access log alone
NO_REASONS |= {"TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"}
NO_REASONS |= {"RAY_USE_TLS"}
NO_REASONS |= {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
NO_REASONS |= {"RAY_USAGE_STATS_ENABLED", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"}
NO_REASONS |= {"DEPLOY_FAILED"}  # a status of Ray Serve


def reasons_in_the_code() -> set[str]:
    """Every constant of the service, and of the reader of images, that reads like a reason."""
    found = set()
    files = [*(ROOT / "service").rglob("*.py"), *(ROOT / "lmdeploy_ext" / "images").rglob("*.py")]
    for path in files:
        if path.parts[len(ROOT.parts) + 1] not in ("pb", "cli", "error_table.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.update(re.findall(r"\A(?:[A-Z]+(?:_[A-Z]+)+)\Z", node.value))
    return (found - NO_REASONS) | {kind.reason for kind in subclasses(ServiceError)}


def test_the_table_has_every_reason_and_no_other() -> None:
    assert set(REASONS) == reasons_in_the_code()


def test_the_page_of_errors_is_generated_from_the_table() -> None:
    assert errors_page() == PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in errors_page() for name in REASONS)
