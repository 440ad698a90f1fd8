"""Stock TurboMind with DeepStack, token by token and row by row, against transformers and the reference engine.

Every image has a size of its own, so that each row of each forward tells whose feature it must get.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host_runtime.cases import Case, _model, expected, make_case
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.oracle import packed
from tests.host_runtime.parity import TIE, check
from tests.host_runtime.runner import run
from tests.lmdeploy_ext.deepstack.cases import mixed_cases, with_another_end
from tests.lmdeploy_ext.deepstack.checkpoints import TAPS
from tests.lmdeploy_ext.deepstack.faults import FAULTS
from tests.lmdeploy_ext.deepstack.fuzz import lags
from tests.lmdeploy_ext.deepstack.rows import (
    beside_an_answer,
    cancelled_when_set_up,
    recorded_answers,
)
from tests.lmdeploy_ext.deepstack.watching import Forward
from tests.service.engines.reference.oracle import engine_logits, loaded

pytestmark = [pytest.mark.slow, pytest.mark.host]

POISON = {"HOST_RUNTIME_POISON": "1"}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "head64": {},
    "head72": {"vision_head": 72, "tied": False},
    "experts": {"moe": True, "tied": False},
    "head64 float16": {"dtype": torch.float16},
    "head72 float16": {"dtype": torch.float16, "vision_head": 72, "tied": False},
}
RUNS: list[dict[str, Any]] = [
    {},
    {"together": True, "max_prefill_token_num": 64},
    {"together": True, "async_": 0, "shuffle": 1, "max_prefill_token_num": 96},
    {"enable_prefix_caching": True, "rounds": 2},
    {"enable_prefix_caching": True, "rounds": 2, "together": True, "max_prefill_token_num": 128,
     "async_": 0},
]  # fmt: skip
NOISE, FAULT = 0.06, 0.3
"""Error of a row as a share of a typical feature: rounding is less than the one, a fault more than the other."""

Checkpoints = Callable[..., Path]
Features = Mapping[tuple[int, int], torch.Tensor]


# ---- rows ---------------------------------------------------------------------------------------


@torch.inference_mode()
def features_of(folder: Path, cases: Sequence[Case]) -> dict[tuple[int, int], torch.Tensor]:
    """transformers' features (features, tokens, width) of each image, by its size in tokens."""
    tower = _model(folder, True).model.visual
    found: dict[tuple[int, int], torch.Tensor] = {}
    for case in cases:
        for pixels, (_, height, width) in zip(case.pixels(), case.grids, strict=True):
            out = tower(pixels.float(), torch.tensor([[1, height, width]]))
            feature = torch.stack(list(out.deepstack_features))
            same = found.setdefault((height // 2, width // 2), feature)
            assert torch.equal(same, feature), "two images have one size"
    return found


def row_error(forwards: Sequence[Forward], wanted: Features) -> float:
    """Largest error of a row; infinite where a row of something else was touched."""
    typical = torch.cat(list(wanted.values()), dim=1).norm(dim=-1).mean()
    worst = 0.0
    for forward in forwards:
        at = 0
        for _, count, height, width, offset in forward["pieces"]:
            feature = wanted[height, width][:, offset : offset + count]
            got = forward["added"][:, at : at + count]
            if got.shape != feature.shape:
                return float("inf")
            worst = max(worst, float((got - feature).norm(dim=-1).max()))
            at += count
        if forward["others"]:
            return float("inf")
    return worst / float(typical)


def given(forwards: Sequence[Forward]) -> Counter[tuple[int, int, int]]:
    """How often each token of each image got its feature: (height, width, token)."""
    return Counter(
        (height, width, offset + row)
        for forward in forwards
        for _, count, height, width, offset in forward["pieces"]
        for row in range(count)
    )


def tokens_of(cases: Sequence[Case]) -> Counter[tuple[int, int, int]]:
    """How often each token of each image is in a prompt."""
    return Counter(
        (height // 2, width // 2, token)
        for case in cases
        for _, height, width in case.grids
        for token in range(height * width // 4)
    )


# ---- the reference engine -----------------------------------------------------------------------


def behind_reference(folder: Path, case: Case, answer: Sequence[int]) -> list[float]:
    """How far the logit of each token of an answer is behind the reference engine's best one."""
    logits = engine_logits(loaded(folder), packed(folder, case), list(answer[:-1]))
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return [float(lag) for lag in logits.amax(dim=1) - chosen]


def check_lags(
    lags: Callable[[Path, Case, Sequence[int]], list[float]],
    folder: Path,
    cases: Sequence[Case],
    answered: Sequence[Mapping[str, Any]],
) -> None:
    """Every token is the best one for what stands before it, or as near as 16-bit numbers tell apart."""
    found = [
        lag
        for case, answer in zip(cases, answered, strict=True)
        for lag in lags(folder, case, answer["tokens"])
    ]
    assert max(found) < TIE
    assert sum(lag == 0 for lag in found) > 0.85 * len(found), (
        "too many ties for a test of anything"
    )


# ---- tests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_token_and_every_added_row_equal_transformers(
    loud: Checkpoints, tmp_path: Path, name: str
) -> None:
    fields = CHECKPOINTS[name]
    folder = loud(**fields)
    cases = mixed_cases(image_token(folder), 12)
    runs = [{**one, "dtype": str(fields.get("dtype", torch.bfloat16))[6:]} for one in RUNS]
    wanted = [expected(folder, case) for case in cases]
    features, path = features_of(folder, cases), tmp_path / "rows.pt"
    found, kinds = run(
        recorded_answers, folder, [case.to_json() for case in cases], runs, path,
        mode="numbers", timeout_s=280, extra=POISON,
    )  # fmt: skip
    for answered, forwards, settings in zip(found, torch.load(path), runs, strict=True):
        check(answered, wanted)
        assert row_error(forwards, features) < NOISE
        if "rounds" in settings:
            assert given(forwards).keys() == tokens_of(cases).keys()
            assert given(forwards).total() < 2 * tokens_of(cases).total(), "the cache has some"
        else:
            assert given(forwards) == tokens_of(cases)
        if "together" in settings:
            assert any(forward["beside"] for forward in forwards)
    assert set(kinds) == {
        "text of a prompt whose images came before",
        "several images",
        "beginning of an image",
        "end of an image",
        "not the end of an image",
        "rows behind the last image",
        "rows of other requests",
    }
    for answered in found[1:3]:
        check_lags(behind_reference, folder, cases, answered)


def _sharing(token: int) -> Iterator[Case]:
    """A prompt with three images, the last behind a cut of 64 tokens, and the same with another end."""
    case = make_case(5, [(8, 12), (4, 20), (12, 14)], [9, 1, 2, 14], token, max_new_tokens=5)
    yield case
    yield with_another_end(case, random.Random(3))


@pytest.mark.parametrize("piece", [256, 64])
@pytest.mark.parametrize("mode", [0, 1])
def test_a_part_of_an_image_from_the_cache(
    loud: Checkpoints, tmp_path: Path, piece: int, mode: int
) -> None:
    folder, path = loud(), tmp_path / "rows.pt"
    first, again = _sharing(image_token(folder))
    features = features_of(folder, [first])
    settings = {"max_prefill_token_num": piece, "enable_prefix_caching": True, "async_": mode}
    faults = list(FAULTS) if (piece, mode) == (64, 1) else []
    runs = [{**settings, "broken": fault} for fault in ("", *faults)]
    found, _ = run(
        recorded_answers, folder, [first.to_json(), again.to_json()], runs, path,
        mode="numbers", timeout_s=280,
    )  # fmt: skip
    check(found[0], [expected(folder, case) for case in (first, again)])
    cached = found[0][1]["cached_tokens"]
    begin, end = first.spans[2]
    assert begin < cached < end, "a part of the last image is left"
    sound, *broken = torch.load(path)
    assert row_error(sound, features) < NOISE
    left = {(6, 7, token): 2 for token in range(cached - begin, end - begin)}
    assert given(sound) == tokens_of([first]) | Counter(left)
    for name, forwards in zip(faults, broken, strict=True):
        assert row_error(forwards, features) > FAULT, f"{name} is noticed"


@pytest.mark.parametrize("mode", [0, 1])
def test_images_come_while_another_request_is_answered(
    loud: Checkpoints, tmp_path: Path, mode: int
) -> None:
    """Each forward holds a piece of a prompt and one row of the request that decodes."""
    folder, path = loud(), tmp_path / "rows.pt"
    token = image_token(folder)
    first = make_case(1, [(4, 6)], [5, 7], token, max_new_tokens=150)
    others = [
        make_case(2, [(8, 12), (12, 14), (14, 14)], [9, 1, 3, 30], token, max_new_tokens=3),
        make_case(3, [(12, 16)], [30, 40], token, max_new_tokens=3),
    ]
    found = run(
        beside_an_answer, folder, first.to_json(), [case.to_json() for case in others],
        {"max_prefill_token_num": 64, "async_": mode}, path,
        mode="numbers", extra={**POISON, "HOST_RUNTIME_DELAY_US": "2000"},
    )  # fmt: skip
    check_lags(lags, folder, [first, *others], found)
    (forwards,) = torch.load(path)
    assert [forward["beside"] for forward in forwards] == [1] * len(forwards)
    assert sum(piece[-1] > 0 for forward in forwards for piece in forward["pieces"]) >= 2, "ends"
    assert given(forwards) == tokens_of(others)
    assert row_error(forwards, features_of(folder, others)) < NOISE


@pytest.mark.parametrize("mode", [0, 1])
def test_cancelled_between_set_up_and_forward(loud: Checkpoints, tmp_path: Path, mode: int) -> None:
    """It stays in the batch that is set up; the others get their own features, and it ends."""
    folder, path = loud(), tmp_path / "rows.pt"
    token = image_token(folder)
    doomed = make_case(4, [(6, 8)], [4, 5], token, max_new_tokens=100)
    others = [
        make_case(n, [(4, 4 + 2 * n), (8, 2 + 2 * n)], [n, 2, 6], token, max_new_tokens=5)
        for n in range(1, 5)
    ]
    found, order = run(
        cancelled_when_set_up, folder, doomed.to_json(), [case.to_json() for case in others],
        {"max_prefill_token_num": 128, "async_": mode}, path,
        mode="numbers", extra=POISON,
    )  # fmt: skip
    assert order == ["set up", "cancelled", *["forward"] * len(TAPS)]
    assert len(found.pop()["tokens"]) < 5
    check_lags(lags, folder, others, found)
    (forwards,) = torch.load(path)
    assert row_error(forwards, features_of(folder, [doomed, *others])) < NOISE
    assert given(forwards) >= tokens_of(others)
    own = tokens_of([doomed])
    (shared,) = (forward for forward in forwards if given([forward]) & own)
    assert given([shared]) > own, "others are in its batch"
