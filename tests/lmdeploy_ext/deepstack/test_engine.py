"""What is refused when a model is loaded, and when an engine ends. In a child on the null runtime."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.host_runtime.runner import ChildFailed, run

pytestmark = [pytest.mark.slow, pytest.mark.host]


def _several_engines(checkpoint: str) -> dict[str, Any]:
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import engine as deepstack
    from tests.host_runtime import engines

    lmdeploy_ext.install("require")
    seen: dict[str, Any] = {"before": deepstack.running()}

    def second() -> str:
        try:
            engines.turbomind(checkpoint)
        except lmdeploy_ext.deepstack.DeepStackUnavailable as error:
            return str(error)
        return ""

    first = engines.turbomind(checkpoint)
    seen |= {"running": deepstack.running(), "second": second()}
    asyncio.run(engines.stop(first))
    seen["closed"] = deepstack.running()
    seen["after close"] = second()
    lmdeploy_ext.uninstall()
    from lmdeploy_ext.deepstack.binding import hook

    seen["bound while it runs"] = hook().bound()
    return seen


def test_one_engine_at_a_time(loud: Callable[..., Path]) -> None:
    seen = run(_several_engines, loud())
    assert not seen["before"]
    assert seen["running"]
    assert seen["second"].startswith("another engine with DeepStack runs in this process: close it")
    assert not seen["closed"]
    assert seen["after close"] == ""
    assert seen["bound while it runs"] == 4, "uninstalling leaves a running engine what it needs"


def _spread(_checkpoint: str) -> list[str]:
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import engine

    lmdeploy_ext.install("require")
    vision, text = (
        SimpleNamespace(deepstack_visual_indexes=[0]),
        SimpleNamespace(num_hidden_layers=2),
    )
    errors = []
    for groups in ({"GPUs": 2, "attention_tp": 2}, {"GPUs": 1, "attention_tp": 1, "ep": 2}):
        try:
            engine.start(object(), None, vision=vision, text=text, dtype=None, groups=groups)
        except lmdeploy_ext.deepstack.DeepStackUnavailable as error:
            errors.append(str(error))
    return errors


def test_several_gpus_are_refused() -> None:
    one, other = run(_spread, "", mode="driver")
    assert "works on one GPU; this engine has {'GPUs': 2, 'attention_tp': 2}" in one
    assert "--backend pytorch" in one
    assert "{'ep': 2}" in other


async def _out_of_step(checkpoint: str, case: dict[str, Any]) -> None:
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import features
    from tests.host_runtime import engines
    from tests.host_runtime.answers import ask
    from tests.host_runtime.cases import Case

    lmdeploy_ext.install("require")
    with mock.patch.object(features, "plan", return_value=None):
        engine = engines.turbomind(checkpoint)
        await ask(engine, Case.from_json(case))
    gc.collect()


def test_an_inconsistency_ends_the_process(loud: Callable[..., Path]) -> None:
    from tests.host_runtime.cases import make_case
    from tests.host_runtime.checkpoints import image_token

    folder = loud()
    case = make_case(1, [(4, 4)], [3, 5], image_token(folder))
    with pytest.raises(
        ChildFailed, match=r"ended with -6(.|\n)*DeepStack failed within TurboMind"
    ) as error:
        run(_out_of_step, folder, case.to_json())
    assert "a vision forward begins that was not set up" in str(error.value)
