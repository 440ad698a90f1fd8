"""Logging: one line per event, ``key=value`` pairs, and the request id in every line of a call."""

from __future__ import annotations

import faulthandler
import logging
import re
import sys
import time
from contextvars import ContextVar
from functools import lru_cache

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the call that the current task works for; ``-`` outside of a call."""


class KeyValueFormatter(logging.Formatter):
    """``time=… level=… logger=… request_id=… message``, then a traceback where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        when = f"{_second(int(record.created))}.{int(record.msecs):03d}Z"
        return (
            f"time={when} level={record.levelname.lower()} "
            f"logger={record.name} request_id={request_id.get()} {record.message}"
        )


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def configure(level: str = "INFO") -> None:
    """Send all logs to stderr in one format. For programs; a library user keeps their own."""
    # What the format does not show is not gathered: half of what a line costs.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler()
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def trace_crashes() -> None:
    """Leave the stack of every thread on stderr when native code crashes.

    Call again after imports: libraries install handlers of their own, which then run after this one.
    """
    if sys.stderr is not None:
        faulthandler.disable()
        faulthandler.enable()


def pairs(**values: object) -> str:
    """``key=value`` pairs; values with blanks or quotes are quoted: one event stays one line."""
    return " ".join(f"{key}={_plain(value)}" for key, value in values.items())


PLAIN = re.compile(r"[^ \"'=]+")


def _plain(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return repr(text) if _odd(text) else text


def _odd(text: str) -> bool:
    return not text.isprintable() or PLAIN.fullmatch(text) is None
