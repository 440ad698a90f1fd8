"""Errors of a server of this project, for the caller of this one: reason, message and details stay.

What concerns only the two servers, such as a wrong key or model name, is not the caller's fault and
becomes an error of the back end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.errors import (
    BackEndAnswerInvalid,
    BackEndFailed,
    BackEndRefusal,
    ContextTooLong,
    EngineUnavailable,
    FieldViolation,
    GrammarError,
    ImageError,
    InferenceTimeout,
    InvalidRequest,
    NoUsableFields,
    OutputInvalid,
    OutputTruncated,
    Overloaded,
    ServiceError,
    VisionDisabled,
)
from service.types import Chunk, FinishReason, Usage

BUSY_AFTER_S = 1.0
"""When to come again to a busy server that does not say when."""
KEY = ("API_KEY_MISSING", "API_KEY_INVALID", "CERTIFICATE_NOT_ALLOWED")
BETWEEN_SERVERS = (
    *KEY, "UNKNOWN_MODEL", "UNKNOWN_TASK", "UNKNOWN_PATH", "METHOD_NOT_ALLOWED", "MALFORMED_REQUEST",
    "CONTENT_TYPE_UNSUPPORTED", "REQUEST_COMPRESSED", "RECEIVE_TIMEOUT", "INTERNAL", "BACKEND_FAILED",
)  # fmt: skip
"""Reasons that the caller cannot do anything about: this server asked in its own name."""
NOT_NOW = frozenset(
    {"ENGINE_LOADING", "ENGINE_DRAINING", "ENGINE_UNHEALTHY", "GRAMMAR_WORKER_LOST"}
)
"""Reasons of a server that has not begun to generate."""
_PLAIN: dict[str, type[ServiceError]] = {
    one.reason: one
    for one in (
        BackEndAnswerInvalid, BackEndRefusal, InferenceTimeout, NoUsableFields, OutputInvalid,
        OutputTruncated, VisionDisabled,
    )
}  # fmt: skip
_OF_GRAMMARS = ("SCHEMA_", "GRAMMAR_")
_CUT = {one.value: one for one in (FinishReason.LENGTH, FinishReason.LOOP)}
_REASON = re.compile(r"[A-Z][A-Z_]{2,63}")


@dataclass(frozen=True, slots=True)
class Told:
    """An error as a server of this project told it.

    unavailable, invalid: what its status says, for reasons that this version does not know.
    violations: (path, description). retry_after_s: None where it does not say.
    """

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[tuple[str, str]] = ()
    retry_after_s: float | None = None
    unavailable: bool = False
    invalid: bool = False
    status: str = ""


def error_of(told: Told) -> ServiceError:
    """The error for the caller."""
    # The other server's id is the one of this call, and every front end adds it again.
    metadata = {name: value for name, value in told.metadata.items() if name != "request_id"}
    reason, message = told.reason, told.message
    if reason in BETWEEN_SERVERS:
        return between_servers(told)
    if told.retry_after_s is not None or reason in ("OVERLOADED", "QUOTA_EXCEEDED"):
        # The quota is that of this server: its callers have quotas of their own.
        return Overloaded(
            "The model server is busy; try again later." if reason == "QUOTA_EXCEEDED" else message,
            retry_after_s=BUSY_AFTER_S if told.retry_after_s is None else told.retry_after_s,
            metadata={} if reason == "QUOTA_EXCEEDED" else metadata,
        )
    if told.violations:
        return _of_fields(told, metadata)
    if told.unavailable:
        return EngineUnavailable(message, reason=reason, metadata=metadata)
    if reason in _PLAIN:
        return _PLAIN[reason](message, metadata=metadata)
    if told.invalid:
        return BackEndRefusal(message, reason=reason, metadata=metadata)
    return BackEndFailed(message, reason=reason, metadata=metadata)


def cut(metadata: Mapping[str, str]) -> Chunk:
    """The end of a text that the other server cut, by the metadata of its OUTPUT_TRUNCATED. What a cut
    text is worth is decided where every engine's answers are."""
    names = ("prompt_tokens", "image_tokens", "output_tokens")
    counts = [int(number) if (number := metadata.get(one, "")).isdecimal() else 0 for one in names]
    reason = _CUT.get(metadata.get("finish_reason", ""), FinishReason.LENGTH)
    return Chunk("", reason, Usage(*counts))


def between_servers(told: Told) -> BackEndFailed:
    """The error of a request that this server should not have made, or of a bug in the other."""
    if told.reason in KEY:
        why = "refuses the API key or the certificate of this server"
    elif told.reason == "UNKNOWN_MODEL":
        why = "does not serve the model that is asked for"
    else:
        why = "failed"
    return BackEndFailed(
        f"The model server {why} ({told.reason or told.status}). The operator has to look at it.",
        metadata={"status": told.status or told.reason},
    )


def _of_fields(told: Told, metadata: dict[str, str]) -> ServiceError:
    (path, description), *more = told.violations
    kind: type[InvalidRequest] = InvalidRequest
    if told.reason.startswith(_OF_GRAMMARS):
        kind = GrammarError
    elif told.reason.startswith("IMAGE_"):
        kind = ImageError
    elif told.reason == ContextTooLong.reason:
        kind = ContextTooLong
    summary = told.message.removeprefix(f"{path}: ")
    if kind is ContextTooLong and path.startswith("task"):
        path = "task"  # the caller's own path is put in its place
    return kind(
        path,
        description,
        reason=told.reason,
        metadata=metadata,
        more=tuple(FieldViolation(*one) for one in more),
        summary=summary,
    )


def told_over_http(status: int, body: bytes, retry_after_s: float | None) -> Told | None:
    """The error in the body of an answer; None for a body that no server of this project wrote, such
    as that of a proxy."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    error = value.get("error") if isinstance(value, dict) else None
    return told_in(error, status, retry_after_s)


def told_in(error: Any, status: int = 500, retry_after_s: float | None = None) -> Told | None:
    """The error in an object ``error``, of an answer or of an event; None for anything else."""
    if not isinstance(error, dict):
        return None
    reason, message = error.get("code"), error.get("message")
    if not isinstance(reason, str) or not isinstance(message, str) or not _REASON.fullmatch(reason):
        return None
    metadata, param = error.get("metadata"), error.get("param")
    violations = []
    if isinstance(param, str):
        path = _path(param, reason)
        message = message.removeprefix(f"{param}: ")
        violations = [(path, message)]
        message = f"{path}: {message}"
    return Told(
        reason,
        message,
        {k: v for k, v in metadata.items() if isinstance(v, str)}
        if isinstance(metadata, dict)
        else {},
        violations,
        retry_after_s,
        unavailable=status == 503,
        invalid=400 <= status < 500,
        status=str(status),
    )


def _path(param: str, reason: str) -> str:
    """The path in a gRPC request of a field of OpenAI's API, as far as it is known."""
    if reason.startswith("IMAGE_") or reason == "TOO_MANY_IMAGES":
        return "images"
    if param in ("max_tokens", "max_completion_tokens"):
        return "sampling.max_tokens"
    if param in ("temperature", "top_p", "top_k", "repetition_penalty", "seed"):
        return f"sampling.{param}"
    return "task"
