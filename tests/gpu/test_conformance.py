"""The engine conformance suite on a GPU: both backends of LMDeploy, and the reference engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from service.engine import Engine
from service.engines.lmdeploy import LMDeployEngine
from service.engines.reference import ReferenceEngine
from service.wiring import BUNDLED_MODEL
from tests.service.engines.conformance import Answers, LifeCycle, Subject


def lmdeploy(backend: str, *, small: bool = False, **options: Any) -> Engine:
    limits = {"max_batch": 1, "max_queue": 1} if small else {"max_batch": 32}
    return LMDeployEngine(
        BUNDLED_MODEL, backend=backend, context_length=2048, cache_share=0.2, **limits, **options
    )


def lmdeploy_is_idle(engine: Engine) -> bool:
    assert isinstance(engine, LMDeployEngine)
    return engine.active_requests == 0


def reference(*, small: bool = False, **options: Any) -> Engine:
    limits = {"max_batch": 1, "max_queue": 1} if small else {}
    return ReferenceEngine(BUNDLED_MODEL, device="cuda", **limits, **options)


def reference_is_idle(engine: Engine) -> bool:
    assert isinstance(engine, ReferenceEngine)
    return engine.active_requests == 0 and engine.reserved_rows == 0


@pytest.fixture(scope="module", params=["turbomind", "pytorch", "reference"])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "reference":
        return Subject("reference, cuda", reference, reference_is_idle)
    return Subject(request.param, partial(lmdeploy, request.param), lmdeploy_is_idle)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(subject: Subject) -> AsyncIterator[Engine]:
    engine = subject.build()
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
def cancels() -> int:
    return 200


class TestLifeCycle(LifeCycle):
    pass


class TestAnswers(Answers):
    pass
