"""The stock engine computes what transformers computes: text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host_runtime.answers import answers
from tests.host_runtime.cases import Case, expected, make_case
from tests.host_runtime.checkpoints import write_text_checkpoint
from tests.host_runtime.parity import check, difference
from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]

LENGTHS = [1, 2, 5, 16, 17, 31, 63, 64, 65, 100, 128, 129, 191, 200, 255, 300]
CASES = [make_case(seed, [], [length], 0) for seed, length in enumerate(LENGTHS)]
RUNS: list[dict[str, Any]] = [
    {},
    {"together": True, "async_": 0},
    {"together": True, "max_prefill_token_num": 64, "shuffle": 1},
    {"enable_prefix_caching": True, "rounds": 2},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_text_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    wanted = [expected(folder, case, vision=False) for case in CASES]
    runs = [{**one, "dtype": str(dtype)[6:]} for one in RUNS]
    found = run(
        answers, folder, [case.to_json() for case in CASES], runs,
        mode="numbers", extra={"HOST_RUNTIME_POISON": "1"},
    )  # fmt: skip
    for answered in found:
        check(answered, wanted)
    cached = [answer["cached_tokens"] for answer in found[-1]]
    wanted_cached = [min(length // 64 * 64, length - 1) for length in LENGTHS]
    assert cached == wanted_cached, "blocks of 64 tokens, and the last token is always computed"


def _options(checkpoint: str) -> dict[str, Any]:
    import asyncio

    from tests.host_runtime import engines

    async def ask_all() -> dict[str, Any]:
        engine = engines.turbomind(checkpoint)
        prompt = list(range(20, 60))

        async def ask(**options: Any) -> list[int]:
            answer = await engines.ask(engine, prompt, **{"max_new_tokens": 12, **options})
            assert answer.status == "FINISH"
            return answer.tokens

        free = {"ignore_eos": True, "do_sample": True}
        greedy = await ask(ignore_eos=True)
        drawn = {"top_k": 20, "top_p": 0.9, "temperature": 1.5, **free}
        schema = {
            "type": "object",
            "properties": {
                "shape": {"enum": ["circle", "square"]},
                "inner": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
            },
            "required": ["shape", "inner"],
            "additionalProperties": False,
        }  # fmt: skip
        end = [engine.tokenizer.eos_token_id]
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        guided = await ask(response_format=form, max_new_tokens=80, stop_token_ids=end)
        return {
            "greedy": greedy,
            "stop": await ask(stop_token_ids=[greedy[4]]),
            "late stop": await ask(stop_token_ids=[greedy[1]], min_new_tokens=6),
            "banned": await ask(bad_token_ids=[greedy[0]], ignore_eos=True),
            "unrepeated": await ask(repetition_penalty=50.0, top_k=1, max_new_tokens=40, **free),
            "drawn": [await ask(random_seed=seed, **drawn) for seed in (1, 1, 2, 3)],
            "nucleus": await ask(top_k=0, top_p=0.001, **free),
            "certain": await ask(top_k=0, top_p=1.0, min_p=0.999, **free),
            "guided": engine.tokenizer.decode(guided),
        }

    return asyncio.run(ask_all())


def test_sampling_options_have_their_documented_effect(text_checkpoint: Path) -> None:
    found = run(_options, text_checkpoint, mode="numbers")
    greedy = found["greedy"]
    want = expected(text_checkpoint, Case(list(range(20, 60)), max_new_tokens=12), vision=False)
    assert difference(greedy, want) is None
    first = greedy.index(greedy[4])
    assert found["stop"] == greedy[: first + 1]
    assert len(found["late stop"]) >= 6
    assert greedy[1] not in found["late stop"][:5]
    assert greedy[0] not in found["banned"]
    assert len(set(found["unrepeated"])) == 40, "with such a penalty no token comes twice"
    one, again, two, three = found["drawn"]
    assert one == again
    assert one != two != three
    assert found["nucleus"] == greedy
    assert found["certain"] == greedy
    assert set(json.loads(found["guided"])) == {"shape", "inner"}
