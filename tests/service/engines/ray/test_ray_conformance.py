"""The conformance suite on replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from service.engine import Engine
from service.engines.ray import RayEngine
from service.wiring import BUNDLED_MODEL
from tests.service.engines.conformance import Answers, LifeCycle, Subject
from tests.service.engines.ray.clusters import fake as fake_engine
from tests.service.engines.ray.clusters import is_idle, on_ray, reference

pytestmark = pytest.mark.usefixtures("cluster")


def fake(*, small: bool = False, **options: Any) -> RayEngine:
    if small:
        options["token_delay_s"] = 0.005
    build = partial(fake_engine, scripted=True, **options)
    return on_ray(build, max_requests=2 if small else None)


def bundled(*, small: bool = False, **options: Any) -> RayEngine:
    limits = {"max_batch": 1, "max_queue": 1} if small else {}
    build = partial(reference, BUNDLED_MODEL, **limits, **options)
    return on_ray(build, max_requests=2 if small else None)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("fake", marks=pytest.mark.slow),
        pytest.param("reference", marks=pytest.mark.long),
    ],
)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "fake":
        yield Subject("ray, fake", fake, is_idle, certain=True)
    else:
        yield Subject("ray, reference", bundled, is_idle)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(subject: Subject) -> AsyncIterator[Engine]:
    engine = subject.build()
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture(params=[50, pytest.param(500, marks=pytest.mark.long)])
def cancels(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.long
class TestLifeCycle(LifeCycle):
    """Every test starts deployments of its own."""


class TestAnswers(Answers):
    pass
