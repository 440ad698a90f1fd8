"""The LMDeploy engine on a GPU, held to the reference engine on the same GPU.

Run with ``make test-gpu``. 16-bit kernels of two kinds round differently, so a greedy token may
fall differently where two scores nearly tie, and what follows is then another text: most answers
have to be identical, and the rest at least in their beginning.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_kit import steps
from service.engine import Engine
from service.engines.lmdeploy import LMDeployEngine
from service.engines.reference import ReferenceEngine
from service.types import FinishReason, GenerateRequest
from service.wiring import BUNDLED_MODEL
from tests.service.engines.conformance import (
    GRAMMARS,
    answer,
    fits,
    random_image,
    request,
)

ROOT = Path(__file__).parents[2]
SAME = 0.85
"""Least share of answers that are identical."""
BEGINNING = 4
"""Characters that every answer has in common with the reference engine's."""


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Any]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def turbomind(folder: Path, **options: Any) -> LMDeployEngine:
    """A small share of the memory, so that the reference engine has room beside it."""
    chosen = {"backend": "turbomind", "context_length": 4096, "cache_share": 0.3, **options}
    return LMDeployEngine(folder, **chosen)


def reference(folder: Path, **options: Any) -> ReferenceEngine:
    return ReferenceEngine(folder, device="cuda", dtype="bfloat16", context_length=4096, **options)


async def texts(engine: Engine, requests: Sequence[GenerateRequest]) -> list[str]:
    return [(await answer(engine, one))[0] for one in requests]


def agree(found: Sequence[str], expected: Sequence[str]) -> None:
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a != b]
    assert same >= SAME * len(expected), f"{same} of {len(expected)}: {pairs[:3]}"
    assert all(a[:BEGINNING] == b[:BEGINNING] for a, b in pairs), pairs


@pytest.fixture(params=["bundled", "2B shape"])
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "bundled":
        return BUNDLED_MODEL
    found: Path = request.getfixturevalue("two_billion")
    return found


TEXT = [request(f"{'word ' * (1 + 7 * n)} number {n}?", max_tokens=24) for n in range(20)]
IMAGES = [
    request("What?", *(random_image(9 * n + k, 48 + 37 * n, 90 + 41 * k) for k in range(1 + n % 3)),
            max_tokens=24) for n in range(20)
]  # fmt: skip
"""One to three images each, of odd sizes."""


async def test_greedy_text_is_that_of_the_reference_engine(folder: Path) -> None:
    async with started(turbomind(folder)) as engine, started(reference(folder)) as other:
        agree(await texts(engine, TEXT), await texts(other, TEXT))


@pytest.mark.parametrize("deepstack", ["require", "off"])
def test_greedy_answers_about_images_are_those_of_the_reference_engine(
    folder: Path, deepstack: str
) -> None:
    """DeepStack is chosen once in a process: each way has one of its own."""
    code = f"""if True:
        import asyncio
        from pathlib import Path
        from tests.gpu import test_turbomind as t
        async def main():
            folder = Path({str(folder)!r})
            async with t.started(t.turbomind(folder, deepstack={deepstack!r})) as engine:
                found = await t.texts(engine, t.IMAGES)
            async with t.started(t.reference(folder, deepstack={deepstack == "require"})) as other:
                expected = await t.texts(other, t.IMAGES)
            async with t.started(t.reference(folder, deepstack={deepstack != "require"})) as wrong:
                assert await t.texts(wrong, t.IMAGES) != expected, "DeepStack must matter"
            t.agree(found, expected)
        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


async def test_prompts_longer_than_a_prefill_chunk(folder: Path, worker: Any) -> None:
    async with started(turbomind(folder, prefill_chunk=256)) as engine:
        await steps.check_chunks(worker, engine, 6)
    long = [
        request(
            "word " * 700, random_image(n, 224, 224), random_image(n + 1, 160, 96), max_tokens=16
        )
        for n in range(6)
    ]
    async with started(turbomind(folder, prefill_chunk=256)) as engine:
        found = await texts(engine, long)
    async with started(reference(folder)) as other:
        agree(found, await texts(other, long))


async def test_64_mixed_requests_at_once_are_answered_as_alone(folder: Path, worker: Any) -> None:
    async with started(turbomind(folder)) as engine:
        await steps.check_mixed(worker, engine, 64)


async def test_an_equal_beginning_comes_from_the_prefix_cache(folder: Path, worker: Any) -> None:
    async with started(turbomind(folder)) as engine:
        await steps.check_prefix_cache(worker, engine, "word " * 400)


def test_without_vision_the_kv_cache_gets_the_memory_of_the_tower(two_billion: Path) -> None:
    used = {vision: _memory(two_billion, vision) for vision in (True, False)}
    tower = sum(
        entry["bytes"] for name, entry in _tensors(two_billion).items() if ".visual." in name
    )
    assert used[True] - used[False] > 0.5 * tower


def _memory(folder: Path, vision: bool) -> int:
    """Bytes of the GPU that a started engine with a tiny cache takes, in a process of its own."""
    code = f"""if True:
        import asyncio, torch
        from service.engines.lmdeploy import LMDeployEngine
        async def main():
            free = torch.cuda.mem_get_info()[0]
            engine = LMDeployEngine({str(folder)!r}, backend="turbomind", vision={vision},
                                    context_length=2048, max_batch=4, cache_share=0.02)
            await engine.start()
            print("used", free - torch.cuda.mem_get_info()[0])
            await engine.close()
        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout.split("used ")[1].split()[0])


def _tensors(folder: Path) -> dict[str, dict[str, int]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = {"bytes": end - begin}
    return found


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
async def test_constrained_answers_always_fit(folder: Path, backend: str) -> None:
    async with started(turbomind(folder, backend=backend)) as engine:
        ones = [
            request("Any.", random_image(n), constraint=constraint, max_tokens=256,
                    temperature=0.0 if n == 0 else 1.0, seed=n)
            for constraint in GRAMMARS for n in range(8)
        ]  # fmt: skip
        for one, (text, reason, _) in zip(
            ones, await asyncio.gather(*(answer(engine, one) for one in ones)), strict=True
        ):
            assert reason is FinishReason.STOP
            assert one.grammar is not None
            # Either is what the service guarantees; half a character is OUTPUT_INVALID there.
            assert "\ufffd" in text or fits(one.grammar, text), text


async def test_200_cancellations_leave_nothing_running(folder: Path, worker: Any) -> None:
    async with started(turbomind(folder)) as engine:
        await steps.check_cancellations(worker, engine, 200, 20)
