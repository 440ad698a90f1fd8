"""The LMDeploy engine on the stock TurboMind module, whose kernels compute on the host.

Scheduling, prefix cache, sampling, guided decoding and cancellation are the wheel's own; see
tests/host_runtime. Each test starts a process that has the host runtime.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.host_runtime.runner import ROOT, environment, run

pytestmark = [pytest.mark.slow, pytest.mark.host]
CANCEL_LIMIT_S = 1.0
"""Much less than the rest of the answer takes, and enough for a busy machine."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.service.engines.lmdeploy import stock

    return stock.write(tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize(
    ("subject", "capability"),
    [("stock", "90"), pytest.param("qwen3", "80", marks=pytest.mark.long)],
    ids=["Qwen3-VL", "Qwen3.5"],
)
def test_the_conformance_suite_passes_on_the_stock_engine(subject: str, capability: str) -> None:
    suite = "tests/service/engines/test_conformance.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", suite]
    variables = environment("numbers", extra={"HOST_RUNTIME_CAPABILITY": capability})
    done = subprocess.run(
        [*command, "-k", f"{subject} and not 500"], env=variables, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    passed = int(done.stdout.rpartition(" passed")[0].split()[-1])
    assert passed >= 40, done.stdout[-2000:]


@asynccontextmanager
async def _started(checkpoint: str, **options: Any) -> AsyncIterator[Any]:
    from tests.service.engines.lmdeploy import stock

    engine = stock.engine(Path(checkpoint), **options)
    await engine.start()
    yield engine
    await engine.close()


async def _without_guidance(checkpoint: str) -> str:
    from service.errors import EngineUnavailable

    try:
        async with _started(checkpoint):
            return "started"
    except EngineUnavailable as error:
        return error.message


def test_an_engine_that_does_not_obey_grammars_does_not_start(checkpoint: Path) -> None:
    """In null mode the kernel that masks logits does nothing, as a broken one would."""
    assert "does not obey grammars" in run(_without_guidance, checkpoint, mode="null")


async def _cancellations(checkpoint: str) -> dict[str, Any]:
    from tests.service.engines.conformance import first_chunk, random_image, request, until

    async with _started(checkpoint, check_guidance=False) as engine:
        native = engine._loaded.host.native

        def inside() -> int:
            metrics = native.get_schedule_metrics()
            return int(metrics.active_seqs + metrics.waiting_seqs)

        took, before = [], []
        for index in range(20):
            one = request("word " * 40, random_image(index), max_tokens=800)
            chunks = await first_chunk(engine, one)
            before.append(inside())
            begun = time.monotonic()
            await chunks.aclose()
            took.append(time.monotonic() - begun)
            assert engine.active_requests == 0
        await engine.check_health()
        # A request that is cancelled while it waits in TurboMind's own queue.
        many = [first_chunk(engine, request("word", max_tokens=800)) for _ in range(24)]
        tasks = [asyncio.ensure_future(one) for one in many]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, BaseException):
                await result.aclose()
        await until(lambda: not inside())  # its figures are those of the last step
        return {"took": took, "before": before, "inside": inside(), "live": engine.active_requests}


def test_a_cancelled_request_leaves_turbomind_at_once(checkpoint: Path) -> None:
    pause = {"HOST_RUNTIME_DELAY_US": "5000"}
    found = run(_cancellations, checkpoint, mode="null", extra=pause)
    assert found["before"] == [1] * 20, "each was running when it was cancelled"
    assert sorted(found["took"])[-3] < CANCEL_LIMIT_S, found["took"]  # two may meet a busy machine
    assert (found["inside"], found["live"]) == (0, 0)


async def _around_a_grammar(checkpoint: str) -> list[str]:
    from service.types import GrammarKind
    from tests.service.engines.conformance import answer, grammar, request

    only = grammar(GrammarKind.CHOICE, ["abc"])
    async with _started(checkpoint) as engine:
        return [
            (await answer(engine, request("Say.", constraint=constraint, max_tokens=12)))[0]
            for constraint in (None, only, None)
        ]


def test_a_request_does_not_keep_the_grammar_of_the_previous_one(checkpoint: Path) -> None:
    before, constrained, after = run(_around_a_grammar, checkpoint, mode="numbers")
    assert constrained == "abc"
    assert before == after != "abc"


async def _exactly(checkpoint: str) -> list[list[Any]]:
    from service.types import GrammarKind
    from tests.service.engines.conformance import answer, grammar, request

    only = grammar(GrammarKind.CHOICE, ["very far left"])
    found: list[list[Any]] = []
    # As long as a prompt that TurboMind warms up on: with a session of that length it dies.
    async with _started(checkpoint, context_length=512, prefill_chunk=512) as engine:
        _, _, usage = await answer(engine, request(constraint=only, max_tokens=40))
        for most in (usage.output_tokens, usage.output_tokens - 1):
            text, reason, used = await answer(engine, request(constraint=only, max_tokens=most))
            found.append([text, reason.value if reason else "", used.output_tokens == most])
    return found


def test_an_answer_of_exactly_max_tokens_is_complete(checkpoint: Path) -> None:
    exact, short = run(_exactly, checkpoint, mode="numbers")
    assert exact == ["very far left", "stop", True]
    assert short[1:] == ["length", True]


async def _bundled() -> list[list[Any]]:
    import numpy as np
    from PIL import Image as Pillow

    from service.engines.lmdeploy import LMDeployEngine
    from service.engines.reference import ReferenceEngine
    from service.inference.runner import run as run_task
    from service.tasks.image_analysis import IMAGE_ANALYSIS
    from service.tasks.registry import load_registry
    from service.types import Image, Sampling
    from service.wiring import BUNDLED_MODEL

    drawings = sorted(Path("examples/drawings/samples").glob("*.png"))
    analysis = load_registry(None).get(IMAGE_ANALYSIS.name)  # with its grammar analysed
    turbomind = LMDeployEngine(
        BUNDLED_MODEL, backend="turbomind", cache_share=0.2, prefill_chunk=256
    )
    reference = ReferenceEngine(BUNDLED_MODEL, dtype="bfloat16", device="cpu", threads=1)
    blind = ReferenceEngine(
        BUNDLED_MODEL, dtype="bfloat16", device="cpu", threads=1, deepstack=False
    )
    answers = []
    for engine in (turbomind, reference, blind):
        await engine.start()
        texts = []
        for path in drawings:
            image = Image(np.array(Pillow.open(path).convert("RGB")))
            done = await run_task(
                engine, analysis, [image], Sampling(max_tokens=400), timeout_s=120,
                request_id=path.stem,
            )  # fmt: skip
            texts.append(done.text)
        answers.append(texts)
        await engine.close()
    return answers


def test_the_bundled_model_answers_as_on_the_reference_engine() -> None:
    turbomind, reference, blind = run(_bundled, mode="numbers", timeout_s=280)
    assert len(reference) >= 4
    # 16-bit kernels of two kinds: a near tie may fall differently in one answer of all.
    assert sum(a == b for a, b in zip(turbomind, reference, strict=True)) >= len(reference) - 1
    assert blind != reference, "without DeepStack the answers are others"


async def _control_characters(checkpoint: str) -> list[str]:
    from service.types import GrammarKind
    from tests.service.engines.conformance import answer, grammar, request

    bounded = grammar(GrammarKind.JSON_SCHEMA, {"type": "string", "minLength": 20, "maxLength": 20})
    async with _started(checkpoint) as engine:
        hot = [
            request("Any.", constraint=bounded, temperature=2.0, seed=seed, max_tokens=99)
            for seed in range(24)
        ]
        return [text for text, _, _ in await asyncio.gather(*(answer(engine, one) for one in hot))]


def test_strings_contain_neither_control_characters_nor_special_tokens(checkpoint: Path) -> None:
    texts = run(_control_characters, checkpoint, mode="numbers")
    assert len(set(texts)) > 20, "the answers are random"
    for text in texts:
        assert min(text) >= " ", repr(text)
        assert "<|" not in text
