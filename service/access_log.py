"""The line of the log that every call leaves when it has ended, whichever front end it came through."""

from __future__ import annotations

import logging

from service.logs import pairs
from service.observation import OK, CallRecord

log = logging.getLogger("service.access")


class AccessLog:
    """Listens to an ``Observation``. every: one of so many calls that succeed gets a line."""

    def __init__(self, every: int = 1) -> None:
        self._every = every
        self._skipped = 0

    def __call__(self, record: CallRecord) -> None:
        """Write the line of a call that has ended."""
        if record.probe or not log.isEnabledFor(logging.INFO):
            return
        if record.code == OK:
            self._skipped += 1
            if self._skipped < self._every:
                return
            self._skipped = 0
        log.info("call %s", pairs(**fields_of(record)))


def fields_of(record: CallRecord) -> dict[str, object]:
    """What a line says. Names and numbers of the server's own; nothing that a caller sent but the
    names that it has here, and its address."""
    found: dict[str, object] = {
        "method": record.path or record.method,
        "code": record.code,
        "reason": record.reason,
        "seconds": record.seconds,
        "caller": record.caller,
        "peer": record.peer,
    }
    if record.traceparent:
        found["trace_id"] = record.traceparent.split("-")[1]
    if record.task:
        found |= {"model": record.model, "task": record.task}
    if record.images:
        found |= {
            "images": record.images,
            "pixels": record.pixels,
            "image_bytes": record.image_bytes,
        }
    if record.admitted:
        found["queued_s"] = record.queued_s
    if record.first_token_s is not None:
        found["first_token_s"] = record.first_token_s
    if record.attempts:
        usage = record.usage
        found |= {
            "prompt_tokens": usage.prompt_tokens,
            "image_tokens": usage.image_tokens,
            "output_tokens": usage.output_tokens,
            "attempts": record.attempts,
            "finish_reason": record.finish_reason,
        }
    return found
