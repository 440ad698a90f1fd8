"""DeepStack on TurboMind on a GPU: right tokens, right answers, what it costs, nothing left behind.

Run with ``make test-gpu``. DeepStack is chosen once in a process, so each mode has one of its own,
which prints its result as the last line of stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_kit import steps
from service.engines.common.loops import LoopGuard
from service.engines.lmdeploy import LMDeployEngine
from service.wiring import BUNDLED_MODEL

ROOT = Path(__file__).parents[2]
Measured = Callable[[str, str, str], None]
DRAWINGS = 200
WHOLE = "whole object list"
LEAK_REQUESTS = 5000
TURNS = 30
TIE = 0.25
"""How far a token's logit may be behind the best of transformers in float32: rounding of 16 bits in a deep model."""


@asynccontextmanager
async def started(folder: Path, **options: Any) -> AsyncIterator[Any]:
    engine = LMDeployEngine(
        folder, backend="turbomind", deepstack="require", loop_guard=LoopGuard(window=0), **options
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def child(code: str, *words: object, timeout_s: float = 1800) -> Any:
    """Run code in a process of its own, with ``words`` as its arguments; the JSON of its last line."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


SCORE = """
import asyncio, json
from pathlib import Path
from unittest import mock
from examples.drawings import evaluate
from service.engines.lmdeploy import LMDeployEngine
from service.engines.reference import ReferenceEngine
mode, model, count = sys.argv[1:]
def engine(folder):
    if mode == "reference":
        return ReferenceEngine(folder, device="cuda", dtype="bfloat16")
    return LMDeployEngine(folder, backend="turbomind", deepstack=mode, cache_share=0.3,
                          context_length=2048, prefill_chunk=512)
async def main():
    seen = {}
    kept = evaluate._score_analysis
    def keep(score, facts, analysis):
        seen[repr(facts)] = str(analysis)
        kept(score, facts, analysis)
    with mock.patch.object(evaluate, "ReferenceEngine", engine), \\
         mock.patch.object(evaluate, "_score_analysis", keep):
        async with evaluate.serving(Path(model)) as stub:
            score = await evaluate.score_analyses(stub, int(count))
    right = {name: score.right[name] / score.asked[name] for name in score.asked}
    print(json.dumps({"right": right, "answers": seen}))
asyncio.run(main())
"""


def test_held_out_drawings_are_read_as_by_the_reference_engine(measured: Measured) -> None:
    found = {
        mode: child(SCORE, mode, BUNDLED_MODEL, DRAWINGS)
        for mode in ("require", "off", "reference")
    }
    wanted = found["reference"]
    for mode, one in found.items():
        same = sum(one["answers"].get(key) == text for key, text in wanted["answers"].items())
        share = f"{100 * one['right'][WHOLE]:.1f} %"
        measured(f"drawings, {mode}: answers as the reference engine's", f"{same} of {len(wanted['answers'])}",
                 "all, not with off")  # fmt: skip
        measured(f"drawings, {mode}: {WHOLE} right", share, "within 0.5, less with off")
    assert len(wanted["answers"]) >= 0.95 * DRAWINGS, "some scenes may be equal"
    assert found["require"]["answers"] == wanted["answers"]
    for name, share in wanted["right"].items():
        assert abs(found["require"]["right"][name] - share) <= 0.005, name
    assert found["off"]["answers"] != wanted["answers"]
    assert found["off"]["right"][WHOLE] < wanted["right"][WHOLE] - 0.2


ANSWERS = """
import asyncio, json
from pathlib import Path
import lmdeploy_ext
mode, folder, token = sys.argv[1], sys.argv[2], int(sys.argv[3])
lmdeploy_ext.install(mode)
from tests.host_runtime import engines
from tests.gpu.test_deepstack import cases
async def main():
    engine = engines.turbomind(folder, session_len=2049, cache_max_entry_count=0.2, max_prefill_token_num=256)
    async def ask(case):
        return (await engines.ask(engine, case.tokens, images=case.images(), max_new_tokens=8,
                                  ignore_eos=True)).tokens
    alone = [await ask(case) for case in cases(token)]
    print(json.dumps(alone + await asyncio.gather(*(ask(case) for case in cases(token)))))
    sys.stdout.flush()
    __import__("os")._exit(0)
asyncio.run(main())
"""


def cases(token: int) -> list[Any]:
    """Requests with one to three images; at once, or in long ones, chunks of 256 tokens cut images."""
    from tests.host_runtime.cases import make_case

    return [
        make_case(n, [(4 + 4 * n, 8 + 2 * k) for k in range(1 + n % 3)], [5] * (2 + n % 3), token)
        for n in range(9)
    ]


@pytest.mark.parametrize("size", ["two_billion", "eight_billion"])
def test_answers_about_random_checkpoints_equal_transformers(
    size: str, request: pytest.FixtureRequest, measured: Measured
) -> None:
    """Each token is transformers' best in float32 on the CPU, or as near as bfloat16 tells apart:
    one request after the other, and all at once."""
    from tests.host_runtime.checkpoints import image_token
    from tests.lmdeploy_ext.deepstack.fuzz import lags

    folder: Path = request.getfixturevalue(size)
    token = image_token(folder)
    with_it, without = (child(ANSWERS, mode, folder, token) for mode in ("require", "off"))
    assert with_it != without
    twice = cases(token) * 2
    found = [max(lags(folder, *pair)) for pair in zip(twice, with_it, strict=True)]
    wrong = [max(lags(folder, *pair)) for pair in zip(twice, without, strict=True)]
    measured(f"{size}: logit of a token behind the best, at most", f"{max(found):.3f}", f"< {TIE}")
    measured(f"{size}, off: the same", f"{max(wrong):.3f}", f"> {TIE}")
    assert max(found) < TIE, found
    assert max(wrong) > TIE, "the checkpoint must tell"


async def test_cost_of_deepstack(two_billion: Path, worker: Any) -> None:
    """Prefill with 1,024 image tokens, and decode steps, hooked and not, in turns."""
    async with started(two_billion, context_length=4096, cache_share=0.5) as engine:
        await steps.check_overhead(worker, engine, TURNS)


async def test_5000_requests_do_not_increase_the_memory(worker: Any) -> None:
    async with started(BUNDLED_MODEL, context_length=2048, cache_share=0.2) as engine:
        await steps.check_memory(worker, engine, LEAK_REQUESTS // 5, LEAK_REQUESTS * 4 // 5)


async def test_the_self_test_passes(worker: Any) -> None:
    await steps.selftest(worker)
