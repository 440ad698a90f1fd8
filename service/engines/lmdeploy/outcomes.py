"""Maps LMDeploy's status of a request to the error for the caller."""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy.messages import ResponseType

from service.errors import ContextTooLong, EngineUnavailable, InternalError, ServiceError

Outcome = Callable[[], ServiceError] | None


def _defect() -> ServiceError:
    return InternalError("internal error")


def _gone() -> ServiceError:
    return EngineUnavailable("the engine has stopped", reason="ENGINE_DEAD")


def _cut() -> ServiceError:
    return EngineUnavailable("the engine ended the request before it was complete; try again")


def _too_long() -> ServiceError:
    return ContextTooLong(
        "task",
        "is longer than the memory of the engine allows; shorten the text or send fewer or "
        "smaller images",
    )


OUTCOMES: dict[ResponseType, Outcome] = {
    ResponseType.SUCCESS: None,  # the request continues
    ResponseType.FINISH: None,
    ResponseType.CANCEL: _cut,  # not a cancellation of ours: a cancelled caller reads no more output
    ResponseType.ENGINE_STOP_ERROR: _gone,
    ResponseType.NO_QUEUE: _gone,
    ResponseType.INPUT_LENGTH_ERROR: _too_long,
    # TurboMind fails the first request of the queue if it does not fit into the empty cache.
    ResponseType.OUT_OF_MEMORY: _too_long,
    ResponseType.INTERNAL_ENGINE_ERROR: _defect,
    ResponseType.SESSION_REPEAT: _defect,
    ResponseType.SESSION_NOT_EXIST: _defect,
    ResponseType.HANDLER_NOT_EXIST: _defect,
    ResponseType.PREFIX_CACHE_CONFLICT: _defect,
    ResponseType.NOT_SUPPORTED: _defect,
}
"""Every status of an output. A test compares this table with LMDeploy's enumeration."""


def error_of(status: ResponseType) -> ServiceError | None:
    """The error for a status; None for an answer that continues or ended normally."""
    outcome = OUTCOMES.get(status, _defect)
    return None if outcome is None else outcome()
