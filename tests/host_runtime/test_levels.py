"""The stock engine on the null runtime at its three levels: raw, pipeline, server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.host_runtime.runner import ChildFailed, run
from tests.host_runtime.server import serve

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]


async def _raw(checkpoint: str) -> dict[str, Any]:
    from tests.host_runtime import engines

    engine = engines.turbomind(checkpoint)
    answer = await engines.ask(engine, range(10, 40), max_new_tokens=3, ignore_eos=True)
    return vars(answer) | {"idle": await engines.idle(engine)}


def _pipeline(checkpoint: str) -> list[list[Any]]:
    from lmdeploy import GenerationConfig

    from tests.host_runtime import engines

    pipe = engines.pipeline(checkpoint)
    config = GenerationConfig(max_new_tokens=4, ignore_eos=True, do_sample=False)
    answers = pipe(["one", "another prompt"], gen_config=config)
    return [[one.token_ids, one.finish_reason, one.generate_token_len] for one in answers]


def test_a_raw_request_runs_through_the_stock_engine(text_checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    answer = run(_raw, text_checkpoint, trace=trace, extra={"HOST_RUNTIME_NULL_TOKEN": "9"})
    assert answer["tokens"] == [9, 9, 9]
    assert answer["status"] == "FINISH"
    assert answer["idle"]["active_seqs"] == 0
    launches = trace.read_text().splitlines()
    prefill = [
        line for line in launches if "embeddingLookupKernel" in line and "grid 30,1,1" in line
    ]
    assert len(prefill) == 1, "a prompt of 30 tokens is one forward of 30 rows"
    assert any("attention_kernel" in line and "DecodingCtaMap" in line for line in launches)


async def _perplexity(checkpoint: str) -> None:
    from tests.host_runtime import engines

    await engines.ask(engines.turbomind(checkpoint), range(10, 40), return_ppl=True)


def test_a_kernel_without_host_code_aborts_with_its_name(text_checkpoint: Path) -> None:
    with pytest.raises(ChildFailed, match=r"ended with -6(?s:.)*no host kernel for turbomind::\w+"):
        run(_perplexity, text_checkpoint, mode="numbers")


def test_the_pipeline_answers_several_prompts(text_checkpoint: Path) -> None:
    assert run(_pipeline, text_checkpoint) == [[[7] * 4, "length", 4]] * 2


def test_lmdeploy_serves_real_http(text_checkpoint: Path, tmp_path: Path) -> None:
    with serve(text_checkpoint, tmp_path) as server:
        status, body = server.call("/v1/models")
        assert status == 200
        name = json.loads(body)["data"][0]["id"]
        message = {"role": "user", "content": "hi"}
        question = {"model": name, "messages": [message], "max_tokens": 5, "ignore_eos": True}
        status, body = server.call("/v1/chat/completions", question)
        assert status == 200
        answer = json.loads(body)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 5
    assert server.process.poll() is not None
