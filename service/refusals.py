"""What all front ends tell a caller whose call cannot be answered."""

from __future__ import annotations

import asyncio
import logging

from service.errors import EngineUnavailable, InferenceTimeout, InternalError, ServiceError
from service.lifecycle import REFUSALS, Phase
from service.logs import pairs

INTERNAL_TEXT = "Internal error. The operator finds the cause in the log under the request id."

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
