"""Ray on this machine for tests, and engines on it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from service.engine import Engine
from service.engines.fake import FakeEngine
from service.engines.ray import RayEngine
from service.engines.ray.cluster import ClusterOptions
from service.engines.ray.plan import Plan, Scale

CLUSTER = ClusterOptions(None, store_bytes=100 * 1024 * 1024, cpus=16)
START_S = 240.0
_numbers = itertools.count()


def fake(*, scripted: bool = False, **options: Any) -> Engine:
    """Runs in a replica."""
    if not scripted:
        return FakeEngine(**options)
    from tests.service.engines.conformance import script  # imports torch

    return FakeEngine(script, **options)


def reference(folder: Path, **options: Any) -> Engine:
    """Runs in a replica."""
    from service.engines.reference import ReferenceEngine

    return ReferenceEngine(folder, threads=1, **options)


def on_ray(build: Callable[[], Engine], *, name: str | None = None, linger_s: float = 0.0,
           settings: dict[str, str] | None = None, max_requests: int | None = None,
           **scale: Any) -> RayEngine:  # fmt: skip
    """An engine on replicas of another one."""
    name = name or f"test-{os.getpid()}-{next(_numbers)}"
    plan = Plan(name, build, Scale(**scale), settings or {}, linger_s)
    return RayEngine(plan, CLUSTER, start_s=START_S, max_requests=max_requests)


def asked(engine: Engine, method: str) -> Any:
    """What a replica answers. Blocks: the routers of Ray Serve have a thread of their own."""
    assert isinstance(engine, RayEngine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: getattr(engine._handle, method).remote().result()).result()


def busy(engine: Engine) -> int:
    """Requests that any replica has."""
    assert isinstance(engine, RayEngine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: sum(engine._handle.broadcast("active").results())).result()


def is_idle(engine: Engine) -> bool:
    """Whether neither the engine nor its replica, if it still runs, has a request."""
    assert isinstance(engine, RayEngine)
    if engine.active_requests or engine._closed.is_set():
        return engine.active_requests == 0
    return busy(engine) == 0
