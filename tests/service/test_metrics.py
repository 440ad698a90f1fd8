"""Every metric and label of the real ``/metrics``, and the counts after a known mix of calls."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from service import metrics
from service.engines.fake import FakeEngine
from service.observation import CallRecord
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.admin_pages import Series, page, samples, series
from tests.service.harness import (
    ROOT,
    Running,
    failure,
    image_bytes,
    inline,
    run_request,
    running,
    until,
)

METRICS = {
    "authentication_failures_total": {"reason"},
    "backend_in_flight": {"backend"},
    "backend_requests_total": {"backend", "outcome"},
    "backend_seconds": {"backend"},
    "backend_up": {"backend"},
    "build_info": {"version"},
    "call_seconds": {"transport", "method"},
    "caller_calls_total": {"caller", "code"},
    "caller_tokens_total": {"caller"},
    "calls_in_flight": set(),
    "calls_total": {"transport", "method", "code", "reason"},
    "deepstack_active": set(),
    "engine_info": {"engine", "model", "deepstack_mode", "deepstack_by"},
    "grammar_cache_evictions_total": {"cache"},
    "grammar_cache_hits_total": {"cache"},
    "grammar_cache_misses_total": {"cache"},
    "grammar_compile_seconds": {"cache"},
    "grammar_worker_restarts_total": {"reason"},
    "image_bytes_total": set(),
    "image_memory_bytes": {"budget"},
    "image_memory_limit_bytes": {"budget"},
    "image_pixels_total": set(),
    "image_tokens_total": set(),
    "images_total": set(),
    "kv_cache_utilization_ratio": {"model"},
    "log_lines_dropped_total": set(),
    "output_retries_total": set(),
    "output_tokens_total": set(),
    "phase": {"qwen3vl_phase"},
    "prompt_tokens_total": set(),
    "queue_seconds": set(),
    "replicas": set(),
    "replicas_lost_total": {"outcome"},
    "requests_queued": set(),
    "requests_queued_limit": set(),
    "requests_running": set(),
    "requests_running_limit": set(),
    "time_per_output_token_seconds": set(),
    "time_to_first_token_seconds": set(),
}
"""Name without ``qwen3vl_`` -> labels; of a histogram without ``le`` and the suffixes."""
HISTOGRAM_SUFFIXES = ("_bucket", "_count", "_sum")
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
UNIQUE = '{"type": "array", "items": {"type": "integer"}, "uniqueItems": true, "maxItems": 40}'


@asynccontextmanager
async def with_keys(folder: Path, engine: FakeEngine, **settings: Any) -> AsyncIterator[Running]:
    keys = folder / "keys"
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    keys.write_text("".join(f"{name}:{digest}\n" for name, digest in digests.items()))
    engine.kv_cache_used = 0.5
    async with running(engine, admin_port=0, api_keys_file=keys, **settings) as started:
        yield started


def of(caller: str) -> dict[str, Any]:
    return {"metadata": (("x-api-key", KEYS[caller]),)}


async def added(port: int | None, before: dict[Series, float]) -> dict[Series, float]:
    """What has grown since then, and by how much; histograms by their counts alone."""
    return {
        key: value - before.get(key, 0.0)
        for key, value in (await samples(port)).items()
        if value != before.get(key, 0.0)
        and key[0].endswith(("_total", "_count"))
        and not key[0].startswith("qwen3vl_grammar_")
    }


async def scripted_mix(started: Running) -> None:
    """Calls with every kind of end."""
    stub, engine = started.stub, started.engine
    await stub.RunTask(run_request(images=[image_bytes(64, 48)]), **of("alice"))
    await stub.RunTask(run_request(), **of("bob"))
    async for _ in stub.StreamTask(pb.StreamTaskRequest(task=inline()), **of("alice")):
        continue
    await stub.ListTasks(pb.ListTasksRequest(), **of("bob"))
    await failure(stub.RunTask(pb.RunTaskRequest(task=pb.Task(name="none")), **of("alice")))
    await failure(stub.RunTask(run_request(temperature=9.0), **of("alice")))
    await failure(stub.RunTask(run_request(images=[b"GIF89a"]), **of("alice")))
    await failure(stub.RunTask(run_request(max_tokens=1), **of("bob")))
    await failure(stub.RunTask(run_request(inline(json_schema=UNIQUE), temperature=1), **of("bob")))
    await failure(stub.RunTask(run_request()))
    await failure(stub.RunTask(run_request(), metadata=(("x-api-key", "wrong"),)))
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError):
            await started.raw("NoSuchMethod", b"")
    engine.hang_after = 0
    hanging = asyncio.ensure_future(stub.RunTask(run_request(), **of("alice")))
    await until(lambda: engine.active_requests == 1)
    await failure(stub.RunTask(run_request(), **of("bob")))  # there is no queue
    hanging.cancel()
    await until(lambda: engine.active_requests == 0)
    engine.hang_after = None


async def test_every_count_after_a_known_mix_of_calls(tmp_path: Path) -> None:
    engine = FakeEngine("[1, 1]")
    async with with_keys(tmp_path, engine, max_concurrent=1, max_queue=0, output_retries=1) as one:
        port = one.server.admin_port
        before = await samples(port)
        records: list[CallRecord] = []
        one.server.runtime.observation.listeners.append(records.append)
        await scripted_mix(one)
        await until(lambda: len(records) == 13)
        found = await added(port, before)
    expected: dict[Series, float] = {}

    def call(code: str, reason: str = "-", method: str = "RunTask", times: int = 1) -> None:
        labels = {"transport": "grpc", "method": method, "code": code, "reason": reason}
        expected[series("calls_total", **labels)] = times

    call("OK", times=2)
    call("OK", method="StreamTask")
    call("OK", method="ListTasks")
    call("NOT_FOUND", "UNKNOWN_TASK")
    call("INVALID_ARGUMENT", "SAMPLING_OPTION_INVALID")
    call("INVALID_ARGUMENT", "IMAGE_FORMAT_UNSUPPORTED")
    call("OUT_OF_RANGE", "OUTPUT_TRUNCATED")
    call("INTERNAL", "OUTPUT_INVALID")
    call("UNAUTHENTICATED", "API_KEY_MISSING")
    call("UNAUTHENTICATED", "API_KEY_INVALID")
    call("UNIMPLEMENTED", method="other", times=2)
    call("RESOURCE_EXHAUSTED", "OVERLOADED")
    call("CANCELLED")
    for method, times in (("RunTask", 11), ("StreamTask", 1), ("ListTasks", 1)):
        expected[series("call_seconds_count", transport="grpc", method=method)] = times
    for caller, code, times in (
        ("alice", "OK", 2),
        ("alice", "NOT_FOUND", 1),
        ("alice", "INVALID_ARGUMENT", 2),
        ("alice", "CANCELLED", 1),
        ("bob", "OK", 2),
        ("bob", "OUT_OF_RANGE", 1),
        ("bob", "INTERNAL", 1),
        ("bob", "RESOURCE_EXHAUSTED", 1),
        ("-", "UNAUTHENTICATED", 2),
    ):
        expected[series("caller_calls_total", caller=caller, code=code)] = times
    for reason in ("API_KEY_MISSING", "API_KEY_INVALID"):
        expected[series("authentication_failures_total", reason=reason)] = 1
    done = Counter(dict.fromkeys(("alice", "bob"), 0))
    for record in records:
        if record.attempts:
            done[record.caller] += record.usage.prompt_tokens + record.usage.output_tokens
    for caller, tokens in done.items():
        expected[series("caller_tokens_total", caller=caller)] = tokens
    usages = [record.usage for record in records]
    expected |= {
        series("prompt_tokens_total"): sum(usage.prompt_tokens for usage in usages),
        series("image_tokens_total"): sum(usage.image_tokens for usage in usages),
        series("output_tokens_total"): sum(usage.output_tokens for usage in usages),
        series("images_total"): 1,
        series("image_pixels_total"): 64 * 48,
        series("image_bytes_total"): len(image_bytes(64, 48)),
        series("output_retries_total"): 1,
        series("queue_seconds_count"): 6,
        series("time_to_first_token_seconds_count"): 5,
        # Not of the invalid answer, whose two attempts ended early.
        series("time_per_output_token_seconds_count"): 3,
    }
    assert found == expected


async def test_every_metric_and_label(tmp_path: Path) -> None:
    engine = FakeEngine("[1, 1]")
    async with with_keys(tmp_path, engine, max_concurrent=1, max_queue=0) as started:
        await scripted_mix(started)
        found = await samples(started.server.admin_port)
    known: dict[str, set[str]] = {}
    for name, labels in found:
        short = name.removeprefix("qwen3vl_")
        for suffix in HISTOGRAM_SUFFIXES:
            if short.removesuffix(suffix) in METRICS:
                short = short.removesuffix(suffix)
        known.setdefault(short, set()).update(label for label, _ in labels if label != "le")
    # Without a pool of workers grammars are not counted: test_grammar_pool.py has these counts.
    # Without remote servers there are no back ends: engines/remote/test_several.py has them.
    # Without Ray no replica is lost: engines/ray/test_sharing.py has it.
    of_others = {name for name in METRICS if name.startswith(("grammar_", "backend_", "replicas_"))}
    assert known.keys() | of_others == METRICS.keys()
    assert known == {name: METRICS[name] for name in known}


def test_the_page_lists_every_metric() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    table = text[text.index("## Metrics") :]
    missing = [name for name in METRICS if f"`qwen3vl_{name}`" not in table]
    assert missing == []


@pytest.mark.slow
async def test_callers_cannot_make_series(tmp_path: Path) -> None:
    async with with_keys(tmp_path, FakeEngine()) as started:
        port = started.server.admin_port

        async def odd(number: int) -> None:
            name = f"odd-{number}"
            with pytest.raises(grpc.aio.AioRpcError):
                await started.raw(name, b"")
            await failure(started.stub.RunTask(run_request(), metadata=(("x-api-key", name),)))
            named = pb.RunTaskRequest(task=pb.Task(name=name))
            request_id = (("x-request-id", name), *of("alice")["metadata"])
            await failure(started.stub.RunTask(named, metadata=request_id))

        await odd(0)
        before = set(await samples(port))
        for number in range(1, 200):
            await odd(number)
        assert set(await samples(port)) == before
        assert "odd-" not in (await page(port, "/metrics")).text


def test_few_removed_names_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "KEPT_REMOVED", 2)
    names = metrics._Names(2)
    assert [names(name) for name in "abc"] == ["a", "b", "other"]
    names.remove("abz")
    assert [names(name) for name in "bac"] == ["other", "a", "c"], "a is long gone"
    names.remove("c")
    names.add("b")
    assert [names(name) for name in "bc"] == ["b", "other"]


def test_names_beyond_the_limit_share_one_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_caller", metrics._Names(metrics.MAX_CALLERS))
    before = {key for key in collected() if key[0] == "qwen3vl_caller_calls_total"}
    earlier = reasons_counted()
    for number in range(metrics.MAX_CALLERS + 200):
        record = CallRecord("line", "ask", caller=f"crowd-{number}", code="OK")
        record.reason = "OF_A_PLUG_IN"
        metrics.count(record)
    after = {key for key in collected() if key[0] == "qwen3vl_caller_calls_total"}
    assert len(after) <= metrics.MAX_CALLERS + 1 + len(before)
    assert ("caller", "other") in {label for _, labels in after for label in labels}
    assert reasons_counted() - earlier <= {"other"}
    assert "other" in reasons_counted()


def reasons_counted() -> set[str]:
    return {dict(labels)["reason"] for name, labels in collected() if name == "qwen3vl_calls_total"}


def collected() -> set[Series]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in metrics.REGISTRY.collect()
        for sample in family.samples
    }
