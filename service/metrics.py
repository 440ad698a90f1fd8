"""What the server counts, for Prometheus; served over HTTP where ``metrics_port`` is set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from wsgiref.simple_server import WSGIServer

from prometheus_client import Counter, Gauge, Histogram, Info, start_http_server

from service.types import Capabilities

_COMPILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)  # fmt: skip

# Label cache: "analysis" keeps what was found out about grammars, "engine" what it compiled.
grammar_cache_hits = Counter(
    "qwen3vl_grammar_cache_hits", "Grammars found in a cache, or on their way into it.", ["cache"]
)
grammar_cache_misses = Counter(
    "qwen3vl_grammar_cache_misses", "Grammars that had to be worked on.", ["cache"]
)
grammar_cache_evictions = Counter(
    "qwen3vl_grammar_cache_evictions", "Grammars that left a cache to make room.", ["cache"]
)
grammar_compile_seconds = Histogram(
    "qwen3vl_grammar_compile_seconds",
    "Time of one analysis with its trial compilation, or of one compilation in the engine.",
    ["cache"],
    buckets=_COMPILE_BUCKETS,
)
grammar_worker_restarts = Counter(
    "qwen3vl_grammar_worker_restarts",
    "Processes that analyse grammars and were replaced: crashed, timed out, or grown large.",
    ["reason"],
)
log_lines_dropped = Counter(
    "qwen3vl_log_lines_dropped", "Log lines that were dropped because nobody read stderr in time."
)
engine_info = Info("qwen3vl_engine", "The engine that serves.")
deepstack_active = Gauge(
    "qwen3vl_deepstack_active", "1 where features of vision blocks reach the decoder's layers."
)


def describe_engine(capabilities: Capabilities) -> None:
    """Set what is known of the engine once it has started."""
    details = capabilities.details
    mode, by = details.get("deepstack_mode", ""), details.get("deepstack_by", "")
    engine_info.info(
        {
            "engine": capabilities.engine,
            "model": capabilities.model,
            "deepstack_mode": mode,
            "deepstack_by": by,
        }
    )
    deepstack_active.set(details.get("deepstack") == "on")


@contextmanager
def serving(port: int, host: str) -> Iterator[int]:
    """Serve the numbers at ``/metrics`` for the time of the body; yields the port.

    port: 0 lets the system pick. Raises ``OSError`` where it is taken.
    """
    server: WSGIServer
    thread: threading.Thread
    server, thread = start_http_server(port, addr=host)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
