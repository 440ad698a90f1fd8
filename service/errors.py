"""Every error that a client can see. `service.error_table` maps their reasons to statuses.

ServiceError
├── InvalidRequest            a field of the request is wrong; carries field violations
│   ├── ImageError            IMAGE_…
│   ├── TooManyImages
│   ├── GrammarError          SCHEMA_…, GRAMMAR_…
│   └── ContextTooLong
├── Unauthenticated           API_KEY_…
├── UnknownModel
├── UnknownTask
├── VisionDisabled
├── OutputTruncated
├── OutputInvalid
├── NoUsableFields
├── InferenceTimeout
├── Overloaded
│   └── QuotaExceeded
├── EngineUnavailable         ENGINE_…
└── InternalError

Messages are written for the caller: they say what to change and never contain a path, an address or
a traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DOMAIN = "qwen3vl.service"
"""The ``domain`` of every ``google.rpc.ErrorInfo``."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """The path of a request field in the proto (``sampling.top_p``, ``images[2].data``), and a
    description of the problem."""

    field: str
    description: str


class ServiceError(Exception):
    """Base of all errors that are shown to a client."""

    reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = dict(metadata or {})

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the fields, because engines in other processes send their errors to the server.

        The default would call the constructor with the message alone, but some classes need more
        arguments. Data from clients is never unpickled.
        """
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[ServiceError], args: tuple[object, ...], fields: dict[str, object]
) -> ServiceError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class InvalidRequest(ServiceError):
    """One or more fields of the request are invalid."""

    reason = "INVALID_FIELD"

    def __init__(
        self,
        field: str,
        description: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        more: tuple[FieldViolation, ...] = (),
        summary: str = "",
    ) -> None:
        """summary: replaces the first description in the message, for an error with several
        violations."""
        super().__init__(f"{field}: {summary or description}", reason=reason, metadata=metadata)
        self.violations = (FieldViolation(field, description), *more)


class ImageError(InvalidRequest):
    """An image cannot be used."""

    reason = "IMAGE_INVALID"


class TooManyImages(InvalidRequest):
    """The request has more images than the server, the model or the task accepts."""

    reason = "TOO_MANY_IMAGES"

    def __init__(self, actual: int, limit: int, field: str = "images") -> None:
        super().__init__(
            field,
            f"has {actual} images, at most {limit} are allowed",
            metadata={"limit": str(limit), "actual": str(actual)},
        )


class GrammarError(InvalidRequest):
    """A JSON schema, regular expression, EBNF grammar or choice cannot be used."""

    reason = "GRAMMAR_INVALID"


class ContextTooLong(InvalidRequest):
    """The prompt leaves no room for an answer in the context, or less room than max_tokens
    needs."""

    reason = "CONTEXT_TOO_LONG"


class Unauthenticated(ServiceError):
    """The server requires an API key, and the call has no key or an unknown key."""

    reason = "API_KEY_INVALID"


class UnknownModel(ServiceError):
    """The server has no model of this name."""

    reason = "UNKNOWN_MODEL"


class UnknownTask(ServiceError):
    """No task is registered under this name."""

    reason = "UNKNOWN_TASK"


class VisionDisabled(ServiceError):
    """The request has images, but the model was started without vision."""

    reason = "VISION_DISABLED"


class OutputTruncated(ServiceError):
    """Generation ended before the answer was complete. The partial answer is not returned."""

    reason = "OUTPUT_TRUNCATED"


class OutputInvalid(ServiceError):
    """The model's answer does not match the schema, or the task's parser rejects it."""

    reason = "OUTPUT_INVALID"


class NoUsableFields(ServiceError):
    """The answer is valid but empty: no field has information about the image."""

    reason = "NO_USABLE_FIELDS"


class InferenceTimeout(ServiceError):
    """Inference took longer than the server allows, or the caller's deadline passed."""

    reason = "INFERENCE_TIMEOUT"


class Overloaded(ServiceError):
    """The queue is full; ``retry_after_s`` says when to try again."""

    reason = "OVERLOADED"

    def __init__(
        self, message: str, *, retry_after_s: float, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, metadata=metadata)
        self.retry_after_s = retry_after_s


class QuotaExceeded(Overloaded):
    """The caller uses as much of the server as it may; ``retry_after_s`` tells when to come again."""

    reason = "QUOTA_EXCEEDED"


class EngineUnavailable(ServiceError):
    """The engine is loading, draining, unhealthy or dead."""

    reason = "ENGINE_UNAVAILABLE"


class BackEndFailed(ServiceError):
    """The model server behind this one failed, or refused what this server asked in its own name."""

    reason = "BACKEND_FAILED"


class BackEndAnswerInvalid(ServiceError):
    """The model server behind this one sent no complete answer. ``fault`` of the metadata names
    what is wrong with it."""

    reason = "BACKEND_ANSWER_INVALID"


class BackEndRefusal(ServiceError):
    """The model server behind this one refused the request."""

    reason = "BACKEND_REFUSED"


class InternalError(ServiceError):
    """A bug in the server. The message is fixed; the log has the cause under the request id."""

    reason = "INTERNAL"


def forget_frames(error: BaseException) -> None:
    """Cut the error, and those it came from, off the frames that they passed.

    Frames hold requests and images, and often the error itself: such a circle stays in memory until
    a collection finds it.
    """
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        one = rest.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            rest += [one.__cause__, one.__context__]
