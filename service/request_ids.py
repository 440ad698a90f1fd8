"""The id of a call, which its caller may choose: it stands in the log and in every answer."""

from __future__ import annotations

import random
import re

REQUEST_ID_KEY = "x-request-id"
TRACE_KEY = "traceresponse"
"""Names the span of a call in its answer; from the draft of the W3C's Trace Context Level 2."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
new_ids = random.Random()  # an id is a name, not a secret: no system call for each


def chosen_id(given: str | bytes | None) -> str:
    """The caller's request id where it is a sensible one, else a new one."""
    if isinstance(given, str) and REQUEST_ID.fullmatch(given):
        return given
    return f"{new_ids.getrandbits(64):016x}"
