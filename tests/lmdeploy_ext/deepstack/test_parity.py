"""The stock engine with DeepStack computes what transformers computes, on the host runtime."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host_runtime.cases import Case, _model, expected, make_case
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.parity import check, difference
from tests.host_runtime.runner import run
from tests.lmdeploy_ext.deepstack.children import (
    FAULTS,
    added_rows,
    answers_among_cancelled,
    faulty_answers,
    watched_answers,
)

pytestmark = [pytest.mark.slow, pytest.mark.host]

POISON = {"HOST_RUNTIME_POISON": "1"}
SIDES = [4, 4, 6, 8, 10, 20]
RUNS: list[dict[str, Any]] = [
    {},
    {"together": True, "max_prefill_token_num": 64},
    {"together": True, "async_": 0, "shuffle": 1, "max_prefill_token_num": 96},
    {"enable_prefix_caching": True, "rounds": 2},
    {"enable_prefix_caching": True, "rounds": 2, "together": True, "max_prefill_token_num": 128},
]

Checkpoints = Callable[..., Path]


def mixed_cases(token: int, count: int, seed: int = 11) -> list[Case]:
    """Requests with 0 to 6 pictures, at the start, at the end, in a row; some begin like others."""
    source = random.Random(seed)
    cases = []
    for number in range(count):
        pictures = number % 7 if number < 7 else source.randrange(1, 4)
        grids = [(source.choice(SIDES), source.choice(SIDES)) for _ in range(pictures)]
        words = [source.randrange(1, 12) for _ in range(pictures + 1)]
        words[0] *= number % 3 != 0
        words[-1] += 20 * (pictures == 0)
        case = make_case(number + 100 * seed, grids, words, token, max_new_tokens=5)
        cases.append(case)
        if number % 5 == 4 and len(case.tokens) > 70:
            # The same with another end: its beginning is in the prefix cache, perhaps within a picture.
            ending = case.spans[-1][1]
            other = [source.randrange(10, 300) for _ in range(9)]
            changed = {"tokens": case.tokens[:ending] + other}
            cases.append(Case(**{**case.to_json(), **changed}))
    return cases


@pytest.mark.parametrize(
    "fields", [{"vision_head": 64}, {"vision_head": 72, "tied": False}], ids=["head64", "head72"]
)
def test_greedy_tokens_are_those_of_transformers(loud: Checkpoints, fields: dict[str, Any]) -> None:
    folder = loud(**fields)
    cases = mixed_cases(image_token(folder), 24)
    wanted = [expected(folder, case) for case in cases]
    found, kinds = run(
        watched_answers, folder, [case.to_json() for case in cases], RUNS,
        mode="numbers", timeout_s=280, extra=POISON,
    )  # fmt: skip
    for answered in found:
        check(answered, wanted)
    assert set(kinds) == {
        "text of a prompt whose pictures came before",
        "several pictures",
        "beginning of a picture",
        "end of a picture",
        "not the end of a picture",
        "rows behind the last picture",
    }


def test_prefix_cache_hits(loud: Checkpoints) -> None:
    """Nothing, a part and the whole of a picture come from the cache, in blocks of 64 tokens."""
    folder = loud()
    token = image_token(folder)
    cases, wanted_cached, kinds = [], [], set()
    for number, before in enumerate((70, 60, 50, 45, 30, 10)):
        first = make_case(number, [(8, 12), (4, 6)], [before, 3, 12], token, max_new_tokens=5)
        again = make_case(number + 50, [], [12], token).tokens
        changed = {"tokens": first.tokens[: first.spans[1][1]] + again}
        cases += [first, Case(**{**first.to_json(), **changed})]
        begin, end = first.spans[0]
        kinds.add("none" if begin >= 64 else "whole" if end <= 64 else "part")
        hit = 64 if first.spans[1][1] >= 64 else 0
        wanted_cached += [0, hit]
    assert kinds == {"none", "part", "whole"}
    wanted = [expected(folder, case) for case in cases]
    (answered,), _ = run(
        watched_answers, folder, [case.to_json() for case in cases],
        [{"enable_prefix_caching": True}], mode="numbers", extra=POISON,
    )  # fmt: skip
    check(answered, wanted)
    assert [answer["cached_tokens"] for answer in answered] == wanted_cached


def test_float16(loud: Checkpoints) -> None:
    folder = loud(torch.float16)
    cases = mixed_cases(image_token(folder), 10)
    wanted = [expected(folder, case) for case in cases]
    settings = [{"dtype": "float16"}, {"dtype": "float16", "together": True}]
    found, _ = run(
        watched_answers, folder, [case.to_json() for case in cases], settings,
        mode="numbers", extra=POISON,
    )  # fmt: skip
    for answered in found:
        check(answered, wanted)


def feature_rows(folder: Path, case: Case) -> torch.Tensor:
    """What transformers adds behind the first layers: (features, tokens of the prompt, width)."""
    tower = _model(folder, True).model.visual
    with torch.inference_mode():
        out = tower(torch.cat(case.pixels()).float(), torch.tensor(case.grids))
    features = torch.stack(list(out.deepstack_features))
    rows = torch.zeros(len(features), len(case.tokens), features.shape[-1])
    at = [token for begin, end in case.spans for token in range(begin, end)]
    rows[:, at] = features
    return rows


def row_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest error of a row, as a share of a typical feature; rows of text must be exactly nought."""
    if found.shape != wanted.shape:
        return float("inf")
    pictures = wanted.any(dim=-1)
    if found[~pictures].any():
        return float("inf")
    return float((found - wanted).norm(dim=-1).max() / wanted[pictures].norm(dim=-1).mean())


@pytest.mark.parametrize("piece", [256, 64])
def test_every_row_gets_its_feature(loud: Checkpoints, tmp_path: Path, piece: int) -> None:
    folder = loud()
    case = make_case(5, [(8, 12), (4, 20), (12, 14)], [9, 0, 2, 14], image_token(folder))
    wanted = feature_rows(folder, case)
    path = tmp_path / "rows.pt"
    settings = {"max_prefill_token_num": piece, "enable_prefix_caching": True}
    faults = ["", *(list(FAULTS) if piece == 64 else [])]
    cached = run(
        added_rows, folder, case.to_json(), settings, faults, path, mode="numbers", timeout_s=280
    )
    assert case.spans[2][0] < cached[0] < case.spans[2][1], "a part of the last picture is left"
    found = torch.load(path)
    for rows, tokens in zip(found.pop(""), (0, cached[0]), strict=True):
        assert row_error(rows, wanted[:, tokens:]) < 0.06, "noise of bfloat16"
    for name, (rows, _) in found.items():
        assert row_error(rows, wanted) > 0.3, f"{name} is noticed"


def test_requests_among_cancelled_ones(loud: Checkpoints) -> None:
    folder = loud()
    cases = mixed_cases(image_token(folder), 8)
    wanted = [expected(folder, case) for case in cases]
    settings = {"max_prefill_token_num": 64, "enable_prefix_caching": True}
    # With the pause, a batch is set up while the one before it computes.
    found = run(
        answers_among_cancelled, folder, [case.to_json() for case in cases], settings, 4,
        mode="numbers", extra={**POISON, "HOST_RUNTIME_DELAY_US": "5000"},
    )  # fmt: skip
    for answered in found:
        check(answered, wanted)


def test_faults_change_answers(loud: Checkpoints) -> None:
    folder = loud()
    cases = mixed_cases(image_token(folder), 16)
    wanted = [expected(folder, case) for case in cases]
    # Too fine for the few answers of a random model; `test_every_row_gets_its_feature` has them.
    fine = {"beginning of the picture instead of its part", "features of the token before"}
    faults = [name for name in FAULTS if name not in fine]
    setting = {"together": True, "max_prefill_token_num": 64}
    found = run(
        faulty_answers, folder, [case.to_json() for case in cases], setting, faults,
        mode="numbers", timeout_s=280,
    )  # fmt: skip
    wrong = {
        name: sum(
            difference(answer["tokens"], want) is not None
            for answer, want in zip(answered, wanted, strict=True)
        )
        for name, answered in found.items()
    }
    assert list(wrong) == faults
    assert min(wrong.values()) >= 2, wrong
