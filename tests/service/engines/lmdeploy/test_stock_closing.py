"""The end of an engine on the stock TurboMind module, without kernels.

LMDeploy 0.18.0 ends the process ("Resource deadlock avoided") when the last reference to its engine
goes on a thread of the engine, as it does where a program drops the engine while a finished request
is still being reported. The service closes it on a thread of its own, and that is the last reference.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host]
CYCLES = 15


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.service.engines.lmdeploy import stock

    return stock.write(tmp_path_factory.mktemp("stock"))


async def _cycles(checkpoint: str, count: int) -> list[int]:
    """Start, ask, close at once, again and again; references to TurboMind's engine on the way."""
    import sys

    from service.errors import EngineUnavailable
    from tests.service.engines.conformance import answer, random_image, request
    from tests.service.engines.lmdeploy import stock

    references = []
    for number in range(count):
        engine = stock.engine(Path(checkpoint), check_guidance=False)
        await engine.start()
        native: Any = engine._loaded.host.native  # type: ignore[union-attr]
        ones = [request("word", random_image(k), max_tokens=2 + 400 * (k % 2)) for k in range(4)]
        tasks = [asyncio.ensure_future(answer(engine, one)) for one in ones]
        await asyncio.gather(*tasks[::2])
        references.append(sys.getrefcount(native.model_comm) - 1)
        if number % 2:  # others are still under way
            tasks += [asyncio.ensure_future(answer(engine, request("word", max_tokens=1)))]
        await engine.close()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert not isinstance(found, BaseException) or isinstance(found, EngineUnavailable)
        assert native.model_comm is None
    return references


def test_an_engine_is_closed_directly_after_its_last_request(checkpoint: Path) -> None:
    found = run(_cycles, checkpoint, CYCLES, timeout_s=280)
    assert found == [1] * CYCLES, "nobody but TurboMind's Python object holds the engine"


async def _failed_starts(checkpoint: str) -> dict[str, Any]:
    """A start that fails behind the model's load, for two reasons; what is left of it."""
    import threading
    from unittest import mock

    from service.engines.lmdeploy import loading
    from service.errors import EngineUnavailable
    from tests.service.engines.lmdeploy import stock

    closed: list[Any] = []
    errors: list[str] = []
    build = loading.build_host

    def watched(*arguments: Any) -> Any:
        host = build(*arguments)
        closed.append(host.native)
        return host

    def no_prompts(*arguments: Any) -> Any:
        raise RuntimeError("no prompts")

    engine = stock.engine(Path(checkpoint))
    for broken in (no_prompts, loading.Prompts):
        with (
            mock.patch.object(loading, "build_host", watched),
            mock.patch.object(loading, "Prompts", broken),
        ):
            try:
                await engine.start()
            except (EngineUnavailable, RuntimeError) as error:
                errors.append(str(error))

    def threads() -> list[str]:
        names = (thread.name for thread in threading.enumerate())
        return [name for name in names if name.startswith(("front", "grammar"))]

    for _ in range(1000):  # they were told to end, and nobody waits for it
        if not threads():
            break
        await asyncio.sleep(0.01)
    return {
        "errors": errors,
        "open": [native.model_comm is not None for native in closed],
        "threads": threads(),
    }


def test_a_failed_start_leaves_no_threads_and_memory(checkpoint: Path) -> None:
    found = run(_failed_starts, checkpoint)  # without kernels, grammars are not obeyed
    assert found["errors"][0] == "no prompts"
    assert "does not obey grammars" in found["errors"][1]
    assert found["open"] == [False, False]
    assert found["threads"] == []
