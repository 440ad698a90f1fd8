"""Children: what comes back, what is shown when they fail, and that nothing of them leaks."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.host_runtime.runner import ChildFailed, run

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]


def _look_around(word: str, *, path: str) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_properties(0)
    return {
        "word": word, "path": path, "mode": os.environ["HOST_RUNTIME_MODE"],
        "device": device.name, "memory": device.total_memory, "threads": os.environ["OMP_NUM_THREADS"],
    }  # fmt: skip


async def _coroutine() -> int:
    return 41 + 1


def _raise() -> None:
    print("said before")
    raise KeyError("the reason")


def _sleep() -> None:
    time.sleep(600)


def _import_with_stub_driver() -> dict[str, Any]:
    import torch
    from lmdeploy.turbomind import _tm

    config = _tm.EngineConfig()
    config.max_batch_size = 3
    wanted = ("QwenVitConfig", "AttentionConfig", "GrammarCompiler")
    names = [name for name in wanted if hasattr(_tm, name)]
    return {"names": names, "batch": config.max_batch_size, "cuda": torch.cuda.is_available()}


def test_a_child_gets_arguments_and_returns_a_result_without_side_effects(tmp_path: Path) -> None:
    before, modules = dict(os.environ), set(sys.modules)
    answer = run(_look_around, "née", path=tmp_path, memory_mib=300)
    assert answer == {
        "word": "née", "path": str(tmp_path), "mode": "null",
        "device": "host runtime", "memory": 300 << 20, "threads": "1",
    }  # fmt: skip
    assert dict(os.environ) == before
    assert not any(
        name.startswith(("lmdeploy", "tests.host_runtime")) for name in sys.modules.keys() - modules
    )


def _leave_a_mark() -> list[Any]:
    found = [hasattr(sys, "mark"), "lmdeploy.turbomind" in sys.modules]
    sys.mark = True  # type: ignore[attr-defined]
    return [*found, os.environ["HOST_RUNTIME_MODE"], os.environ.get("HOST_RUNTIME_DELAY_US")]


def test_calls_in_forks_are_isolated() -> None:
    with ThreadPoolExecutor(2) as both:
        slow = both.submit(run, _leave_a_mark, extra={"HOST_RUNTIME_DELAY_US": "5"})
        plain = both.submit(run, _leave_a_mark, mode="numbers")
    again = run(_leave_a_mark)
    assert slow.result() == [False, True, "null", "5"]
    assert plain.result() == [False, True, "numbers", None]
    assert again == [False, True, "null", None]


def test_a_call_with_variables_of_its_own_gets_a_fresh_process() -> None:
    found = run(_leave_a_mark, extra={"LMDEPLOY_QWEN3VL": "0"})
    assert found == [False, False, "null", None]


def test_async_functions_run_to_their_end() -> None:
    assert run(_coroutine) == 42


def test_a_failure_shows_the_traceback_and_what_was_printed() -> None:
    with pytest.raises(ChildFailed, match=r"(?s)said before.*KeyError: 'the reason'"):
        run(_raise)


def test_a_child_that_does_not_end_is_ended_and_shows_where_it_was() -> None:
    started = time.monotonic()
    with pytest.raises(ChildFailed, match=r"(?s)no end after 5 s.*in _sleep"):
        run(_sleep, timeout_s=5)
    assert time.monotonic() - started < 60


def test_functions_that_a_child_cannot_find_are_refused() -> None:
    def inner() -> None: ...

    with pytest.raises(ValueError, match="not at the top level"):
        run(inner)


def test_the_stub_driver_is_enough_for_the_import_and_for_configurations() -> None:
    answer = run(_import_with_stub_driver, mode="driver")
    assert answer == {
        "names": ["QwenVitConfig", "AttentionConfig", "GrammarCompiler"], "batch": 3, "cuda": False
    }  # fmt: skip
