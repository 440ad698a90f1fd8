"""Stock TurboMind computes for Qwen3.5 what transformers computes: text, images, schemas, and the
precision of the recurrent state.

The device reports compute capability 8.0 here: on 9.0 TurboMind takes kernels whose addressing of
memory (TMA) cannot run on a CPU. Models with experts run in null mode only: on 8.0 the products of
experts are kernels without CPU code.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host_runtime.answers import among_cancelled, answers
from tests.host_runtime.cases import Case, expected, make_case
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.mutations import IN_PARTIAL_ROTARY, IN_RECURRENT_WEIGHTS, write_faulty
from tests.host_runtime.oracle import clear, expected_under_options
from tests.host_runtime.parity import check, difference
from tests.host_runtime.runner import run
from tests.host_runtime.test_options import guided, phases
from tests.qwen3_5 import write_qwen3_5

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]

Checkpoints = Callable[..., Path]
AMPERE = {"HOST_RUNTIME_CAPABILITY": "80"}
POISONED = {**AMPERE, "HOST_RUNTIME_POISON": "1"}
FLOAT32 = {"state": "float32"}
SHORT: list[dict[str, Any]] = [
    FLOAT32,
    {**FLOAT32, "together": True, "max_prefill_token_num": 64},
]
MORE: list[dict[str, Any]] = [
    {**FLOAT32, "together": True, "async_": 0, "shuffle": 1},
    {**FLOAT32, "enable_prefix_caching": True, "rounds": 2, "cache_prompt": "all"},
    {**FLOAT32, "enable_prefix_caching": True, "rounds": 2, "together": True,
     "max_prefill_token_num": 128, "cache_checkpoint_interval": 64},
]  # fmt: skip
SIDES = [4, 4, 6, 8, 10]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Random checkpoints by the keywords of `write_qwen3_5`, each written once."""
    folder = tmp_path_factory.mktemp("qwen3_5")

    def write(**fields: Any) -> Path:
        path = folder / ("-".join(f"{key}{one}" for key, one in fields.items()) or "dense")
        return path if path.exists() else write_qwen3_5(path, **fields)

    return write


def mixed_cases(token: int, count: int, seed: int = 0) -> list[Case]:
    """Text of up to 160 tokens, one of them long, and 1 to 4 images between texts."""
    source = random.Random(seed)
    cases = []
    for number in range(count):
        images = number % 5
        grids = [(source.choice(SIDES), source.choice(SIDES)) for _ in range(images)]
        words = [source.randrange(1, 12) for _ in range(images + 1)]
        words[-1] += (140 if number == 0 else source.randrange(150)) * (images == 0)
        cases.append(make_case(1000 * seed + number, grids, words, token, max_new_tokens=6))
    return cases


def compare(folder: Path, cases: list[Case], runs: list[dict[str, Any]], **keywords: Any) -> Any:
    """The answers of all runs, which have to agree with those of transformers."""
    wanted = [expected(folder, case) for case in cases]
    found = run(
        answers, folder, [case.to_json() for case in cases], runs,
        mode="numbers", timeout_s=280, extra=POISONED, **keywords,
    )  # fmt: skip
    for answered in found:
        check(answered, wanted)
    return found


def test_text_and_images_agree_without_the_extension(checkpoint: Checkpoints) -> None:
    folder = checkpoint()
    cases = mixed_cases(image_token(folder), 15)
    assert {len(case.grids) for case in cases} == {0, 1, 2, 3, 4}
    compare(folder, cases, SHORT, extension=False)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head", [64, 72])
def test_many_requests_agree_in_every_set_up(
    checkpoint: Checkpoints, dtype: str, head: int
) -> None:
    folder = checkpoint(vision_head=head, dtype=getattr(torch, dtype), tied=head == 64)
    cases = [  # stock TurboMind ends the process for pixels of another type than its own
        replace(case, pixel_dtype=dtype) for case in mixed_cases(image_token(folder), 20, seed=head)
    ]
    found = compare(folder, cases, [{**one, "dtype": dtype} for one in (*SHORT, *MORE)])
    for answered in found[-2:]:
        long = [a for a, c in zip(answered, cases, strict=True) if len(c.tokens) > 128]
        assert long
        assert all(answer["cached_tokens"] >= 64 for answer in long)


def test_prompts_continue_from_kept_states(checkpoint: Checkpoints) -> None:
    """The same prompt again, a conversation that goes on, and a shared beginning."""
    folder = checkpoint()
    token = image_token(folder)
    first = make_case(1, [(6, 6)], [60, 80], token, max_new_tokens=5)
    more = make_case(2, [], [12], token).tokens
    goes_on = replace(first, tokens=first.tokens[:-4] + more)
    shares = replace(first, tokens=first.tokens[:100] + more)
    cases = [first, first, goes_on, shares]
    options = {"cache_prompt": "all", "cache_prompt_boundary_skip": 4,
               "cache_checkpoint_interval": 64, "max_prefill_token_num": 64}  # fmt: skip
    (found,) = compare(folder, cases, [{**FLOAT32, **options, "enable_prefix_caching": True}])
    length = len(first.tokens)
    assert [one["cached_tokens"] for one in found] == [0, length - 4, length - 4, 64]


def test_schemas_and_cancelled_neighbours(checkpoint: Checkpoints) -> None:
    from transformers import AutoTokenizer

    folder = checkpoint()
    cases = list(guided(folder))[:6]
    wanted = [expected_under_options(folder, case) for case in cases]
    runs = [{**FLOAT32, "together": True, "max_prefill_token_num": 64}]
    (found,) = run(
        answers, folder, [one.to_json() for one in cases], runs, mode="numbers", extra=POISONED
    )
    check(found, wanted)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for answer in found:
        json.loads(tokenizer.decode(answer["tokens"], skip_special_tokens=True))
    cases = clear(folder, mixed_cases(image_token(folder), 60, seed=5), 6)
    crowd = run(
        among_cancelled, folder, [one.to_json() for one in cases],
        [{"max_prefill_token_num": 64, "max_batch_size": 2, "enable_prefix_caching": True}],
        mode="numbers", extra={**POISONED, "HOST_RUNTIME_DELAY_US": "3000"},
    )  # fmt: skip
    check(crowd[0]["answers"], [expected(folder, case) for case in cases])
    assert phases(crowd) == {"not sent", "no token yet", "answering"}


def _served(checkpoint: str) -> tuple[dict[str, str], list[tuple[str, int]]]:
    """Details of the service's engine on a checkpoint, and text and tokens of an answer without and
    with thoughts."""
    import asyncio

    from service.engines.lmdeploy import LMDeployEngine
    from tests.service.engines.conformance import answer, request

    async def ask() -> tuple[dict[str, str], list[tuple[str, int]]]:
        engine = LMDeployEngine(
            checkpoint, backend="turbomind", context_length=256, max_batch=2, cache_share=0.1,
            prefill_chunk=64, check_guidance=False, dtype="bfloat16",
        )  # fmt: skip
        await engine.start()
        found = []
        for thinking in (False, True):
            asked = request("Any.", max_tokens=3, thinking=thinking)
            text, _, usage = await answer(engine, asked)
            found.append((text, usage.output_tokens))
        await engine.close()
        return dict(engine.capabilities.details), found

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("moe", "asked", "kernel"),
    [(False, "bfloat16", "__nv_bfloat16>"), (True, None, "float>")],
)
def test_the_service_keeps_the_precision_of_the_state_and_leaves_thoughts_out(
    checkpoint: Checkpoints, tmp_path: Path, moe: bool, asked: str | None, kernel: str
) -> None:
    """The name of each kernel of the recurrent rule ends with the type of the state."""
    folder = write_qwen3_5(tmp_path / "checkpoint", moe=moe, mamba_ssm_dtype=asked)
    trace = tmp_path / "trace"
    details, (plain, thought) = run(_served, folder, mode="null", extra=AMPERE, trace=trace)
    assert details["state_dtype"] == (asked or "float32")
    assert plain[0]
    assert thought == ["", 3], "thoughts that do not end are not an answer, but count"
    names = {
        line.split(" grid ")[0] for line in trace.read_text().splitlines() if "GdrKernel<" in line
    }
    assert len(names) == 2, "prefill and decoding"
    assert all(name.endswith(f", {kernel}") for name in names), names


@pytest.mark.long
def test_every_fault_is_noticed(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint()
    token = image_token(folder)
    long = [make_case(seed, [], [200], token, max_new_tokens=100) for seed in (7, 8)]
    cases = [*mixed_cases(token, 10, seed=3), *long]
    wanted = [expected(folder, case) for case in cases]
    runs: dict[str, dict[str, Any]] = {"none": {}}
    runs |= {fault.__name__: {"fault": fault.__name__} for fault in IN_PARTIAL_ROTARY}
    for fault in IN_RECURRENT_WEIGHTS:
        path = write_faulty(folder, tmp_path / fault.__name__, fault)
        runs[fault.__name__] = {"checkpoint": str(path)}
    runs["state in 16 bits"] = {"state": "bfloat16"}
    found = run(
        answers, folder, [case.to_json() for case in cases],
        [{**FLOAT32, "max_prefill_token_num": 64, **one} for one in runs.values()],
        mode="numbers", timeout_s=280, extra=AMPERE,
    )  # fmt: skip
    exact = dict(zip(runs, found, strict=True))
    low = exact.pop("state in 16 bits")
    assert [a["tokens"] for a in low] != [a["tokens"] for a in exact["none"]], (
        "no request parts because of the precision of the state"
    )
    noticed = {
        name: sum(
            difference(answer["tokens"], want) is not None
            for answer, want in zip(answered, wanted, strict=True)
        )
        for name, answered in exact.items()
    }
    print("requests of", len(cases), "in which each fault shows:", noticed)
    assert noticed.pop("none") == 0
    assert [name for name, count in noticed.items() if not count] == []
