"""The parity tests notice faults: each of these makes tokens differ, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.host_runtime.answers import answers
from tests.host_runtime.cases import Case, expected, make_case
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.mutations import (
    IN_ITEMS,
    IN_MODEL,
    IN_SEGMENTS,
    IN_WEIGHTS,
    WITHOUT_DEEPSTACK,
    write_faulty,
)
from tests.host_runtime.parity import difference
from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]

GRIDS = [[(8, 4)], [(4, 12), (6, 6)], [(8, 8), (8, 8)], [(12, 10)], [(4, 6), (4, 6), (10, 4)]]
CUT = [
    (27, 53, [(12, 10)]),
    (28, 58, [(20, 4)]),
    (35, 51, [(6, 10), (8, 6)]),
    (36, 56, [(12, 12)]),
]
"""Seed, words and images of prompts that are cut within an image, in pieces of 64 tokens."""


def _cases(token: int) -> list[Case]:
    """Prompts that need every part of the model, some of them alike but for their pixels."""
    cases = [
        make_case(seed, grids, [3 + seed] * (len(grids) + 1), token, max_new_tokens=10)
        for seed, grids in enumerate(GRIDS)
    ]
    long = make_case(9, [(20, 16)], [4, 6], token, max_new_tokens=10)
    cut = [
        make_case(seed, grids, [words, *[2] * len(grids)], token, max_new_tokens=6)
        for seed, words, grids in CUT
    ]
    return [*cases, long, replace(long, seed=10), *cut]


def test_every_fault_is_noticed(vision_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = vision_checkpoint(vision_head=64)
    cases = _cases(image_token(folder))
    wanted = [expected(folder, case) for case in cases]
    runs: dict[str, dict[str, Any]] = {"none": {}}
    in_code = (*IN_MODEL, *IN_ITEMS, *IN_SEGMENTS)
    runs |= {fault.__name__: {"fault": fault.__name__} for fault in in_code}
    runs[WITHOUT_DEEPSTACK] = {"fault": WITHOUT_DEEPSTACK}
    for fault in IN_WEIGHTS:
        path = write_faulty(folder, tmp_path / fault.__name__, fault)
        runs[fault.__name__] = {"checkpoint": str(path)}
    common = {"enable_prefix_caching": True, "max_prefill_token_num": 64}
    found = run(
        answers, folder, [case.to_json() for case in cases],
        [{**common, **one} for one in runs.values()], mode="numbers", timeout_s=280,
    )  # fmt: skip
    noticed = {
        name: sum(
            difference(answer["tokens"], want) is not None
            for answer, want in zip(answered, wanted, strict=True)
        )
        for name, answered in zip(runs, found, strict=True)
    }
    print("requests of", len(cases), "in which each fault shows:", noticed)
    assert noticed.pop("none") == 0
    assert len(noticed) >= 24
    assert [name for name, count in noticed.items() if not count] == []
