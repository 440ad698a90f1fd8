"""The Prometheus metrics of the server; ``service.admin`` serves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from prometheus_client import (
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)

from service import __version__
from service.error_table import REASONS
from service.lifecycle import Phase
from service.observation import CallRecord
from service.types import Capabilities

_COMPILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)  # fmt: skip

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, with the time of its first count

# Label cache: "analysis" has results of analyses, "engine" has compiled grammars.
grammar_cache_hits = Counter(
    "qwen3vl_grammar_cache_hits",
    "Grammars that were in a cache, or for which a cache entry was being computed.",
    ["cache"],
)
grammar_cache_misses = Counter(
    "qwen3vl_grammar_cache_misses", "Grammars that were not in a cache.", ["cache"]
)
grammar_cache_evictions = Counter(
    "qwen3vl_grammar_cache_evictions", "Grammars that were evicted from a cache.", ["cache"]
)
grammar_compile_seconds = Histogram(
    "qwen3vl_grammar_compile_seconds",
    "Time of one analysis with its trial compilation, or of one compilation in the engine.",
    ["cache"],
    buckets=_COMPILE_BUCKETS,
)
grammar_worker_restarts = Counter(
    "qwen3vl_grammar_worker_restarts",
    "Processes that analyse grammars and were replaced: by crash, timeout, grown (large), or outside, "
    "where something else ended or stopped them.",
    ["reason"],
)
log_lines_dropped = Counter(
    "qwen3vl_log_lines_dropped", "Log lines that were dropped because nobody read stderr in time."
)
engine_info = Info("qwen3vl_engine", "The engine that serves.")
deepstack_active = Gauge(
    "qwen3vl_deepstack_active", "1 where features of vision blocks reach the decoder's layers."
)


# Calls. Every label is a name of the server's own: text of callers never becomes one.

_CALL_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)  # fmt: skip
OTHER = "other"
MAX_METHODS, MAX_CALLERS = 64, 256
"""Names that get series of their own; all further ones share ``other``."""
KEPT_REMOVED = 1024
"""Removed callers that are remembered: calls of theirs may still be in flight."""

calls = Counter(
    "qwen3vl_calls",
    "Calls that have ended. code: gRPC status, also of other transports. reason: of docs/errors.md.",
    ["transport", "method", "code", "reason"],
)
caller_calls = Counter(
    "qwen3vl_caller_calls", "Calls by the name of the caller's key.", ["caller", "code"]
)
caller_tokens = Counter(
    "qwen3vl_caller_tokens", "Tokens of prompts and answers by the name of the key.", ["caller"]
)
authentication_failures = Counter(
    "qwen3vl_authentication_failures", "Calls without a key that the server knows.", ["reason"]
)
call_seconds = Histogram(
    "qwen3vl_call_seconds",
    "Time of a call from its arrival to its answer or error.",
    ["transport", "method"],
    buckets=_CALL_BUCKETS,
)
first_token_seconds = Histogram(
    "qwen3vl_time_to_first_token_seconds",
    "Time from the arrival of a call to the first token of its answer.",
    buckets=_CALL_BUCKETS,
)
output_token_seconds = Histogram(
    "qwen3vl_time_per_output_token_seconds",
    "Mean time of the tokens of an answer behind its first token.",
    buckets=_TOKEN_BUCKETS,
)
queue_seconds = Histogram(
    "qwen3vl_queue_seconds",
    "Time that a call waited for memory, for a slot and in the engine's queue.",
    buckets=_CALL_BUCKETS,
)
prompt_tokens = Counter("qwen3vl_prompt_tokens", "Tokens of prompts, with those of images.")
image_tokens = Counter("qwen3vl_image_tokens", "Tokens of images in prompts.")
output_tokens = Counter("qwen3vl_output_tokens", "Tokens of answers, of failed attempts too.")
images = Counter("qwen3vl_images", "Images of calls whose headers were accepted.")
image_pixels = Counter("qwen3vl_image_pixels", "Pixels of these images as they were sent.")
image_bytes = Counter("qwen3vl_image_bytes", "Bytes of these images as they were sent.")
output_retries = Counter(
    "qwen3vl_output_retries", "Further attempts at answers that did not fit their schema."
)

# Servers behind engine=remote, by the names of the operator's settings.
backend_requests = Counter(
    "qwen3vl_backend_requests",
    "Requests to a model server that have ended. outcome: ok, cancelled, or a reason of docs/errors.md.",
    ["backend", "outcome"],
)
backend_seconds = Histogram(
    "qwen3vl_backend_seconds",
    "Time of a request to a model server, from its beginning to its answer or error.",
    ["backend"],
    buckets=_CALL_BUCKETS,
)
backend_in_flight = Gauge(
    "qwen3vl_backend_in_flight", "Requests that a model server works on.", ["backend"]
)
backend_up = Gauge(
    "qwen3vl_backend_up", "1 where the last check or request reached the model server.", ["backend"]
)

replicas = Gauge("qwen3vl_replicas", "Replicas of the Ray engine that take requests.")
replicas_lost = Counter(
    "qwen3vl_replicas_lost",
    "Requests whose replica was lost. outcome: again, on another replica, or error, because text was "
    "sent or no attempt was left.",
    ["outcome"],
)


class _Names:
    """The first ``limit`` names; ``other`` stands for the rest, and for names that were removed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()
        self._removed: dict[str, None] = {}

    def __call__(self, name: str) -> str:
        if name in self._known:
            return name
        if name in self._removed or len(self._known) >= self._limit:
            return OTHER
        self._known.add(name)
        return name

    def add(self, names: Iterable[str]) -> None:
        """Names that may have series again."""
        for name in names:
            self._removed.pop(name, None)

    def remove(self, names: Iterable[str]) -> None:
        """Names that have no series any more, and whose room others may take."""
        for name in names:
            self._known.discard(name)
            self._removed[name] = None
        for oldest in list(self._removed)[:-KEPT_REMOVED]:
            del self._removed[oldest]


_method, _caller = _Names(MAX_METHODS), _Names(MAX_CALLERS)


@lru_cache(maxsize=4096)
def _calls_of(transport: str, method: str, code: str, reason: str) -> Counter:
    known = reason if reason in REASONS or reason in ("-", "NOT_READ") else OTHER
    return calls.labels(transport, _method(method), code, known)


@lru_cache(maxsize=1024)
def _seconds_of(transport: str, method: str) -> Histogram:
    return call_seconds.labels(transport, _method(method))


@lru_cache(maxsize=1024)
def _caller_calls_of(caller: str, code: str) -> Counter:
    return caller_calls.labels(_caller(caller), code)


@lru_cache(maxsize=1024)
def _caller_tokens_of(caller: str) -> Counter:
    return caller_tokens.labels(_caller(caller))


def count(record: CallRecord) -> None:
    """Count a call that has ended."""
    _calls_of(record.transport, record.method, record.code, record.reason).inc()
    _seconds_of(record.transport, record.method).observe(record.seconds)
    _caller_calls_of(record.caller, record.code).inc()
    if record.code == "UNAUTHENTICATED":
        authentication_failures.labels(record.reason).inc()
    if record.admitted:
        queue_seconds.observe(record.queued_s)
    if record.images:
        images.inc(record.images)
        image_pixels.inc(record.pixels)
        image_bytes.inc(record.image_bytes)
    if record.first_token_s is not None:
        first_token_seconds.observe(record.first_token_s)
    usage = record.usage
    if record.attempts:
        prompt_tokens.inc(usage.prompt_tokens)
        output_tokens.inc(usage.output_tokens)
        if usage.image_tokens:
            image_tokens.inc(usage.image_tokens)
        if record.attempts > 1:
            output_retries.inc(record.attempts - 1)
        _caller_tokens_of(record.caller).inc(usage.prompt_tokens + usage.output_tokens)
    if record.token_s is not None:
        output_token_seconds.observe(record.token_s)


def change_callers(added: Iterable[str], removed: Iterable[str]) -> None:
    """Follow a change of the callers that a server knows: the series of removed ones go away.

    Calls of theirs that end later count for the caller ``other``. Must run where calls are counted,
    on the event loop.
    """
    _caller.add(added)
    _caller.remove(removed)
    _caller_calls_of.cache_clear()
    _caller_tokens_of.cache_clear()
    for name in removed:
        for family in (caller_calls, caller_tokens):
            family.remove_by_labels({"caller": name})


def count_backend_request(backend: str, outcome: str, seconds: float) -> None:
    """Count a request to a model server. backend: a name of the operator's settings."""
    known = outcome if outcome in REASONS or outcome in ("ok", "cancelled") else OTHER
    backend_requests.labels(backend, known).inc()
    backend_seconds.labels(backend).observe(seconds)


def count_unknown_method(transport: str) -> None:
    """Count a call to a method that the front end does not have."""
    _calls_of(transport, OTHER, "UNIMPLEMENTED", "-").inc()


def describe_engine(capabilities: Capabilities) -> None:
    """Set the metrics that describe the engine, after its start."""
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


@dataclass(frozen=True, slots=True)
class ServerState:
    """The state of a server at one moment.

    in_flight: calls that were accepted and have not ended. running: requests that have a slot and are
    in the engine. queued: requests that wait, for memory, for a slot or in the engine's queue. memory:
    name of a budget -> bytes in use, and the limit. kv_cache: model -> part of the key-value cache in
    use, 0 to 1; without engines that do not tell.
    """

    phase: Phase
    in_flight: int
    running: int
    running_limit: int
    queued: int
    queued_limit: int
    memory: Mapping[str, tuple[int, int]]
    kv_cache: Mapping[str, float]


class _Page:
    """The counters of the process, and one server at one moment."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        yield from REGISTRY.collect()
        state = self._state
        yield InfoMetricFamily("qwen3vl_build", "Version of the server.", {"version": __version__})
        yield StateSetMetricFamily(
            "qwen3vl_phase",
            "1 for what the server is doing, 0 for the rest.",
            {one.value: one is state.phase for one in Phase},
        )
        for name, text, value in (
            ("calls_in_flight", "Calls that were accepted and have not ended.", state.in_flight),
            ("requests_running", "Requests that have a slot and are in the engine.", state.running),
            ("requests_running_limit", "Most requests that have a slot.", state.running_limit),
            (
                "requests_queued",
                "Requests that wait for memory, for a slot or in the engine's queue.",
                state.queued,
            ),
            ("requests_queued_limit", "Most requests that wait for a slot.", state.queued_limit),
        ):
            yield GaugeMetricFamily(f"qwen3vl_{name}", text, value)
        used = GaugeMetricFamily(
            "qwen3vl_image_memory_bytes", "Bytes of a budget in use.", labels=["budget"]
        )
        limit = GaugeMetricFamily(
            "qwen3vl_image_memory_limit_bytes", "Bytes of a budget.", labels=["budget"]
        )
        for name, (held, most) in state.memory.items():
            used.add_metric([name], held)
            limit.add_metric([name], most)
        cache = GaugeMetricFamily(
            "qwen3vl_kv_cache_utilization_ratio",
            "Part of the key-value cache in use, 0 to 1; only of engines that tell.",
            labels=["model"],
        )
        for model, part in state.kv_cache.items():
            cache.add_metric([model], part)
        yield from (used, limit, cache)


def page(state: ServerState, accepted: str) -> tuple[bytes, str]:
    """The metrics as text, and its content type.

    accepted: the header ``accept`` of the request, which may ask for OpenMetrics.
    """
    encode, content_type = choose_encoder(accepted)
    return encode(_Page(state)), content_type
