"""DeepStack on TurboMind on a GPU: right tokens, right answers, what it costs, nothing left behind.

Run with ``make test-gpu``. DeepStack is chosen once in a process, so each mode has one of its own,
which prints its result as the last line of stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.wiring import BUNDLED_MODEL

ROOT = Path(__file__).parents[2]
Measured = Callable[[str, str, str], None]
DRAWINGS = 200
WHOLE = "whole object list"
LEAK_REQUESTS = 5000
LEAK_BYTES = 64 << 20
PREFILL_OVERHEAD, DECODE_OVERHEAD = 0.05, 0.005
TIE = 0.25
"""How far a token's logit may be behind the best of transformers in float32: rounding of 16 bits in a deep model."""


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
    """Requests with one to three pictures; at once, or in long ones, chunks of 256 tokens cut pictures."""
    from tests.host_runtime.cases import make_case

    return [
        make_case(n, [(4 + 4 * n, 8 + 2 * k) for k in range(1 + n % 3)], [5] * (2 + n % 3), token)
        for n in range(9)
    ]


@pytest.mark.parametrize("size", ["two_billion", "eight_billion"])
def test_random_checkpoints(size: str, request: pytest.FixtureRequest, measured: Measured) -> None:
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


SPEED = """
import asyncio, json, statistics, time
from pathlib import Path
import lmdeploy_ext
mode, folder, token = sys.argv[1], sys.argv[2], int(sys.argv[3])
lmdeploy_ext.install(mode)
from tests.host_runtime import engines
from tests.host_runtime.cases import make_case
async def main():
    engine = engines.turbomind(folder, session_len=4097, cache_max_entry_count=0.3,
                               max_prefill_token_num=4096, enable_prefix_caching=False)
    async def took(case, tokens):
        begin = time.perf_counter()
        await engines.ask(engine, case.tokens, images=case.images(), max_new_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - begin
    prefills, decodes = [], []
    for n in range(25):
        case = make_case(n, [(32, 32)] * 4, [20] * 5, token)
        first = await took(case, 1)
        whole = await took(make_case(n + 100, [(4, 4)], [20, 20], token), 257)
        if n >= 5:  # the others warm up
            prefills.append(first)
            decodes.append(whole / 257)
    print(json.dumps({"prefill": statistics.median(prefills), "decode": statistics.median(decodes)}))
    sys.stdout.flush()
    __import__("os")._exit(0)
asyncio.run(main())
"""


def test_what_it_costs(two_billion: Path, measured: Measured) -> None:
    """Prefill with 1,024 image tokens, and decode steps, against the same engine with DeepStack off."""
    from tests.host_runtime.checkpoints import image_token

    token = image_token(two_billion)
    on, off = [], []
    for _ in range(3):  # they take turns; the best of each counts
        on.append(child(SPEED, "require", two_billion, token))
        off.append(child(SPEED, "off", two_billion, token))
    ratios = {
        what: min(one[what] for one in on) / min(one[what] for one in off) - 1
        for what in ("prefill", "decode")
    }
    for what, limit in (("prefill", PREFILL_OVERHEAD), ("decode", DECODE_OVERHEAD)):
        measured(
            f"overhead of DeepStack, {what}", f"{100 * ratios[what]:.2f} %", f"<= {100 * limit} %"
        )
    assert ratios["prefill"] <= PREFILL_OVERHEAD
    assert ratios["decode"] <= DECODE_OVERHEAD


LEAK = """
import asyncio, json
from pathlib import Path
import psutil, torch
from service.engines.lmdeploy import LMDeployEngine
from tests.service.engines.conformance import answer, picture, request
folder, count = Path(sys.argv[1]), int(sys.argv[2])
async def main():
    engine = LMDeployEngine(folder, backend="turbomind", deepstack="require", context_length=2048,
                            cache_share=0.2, check_guidance=False)
    await engine.start()
    process, seen = psutil.Process(), []
    async def some(first, number):
        for begin in range(first, first + number, 25):
            await asyncio.gather(*(answer(engine, request("What?", picture(n, 64 + n % 200, 96), max_tokens=4))
                                   for n in range(begin, begin + 25)))
        seen.append([torch.cuda.mem_get_info()[0], process.memory_info().rss, len(engine._live)])
    await some(0, count // 5)  # caches of every kind fill
    await some(count // 5, count - count // 5)
    await engine.close()
    print(json.dumps(seen))
asyncio.run(main())
"""


def test_5000_requests_leave_nothing(measured: Measured) -> None:
    (free, resident, _), (free_after, resident_after, live) = child(
        LEAK, BUNDLED_MODEL, LEAK_REQUESTS
    )
    grown = {
        "GPU": (free - free_after, LEAK_BYTES),
        "process": (resident_after - resident, 4 * LEAK_BYTES),
    }
    for what, (size, limit) in grown.items():
        measured(
            f"{LEAK_REQUESTS} requests, memory of the {what}",
            f"{size >> 20} MiB more",
            f"< {limit >> 20}",
        )
    for what, (size, limit) in grown.items():
        assert size < limit, f"memory of the {what}"
    assert live == 0


SELFTEST = """
import json, time
import lmdeploy_ext
lmdeploy_ext.install("require")
from lmdeploy_ext.deepstack import selftest
begin = time.monotonic()
problem = selftest.run()
print(json.dumps({"problem": problem, "took": time.monotonic() - begin}))
"""


def test_the_self_test_passes(measured: Measured) -> None:
    found = child(SELFTEST)
    measured("self-test", f"{found['took']:.1f} s", "passes")
    assert found["problem"] is None
