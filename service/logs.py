"""Logging: one line per event, as ``key=value`` pairs or JSON, and the request id in every line of a call.

A log line never makes its caller wait. Lines go into a bounded queue, and a thread writes them to
stderr. When nobody reads stderr the queue fills up; further lines are dropped and counted, and the
log says how many once it flows again.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import logging.handlers
import os
import queue
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the call that the current task works for; ``-`` outside of a call."""

OURS = ("service", "lmdeploy_ext")
"""Loggers that may be set to debug. Debug lines of libraries can hold what callers sent: Pillow's
repeat the text chunks of an image."""
OUTPUT_LOGGER = "service.output"
"""Gets raw answers of the model, at debug, for calls that ask for it where the operator allows that."""
QUEUE_LINES = 4096
"""Lines that wait for the writer; a line of a call has about 300 bytes."""
BATCH_LINES = 64
"""Lines that one system call writes."""
GATHER_S = 0.01
"""How long the writer waits for further lines before it writes: a thread that wakes for every line
takes turns with the event loop, which costs each call more than its line does. A process that is
killed loses what came in that time; one that ends by itself writes it first."""
FLUSH_LIMIT_S = 2.0
"""How long the end of the process waits for lines that are not written yet."""

log = logging.getLogger(__name__)
console = logging.getLogger("service.console")
"""For people at a terminal, whatever the level of the log: where the server listens, why it ended."""


class Pairs(str):
    """``key=value`` pairs as text, and the values themselves as ``fields``."""

    __slots__ = ("fields",)
    fields: dict[str, object]


class KeyValueFormatter(logging.Formatter):
    """``time=… level=… logger=… request_id=… message``, then a traceback where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name == console.name:
            return record.message
        return (
            f"time={_when(record)} level={record.levelname.lower()} "
            f"logger={record.name} request_id={request_id.get()} {record.message}"
        )


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ``time``, ``level``, ``logger``, ``request_id``, ``message``, then the
    pairs of the message as members of their own, and ``exception`` where there is a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, object] = {
            "time": _when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id.get(),
        }
        arguments = record.args if isinstance(record.args, tuple) else None
        if arguments is None:
            found["message"] = record.getMessage()
        else:
            rest = tuple("" if isinstance(one, Pairs) else one for one in arguments)
            text = str(record.msg)
            found["message"] = (text % rest if rest else text).rstrip()
            for one in arguments:
                if isinstance(one, Pairs):
                    found |= one.fields
        if isinstance(record.exc_info, tuple):
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)  # in ASCII, whatever the encoding of stderr is


FORMATTERS: dict[str, type[logging.Formatter]] = {"pairs": KeyValueFormatter, "json": JsonFormatter}


def _when(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class QueueHandler(logging.handlers.QueueHandler):
    """Puts finished lines into the queue of the writer; drops and counts what finds no room.

    on_drop: called for every line that is dropped.
    """

    queue: queue.Queue[str | threading.Event | None]

    def __init__(self, write: Callable[[bytes], object], on_drop: Callable[[], object]) -> None:
        super().__init__(queue.Queue(QUEUE_LINES))
        self._on_drop = on_drop
        self._unsaid = 0
        self._write = write
        self._encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # a line whose arguments do not fit its text must not end a call
            self.handleError(record)
            return
        # Half of the queue has to be free before lines are taken again: where the reader is slow,
        # the log has one gap and one remark in place of one remark after every line.
        if self._unsaid and self.queue.qsize() > QUEUE_LINES // 2:
            self._drop()
            return
        self._say_dropped()
        self._put(line)

    def flush_lines(self, limit_s: float) -> bool:
        """Wait until all lines so far are written. Returns False when that took too long."""
        self.acquire()
        try:
            self._say_dropped()
        finally:
            self.release()
        end = time.monotonic() + limit_s
        written = threading.Event()
        try:
            self.queue.put(written, timeout=limit_s)
        except queue.Full:
            return False
        return written.wait(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """Let the writer end behind the lines that wait."""
        super().close()
        try:
            self.queue.put_nowait(None)
        except queue.Full:  # nobody reads; the thread ends with the process
            return

    def _put(self, line: str) -> None:
        try:
            self.queue.put_nowait(line)
        except queue.Full:
            self._drop()

    def _drop(self) -> None:
        self._unsaid += 1
        self._on_drop()

    def _say_dropped(self) -> None:
        if not self._unsaid or self.queue.full():
            return
        said, self._unsaid = self._unsaid, 0
        arguments = (pairs(lines=said),)
        text = "log lines were dropped, because stderr was not read fast enough %s"
        self._put(
            self.format(log.makeRecord(log.name, logging.WARNING, "", 0, text, arguments, None))
        )

    def _run(self) -> None:
        """Write what comes; never returns while the handler is open."""
        while True:
            lines: list[str] = []
            entry = self.queue.get()
            if isinstance(entry, str) and self.queue.qsize() < BATCH_LINES:
                time.sleep(GATHER_S)
            while isinstance(entry, str):
                lines.append(entry)
                if len(lines) == BATCH_LINES or self.queue.empty():
                    break
                entry = self.queue.get_nowait()  # this thread alone takes from the queue
            if lines:
                text = "".join(line + "\n" for line in lines)
                self._write(text.encode(self._encoding, "backslashreplace"))
            if isinstance(entry, threading.Event):
                entry.set()
            elif entry is None:
                return


def write_stderr(data: bytes) -> None:
    """Write all of it to stderr, for as long as that takes.

    Past ``sys.stderr``: a thread that waits inside of it keeps its lock, and Python's end with it.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(2, rest) :]
        except BlockingIOError:  # whoever started this process made stderr non-blocking
            select.select((), (2,), ())
        except OSError:  # the reader has gone, or there is no stderr
            return


def configure(
    level: str = "info",
    form: str = "pairs",
    *,
    on_drop: Callable[[], object] = lambda: None,
    write: Callable[[bytes], object] = write_stderr,
) -> None:
    """Send all logs to stderr in one format. For programs; a library user keeps their own.

    level: debug, info, warning or error. form: pairs or json. on_drop: called for every line that
    is dropped because stderr is not read. write: in place of stderr.
    """
    # What the format does not show is not gathered: half of what a line costs.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = QueueHandler(write, on_drop)
    handler.setFormatter(FORMATTERS[form]())
    chosen = logging.getLevelName(level.upper())
    logging.basicConfig(level=max(chosen, logging.INFO), handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(chosen)
    console.setLevel(logging.INFO)
    logging.getLogger(OUTPUT_LOGGER).setLevel(logging.DEBUG)  # written only where it is asked for
    atexit.unregister(flush)
    atexit.register(flush)


def flush(limit_s: float = FLUSH_LIMIT_S) -> bool:
    """Wait until all lines so far are written, at most for the limit. Returns whether they are."""
    handlers = [one for one in logging.getLogger().handlers if isinstance(one, QueueHandler)]
    return all(one.flush_lines(limit_s) for one in handlers)


def trace_crashes() -> None:
    """Leave the stack of every thread on stderr when native code crashes.

    Call again after imports: libraries install handlers of their own, which then run after this one.
    """
    if sys.stderr is not None:
        faulthandler.disable()
        faulthandler.enable()


def dump_on_signal() -> None:
    """Let SIGUSR1 write the Python stack of every thread to stderr; the process goes on."""
    if sys.stderr is not None and hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def pairs(**values: object) -> Pairs:
    """``key=value`` pairs; values with blanks or quotes are quoted: one event stays one line."""
    text = Pairs(" ".join([f"{key}={_plain(value)}" for key, value in values.items()]))
    text.fields = values
    return text


PLAIN = re.compile(r"[^ \"'=]+")


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int):
        return str(value)
    text = str(value)
    return text if text.isprintable() and PLAIN.fullmatch(text) else repr(text)
