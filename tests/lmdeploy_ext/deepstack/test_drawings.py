"""The bundled model through the gRPC server on stock TurboMind: right answers, with DeepStack only."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from service.wiring import BUNDLED_MODEL
from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host]

COUNT = 12


def _score(model: str, mode: str, count: int) -> dict[str, Any]:
    """Right answers of the service by what was asked; mode "reference" is the reference engine."""
    from examples.drawings import evaluate
    from service.engines.lmdeploy import LMDeployEngine

    def engine(folder: Path) -> LMDeployEngine:
        return LMDeployEngine(
            folder, backend="turbomind", deepstack=mode, cache_share=0.1, max_batch=8,
            context_length=2048, prefill_chunk=256,
        )  # fmt: skip

    async def ask() -> dict[str, Any]:
        chosen = evaluate.ReferenceEngine if mode == "reference" else engine
        with mock.patch.object(evaluate, "ReferenceEngine", chosen):
            async with evaluate.serving(Path(model)) as stub:
                score = await evaluate.score_analyses(stub, count)
        return {name: score.right[name] for name in score.asked}

    return asyncio.run(ask())


def _right(mode: str) -> dict[str, Any]:
    found: dict[str, Any] = run(_score, BUNDLED_MODEL, mode, COUNT, mode="numbers", timeout_s=280)
    return found


def test_held_out_drawings_are_read_as_by_the_reference_engine() -> None:
    right = _right("require")
    assert right == _score(str(BUNDLED_MODEL), "reference", COUNT)
    assert right["whole object list"] >= COUNT - 1, right
    assert right["scene"] == COUNT, right


def test_without_deepstack_drawings_are_read_worse() -> None:
    assert _right("off")["whole object list"] <= COUNT // 4
