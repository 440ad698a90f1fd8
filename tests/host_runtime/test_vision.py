"""The stock engine with the extension computes what transformers computes: text and images."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.host_runtime.answers import answers
from tests.host_runtime.cases import Case, expected, make_case
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.oracle import check_reference_engine, clear
from tests.host_runtime.parity import TIE, check
from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]

SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "head64": ({"vision_head": 64}, "bfloat16"),
    "head64, float16": ({"vision_head": 64}, "float16"),
    "head72": ({"vision_head": 72, "tied": False}, "bfloat16"),
    "head72, float16": ({"vision_head": 72, "tied": False}, "float16"),
    "experts": ({"moe": True, "tied": False}, "bfloat16"),  # LMDeploy has no kernels for float16
}
RUNS: list[dict[str, Any]] = [
    {},
    {"together": True, "max_prefill_token_num": 64},
    {"together": True, "async_": 0, "shuffle": 1},
    {"enable_prefix_caching": True, "rounds": 2},
    {"enable_prefix_caching": True, "rounds": 2, "together": True, "max_prefill_token_num": 128},
]
SIDES = [4, 4, 6, 8, 10, 12, 20]


def mixed_cases(token: int, count: int = 32) -> list[Case]:
    """Requests with 0 to 6 images of all shapes, at the start, at the end, in a row."""
    source = random.Random(7)
    cases = []
    for seed in range(count):
        images = seed % 7 if seed < 14 or seed >= 32 else source.randrange(3)
        grids = [(source.choice(SIDES), source.choice(SIDES)) for _ in range(images)]
        words = [source.randrange(1, 12) for _ in range(images + 1)]
        words[0] *= seed % 3 != 0  # some start with an image
        words[-1] += 20 * (images == 0)
        cases.append(make_case(seed, grids, words, token, max_new_tokens=6))
    return cases


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_are_those_of_transformers_and_of_the_reference_engine(
    vision_checkpoint: Callable[..., Path], name: str
) -> None:
    fields, dtype = SHAPES[name]
    folder = vision_checkpoint(**fields)
    cases = mixed_cases(image_token(folder))
    if fields.get("moe"):  # rounding may choose another expert, which is no small difference
        cases = clear(folder, mixed_cases(image_token(folder), 200), len(cases), TIE)
    assert {len(case.grids) for case in cases} == set(range(7))
    wanted = [expected(folder, case) for case in cases]
    check_reference_engine(folder, cases, wanted)
    runs = [{**one, "dtype": dtype} for one in RUNS]
    found = run(
        answers, folder, [case.to_json() for case in cases], runs,
        mode="numbers", timeout_s=280, extra={"HOST_RUNTIME_POISON": "1"},
    )  # fmt: skip
    for answered in found:
        check(answered, wanted)
    for answered in found[-2:]:
        long = [
            a["cached_tokens"] for a, c in zip(answered, cases, strict=True) if len(c.tokens) > 64
        ]
        assert long
        assert all(cached >= 64 for cached in long), "the second round finds its prompts cached"
