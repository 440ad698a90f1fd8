"""The stock engine with DeepStack answers as transformers does, on the host runtime. `test_rows` looks closer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host_runtime.answers import answers
from tests.host_runtime.cases import Case, expected, make_case
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.parity import check, difference
from tests.host_runtime.runner import run
from tests.lmdeploy_ext.deepstack.cases import mixed_cases
from tests.lmdeploy_ext.deepstack.children import answers_among_cancelled, faulty_answers
from tests.lmdeploy_ext.deepstack.faults import FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.host]

POISON = {"HOST_RUNTIME_POISON": "1"}
Checkpoints = Callable[..., Path]


def test_prefix_cache_hits(loud: Checkpoints) -> None:
    """Nothing, a part and the whole of an image come from the cache, in blocks of 64 tokens."""
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
    (answered,) = run(
        answers, folder, [case.to_json() for case in cases],
        [{"enable_prefix_caching": True}], mode="numbers", extra=POISON,
    )  # fmt: skip
    check(answered, wanted)
    assert [answer["cached_tokens"] for answer in answered] == wanted_cached


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
    cases = mixed_cases(image_token(folder), 18, seed=14)
    wanted = [expected(folder, case) for case in cases]
    # Too fine for the few answers of a random model; `test_rows` has them.
    fine = {"beginning of the image instead of its part", "features of the token before"}
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
