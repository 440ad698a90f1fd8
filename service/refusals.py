"""What all front ends tell a caller whose call cannot be answered, and how long they wait for one."""

from __future__ import annotations

import asyncio
import logging

from service.errors import EngineUnavailable, InferenceTimeout, InternalError, ServiceError
from service.lifecycle import REFUSALS, Phase
from service.logs import pairs

INTERNAL_TEXT = "Internal error. The operator finds the cause in the log under the request id."
DROP_AFTER_S = 1.0
"""Time after its deadline, in seconds, at which a call is dropped that could not be ended
normally."""
STALL_S = 2.0
"""Time, in seconds, that a message may wait for its reader; after it, a drain no longer waits for
the call."""

error_log = logging.getLogger("service.errors")


def refusal_of(error: BaseException, method: str) -> ServiceError:
    """The error that the caller gets for an error of a handler.

    A cancellation is that of a drain. A defect is logged: its own text and trace stay in the log.
    """
    if isinstance(error, asyncio.CancelledError):
        reason, message = REFUSALS[Phase.DRAINING]
        return EngineUnavailable(message, reason=reason)
    if isinstance(error, ServiceError) and not isinstance(error, InternalError):
        return error
    error_log.error("call failed %s", pairs(method=method), exc_info=error)
    return InternalError(INTERNAL_TEXT)


def late_request(limit_s: float) -> InferenceTimeout:
    """The error of a request that did not arrive in time."""
    return InferenceTimeout(
        f"No complete request came within {limit_s:g} s.",
        reason="RECEIVE_TIMEOUT",
        metadata={"limit_s": f"{limit_s:g}"},
    )
