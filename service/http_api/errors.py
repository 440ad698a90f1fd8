"""ServiceError -> HTTP status, headers and body in OpenAI's form: where errors become bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from service.error_table import row_of
from service.errors import InvalidRequest, Overloaded, ServiceError
from service.http_api.codec import path_of
from service.http_api.reading import BODY

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""HTTP status -> the ``type`` of an error; others by their class."""
RETRY_AFTER_S = 2.0
"""When to come again to a server that cannot take calls now."""
OPTIONS = {
    "raise max_tokens": "raise {max_tokens}",
    "which strict requires": "which require_enforced requires",
    "or leave out strict": "or leave out require_enforced",
}
"""Words of an error that name an option of gRPC -> the same with the field of a request."""
MAX_TEXT = 2000
MAX_VIOLATIONS = 16


def headers_of(error: ServiceError) -> list[tuple[str, str]]:
    """The headers of an error: when to come again, and whether a client should.

    openai-python asks three times on 429 and 5xx unless it is told that it should not.
    """
    row = row_of(error)
    if not row.retry:
        return [("x-should-retry", "false")]
    after_s = error.retry_after_s if isinstance(error, Overloaded) else RETRY_AFTER_S
    return [
        ("retry-after", str(max(1, math.ceil(after_s)))),
        ("retry-after-ms", str(max(1, math.ceil(after_s * 1000)))),
    ]


def body_of(error: ServiceError, fields: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The body of an error. fields: see ``codec.path_of``."""
    violations = _violations(error, fields or {})
    found: dict[str, Any] = {
        "message": _message(error, violations, fields or {})[:MAX_TEXT],
        "type": _type(row_of(error).http),
        "param": (violations[0]["param"] or None) if violations else None,
        "code": error.reason,
    }
    if len(violations) > 1:
        found["violations"] = violations
    if error.metadata:
        found["metadata"] = {key: value[:MAX_TEXT] for key, value in error.metadata.items()}
    return {"error": found}


def _type(status: int) -> str:
    return TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _violations(error: ServiceError, fields: Mapping[str, str]) -> list[dict[str, str]]:
    if not isinstance(error, InvalidRequest):
        return []
    return [
        {
            "param": "" if one.field == BODY else path_of(one.field, fields)[:MAX_TEXT],
            "message": one.description[:MAX_TEXT],
        }
        for one in error.violations[:MAX_VIOLATIONS]
    ]


def _message(
    error: ServiceError, violations: list[dict[str, str]], fields: Mapping[str, str]
) -> str:
    """The message with the caller's own names of fields."""
    message = error.message
    max_tokens = path_of("sampling.max_tokens", fields)
    for given, own in OPTIONS.items():
        message = message.replace(given, own.format(max_tokens=max_tokens))
    if not violations or not isinstance(error, InvalidRequest):
        return message
    given = f"{error.violations[0].field}: "
    if not message.startswith(given):
        return message
    name = violations[0]["param"] or BODY
    return f"{name}: {message.removeprefix(given)}"
