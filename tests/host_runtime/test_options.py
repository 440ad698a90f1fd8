"""The stock engine follows transformers also under options: stop tokens, a repetition penalty, schemas,
the parts of an image that the prefix cache has, no vision, and cancelled neighbours."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.host_runtime.answers import among_cancelled, answers
from tests.host_runtime.cases import Case, expected, make_case
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.oracle import clear, expected_under_options
from tests.host_runtime.parity import check
from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]

Checkpoints = Callable[..., Path]
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"vision_head": 64},
    "experts": {"moe": True, "tied": False},
}
POISON = {"HOST_RUNTIME_POISON": "1"}
ANSWER = {
    "type": "object",
    "properties": {
        "scene": {"enum": ["indoor", "outdoor"]},
        "parts": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "shape": {"enum": ["circle", "square", "star"]},
                    "marks": {
                        "type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2
                    },
                },
                "required": ["shape", "marks"],
                "additionalProperties": False,
            },
            "minItems": 1,
            "maxItems": 2,
        },
        "sure": {"type": "object", "properties": {"yes": {"type": "boolean"}},
                 "required": ["yes"], "additionalProperties": False},
    },
    "required": ["scene", "parts", "sure"],
    "additionalProperties": False,
}  # fmt: skip
PLACE = {"anyOf": [{"type": "null"}, {"type": "array", "items": {"enum": ["left", "right"]},
                                      "minItems": 2, "maxItems": 2}]}  # fmt: skip
SCHEMAS = [ANSWER, {"type": "array", "items": ANSWER, "minItems": 1, "maxItems": 1}, PLACE]


@pytest.fixture(params=SHAPES)
def folder(request: pytest.FixtureRequest, vision_checkpoint: Checkpoints) -> Path:
    return vision_checkpoint(**SHAPES[request.param])


def plain_cases(token: int, count: int, seed: int, length: int) -> list[Case]:
    """Requests with none to two images."""
    source = random.Random(seed)
    sides = [4, 6, 8, 10]
    return [
        make_case(
            seed + number,
            [(source.choice(sides), source.choice(sides)) for _ in range(number % 3)],
            [source.randrange(2, 20) for _ in range(number % 3 + 1)],
            token,
            max_new_tokens=length,
        )
        for number in range(count)
    ]


def stopped(folder: Path) -> Iterator[Case]:
    """Requests that end at a token of their own answer, and one that never comes."""
    for number, case in enumerate(plain_cases(image_token(folder), 8, 200, 8)):
        greedy = expected(folder, case).tokens
        yield replace(
            case, options={"ignore_eos": False, "stop_token_ids": [greedy[number % 6], 1]}
        )


def penalised(folder: Path) -> Iterator[Case]:
    for number, case in enumerate(plain_cases(image_token(folder), 8, 300, 16)):
        yield replace(case, options={"repetition_penalty": (1.2, 1.8, 4.0)[number % 3]})


def guided(folder: Path) -> Iterator[Case]:
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    for number, case in enumerate(plain_cases(image_token(folder), 8, 400, 120)):
        schema = SCHEMAS[number % len(SCHEMAS)]
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        options = {"ignore_eos": False, "stop_token_ids": [end], "response_format": form}
        yield replace(case, options=options)


RUNS: list[dict[str, Any]] = [
    {"together": True, "max_batch_size": 16},
    {"together": True, "async_": 0, "shuffle": 1, "max_prefill_token_num": 64},
]


def test_stops_penalties_and_schemas_side_by_side(folder: Path) -> None:
    """All kinds in one batch, so that a request with the options of another would show."""
    kinds = [list(stopped(folder)), list(penalised(folder)), list(guided(folder))]
    cases = [case for mixed in zip(*kinds, strict=True) for case in mixed]
    wanted = [expected_under_options(folder, case) for case in cases]
    found = run(
        answers, folder, [case.to_json() for case in cases], RUNS, mode="numbers", extra=POISON
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for answered in found:
        check(answered, wanted)
        assert any(len(answer["tokens"]) < 8 for answer in answered[::3]), "some stop early"
        for answer, case in zip(answered[1::3], cases[1::3], strict=True):
            if case.options["repetition_penalty"] == 4:
                assert len(set(answer["tokens"])) == 16
        for answer in answered[2::3]:
            json.loads(tokenizer.decode(answer["tokens"], skip_special_tokens=True))


def sharing(token: int) -> tuple[list[Case], list[int], set[str]]:
    """Pairs of requests that begin alike, what each finds in the prefix cache, and which part of
    the image that is. The cache has blocks of 64 tokens."""
    cases, cached, kinds = [], [], set()
    for number, before in enumerate((70, 60, 45, 30, 10, 100)):
        first = make_case(number, [(8, 12), (4, 6)], [before, 3, 12], token, max_new_tokens=5)
        other = make_case(number + 50, [], [12], token).tokens
        changed = replace(first, tokens=first.tokens[: first.spans[1][1]] + other)
        cases += [first, changed]
        begin, end = first.spans[0]
        hit = first.spans[1][1] // 64 * 64
        kinds.add("none" if hit <= begin else "whole" if end <= hit else "part")
        cached += [0, hit]
    # The same words around other pixels share what stands before the image.
    cases.append(replace(cases[0], seed=99))
    cached.append(64)
    return cases, cached, kinds


def test_no_some_and_all_tokens_of_an_image_from_the_prefix_cache(folder: Path) -> None:
    cases, cached, kinds = sharing(image_token(folder))
    assert kinds == {"none", "part", "whole"}
    wanted = [expected(folder, case) for case in cases]
    common = {"enable_prefix_caching": True}
    runs = [common, {**common, "async_": 0}, {**common, "max_prefill_token_num": 64}]
    found = run(
        answers, folder, [case.to_json() for case in cases], runs, mode="numbers", extra=POISON
    )
    for answered in found:
        check(answered, wanted)
        assert [answer["cached_tokens"] for answer in answered] == cached


def test_text_without_vision(folder: Path) -> None:
    prompts = (make_case(n, [], [5 + 7 * n], 0, max_new_tokens=5) for n in range(60))
    cases = clear(folder, prompts, 8)
    wanted = [expected(folder, case) for case in cases]
    common = {"language_model_only": True, "together": True}
    runs = [common, {**common, "async_": 0, "max_prefill_token_num": 64}]
    for answered in run(answers, folder, [case.to_json() for case in cases], runs, mode="numbers"):
        check(answered, wanted)


def phases(found: Sequence[dict[str, Any]]) -> set[str]:
    return {phase for one in found for phase in one["phases"]}


def test_requests_next_to_cancelled_requests_are_unaffected(folder: Path) -> None:
    """Others go: before they are sent, in the queue or while they are prefilled, in the middle of
    their answer. Two run at a time, so that most wait."""
    cases = clear(folder, plain_cases(image_token(folder), 40, 500, 6), 8)
    wanted = [expected(folder, case) for case in cases]
    common = {"max_prefill_token_num": 64, "max_batch_size": 2, "enable_prefix_caching": True}
    runs = [common, {**common, "async_": 0}]
    found = run(
        among_cancelled, folder, [case.to_json() for case in cases], runs,
        mode="numbers", extra={**POISON, "HOST_RUNTIME_DELAY_US": "3000"},
    )  # fmt: skip
    for one in found:
        check(one["answers"], wanted)
    assert phases(found) == {"not sent", "no token yet", "answering"}
