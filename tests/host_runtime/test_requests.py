"""Whole requests through the real scheduler: pieces, the prefix cache, cancellation, load, refusals, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.host_runtime.cases import Case, make_case
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]

SLOW = {"HOST_RUNTIME_DELAY_US": "5000"}
"""A token takes 5 ms, so that a test can act before the next one."""


async def _pieces(checkpoint: str, prompt: dict[str, Any]) -> dict[str, Any]:
    import lmdeploy_ext

    lmdeploy_ext.install()
    from tests.host_runtime import engines

    case = Case.from_json(prompt)
    engine = engines.turbomind(checkpoint, max_prefill_token_num=64, enable_prefix_caching=True)
    first = await engines.ask(engine, case.tokens, images=case.images())
    again = await engines.ask(engine, case.tokens, images=case.images())
    return {"first": vars(first), "again": vars(again)}


def launches(trace: Path, kernel: str) -> list[int]:
    """First grid dimension of each launch of a kernel after the engine's warm-up."""
    lines = [line for line in trace.read_text().splitlines() if kernel in line]
    return [int(line.split(" grid ")[1].split(",")[0]) for line in lines]


def test_a_long_prompt_is_prefilled_in_chunks_and_images_are_encoded_in_theirs(
    vision_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = vision_checkpoint(vision_head=64)
    # 20 words, an image of 100 tokens, 40 words, an image of 9 tokens, 31 words: 200 tokens
    case = make_case(1, [(20, 20), (6, 6)], [20, 40, 31], image_token(folder))
    assert len(case.tokens) == 200
    trace = tmp_path / "trace"
    answer = run(_pieces, folder, prompt=case.to_json(), trace=trace)
    assert answer["first"]["tokens"] == [7] * 8
    assert answer["first"]["cached_tokens"] == 0
    assert answer["again"]["cached_tokens"] == 192
    rows = launches(trace, "embeddingLookupKernel<unsigned short")
    last_piece = len(rows) - 1 - rows[::-1].index(8)
    decoding = rows[last_piece + 1 :]
    assert decoding in ([1] * 7, [1] * 8), "eight tokens; the engine may be a step ahead"
    prefills = [count for count in rows if count in (64, 8)]
    assert prefills[-1:] == [8], "the second time, what is behind the last cached block"
    encoded = launches(trace, "fusedPosEmbedMergeKernel")
    assert encoded == [400, 400, 36], "an image for each piece that it lies in, none when cached"


async def _cancel(checkpoint: str, prompt: dict[str, Any]) -> dict[str, Any]:
    import asyncio
    import time

    import lmdeploy_ext

    lmdeploy_ext.install()
    from tests.host_runtime import engines

    case = Case.from_json(prompt)
    engine = engines.turbomind(checkpoint, max_prefill_token_num=64, max_batch_size=4)
    ask = {"images": case.images(), "max_new_tokens": 200, "ignore_eos": True}

    async def cancelled_after(delay_s: float) -> None:
        task = asyncio.create_task(engines.ask(engine, case.tokens, **ask))
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await engines.ask(engine, case.tokens, images=case.images())
    used = (await engines.idle(engine))["cache_usage"]
    took = []
    for delay_s in (0.0, 0.001, 0.005, 0.02, 0.1):
        begin = time.monotonic()
        await cancelled_after(delay_s)
        await engines.idle(engine)
        took.append(time.monotonic() - begin - delay_s)
    await asyncio.gather(*(cancelled_after(0.003 * index) for index in range(40)))
    closed = await engines.ask(engine, case.tokens, stop_after=2, **ask)
    after = await engines.idle(engine)
    last = await engines.ask(engine, case.tokens, images=case.images())
    return {"took_s": took, "closed": closed.chunks, "used": used, "after": after["cache_usage"],
            "last": vars(last)}  # fmt: skip


def test_cancelled_requests_leave_nothing_behind(vision_checkpoint: Callable[..., Path]) -> None:
    folder = vision_checkpoint(vision_head=64)
    case = make_case(2, [(20, 20), (6, 6)], [20, 40, 31], image_token(folder))
    answer = run(_cancel, folder, prompt=case.to_json(), extra=SLOW)
    took_s = sorted(answer["took_s"])
    assert took_s[1] < 1.0, (
        "200 tokens of 5 ms would take a second"
    )  # others may meet a busy machine
    assert answer["closed"] == 2
    # The gauge is that of the engine's last step, which may or may not hold the blocks of the last
    # request still; what 45 cancelled requests of four blocks and more kept would be above both.
    assert answer["after"] <= answer["used"], "memory of the cache is free again"
    assert answer["last"]["tokens"] == [7] * 8
    assert answer["last"]["status"] == "FINISH"


async def _load(checkpoint: str, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    import asyncio

    import lmdeploy_ext

    lmdeploy_ext.install()
    from tests.host_runtime import engines

    engine = engines.turbomind(checkpoint, max_batch_size=8, max_prefill_token_num=128)
    cases = [Case.from_json(prompt) for prompt in prompts]
    busiest = 0

    async def watch() -> None:
        nonlocal busiest
        while True:
            busiest = max(busiest, engine.get_schedule_metrics().active_seqs)
            await asyncio.sleep(0.002)

    watcher = asyncio.create_task(watch())
    answers = await asyncio.gather(
        *(
            engines.ask(
                engine, case.tokens, images=case.images(), ignore_eos=True,
                max_new_tokens=case.max_new_tokens,
            )
            for case in cases
        )
    )  # fmt: skip
    watcher.cancel()
    return {"lengths": [len(one.tokens) for one in answers], "busiest": busiest,
            "statuses": sorted({one.status for one in answers})}  # fmt: skip


def test_64_requests_at_once_all_end(vision_checkpoint: Callable[..., Path]) -> None:
    folder = vision_checkpoint(vision_head=64)
    token = image_token(folder)
    cases = [
        make_case(seed, [(4 + 2 * (seed % 5), 8)] * (seed % 3), [4] * (seed % 3 + 1), token,
                  max_new_tokens=1 + seed % 17)
        for seed in range(64)
    ]  # fmt: skip
    answer = run(_load, folder, prompts=[case.to_json() for case in cases], extra=SLOW)
    assert answer["lengths"] == [case.max_new_tokens for case in cases]
    assert answer["statuses"] == ["FINISH"]
    assert 2 <= answer["busiest"] <= 8


async def _refusals(checkpoint: str, image: int) -> dict[str, Any]:
    import lmdeploy_ext

    lmdeploy_ext.install()
    from tests.host_runtime import engines

    engine = engines.turbomind(checkpoint)
    found: dict[str, Any] = {}
    found["too long"] = (await engines.ask(engine, [20] * 600)).status
    case = make_case(3, [(8, 8)], [3, 3], image)
    for name, change in {
        "span too short": {"offset": (3, 18)},
        "grid of other patches": {"image_grid_thw": case.images()[0]["image_grid_thw"] * 2},
    }.items():
        item = case.images()[0] | change
        try:
            answer = await engines.ask(engine, case.tokens, images=[item])
            found[name] = answer.status
        except ValueError as error:
            found[name] = str(error)
    await engines.idle(engine)
    found["then"] = (await engines.ask(engine, case.tokens, images=case.images())).status
    return found


def test_requests_that_do_not_fit_are_refused_and_the_engine_continues(
    vision_checkpoint: Callable[..., Path],
) -> None:
    folder = vision_checkpoint(vision_head=64)
    found = run(_refusals, folder, image=image_token(folder))
    assert found.pop("then") == "FINISH"
    assert found.pop("too long") == "INPUT_LENGTH_ERROR"
    assert "needs 16" in found.pop("span too short")
    assert "do not fit grid" in found.pop("grid of other patches")
    assert not found


async def _free_memory(checkpoint: str, language_only: bool) -> int:
    """Device memory in bytes that the engine leaves, once its cache has taken half of what it found."""
    import ctypes

    import lmdeploy_ext

    lmdeploy_ext.install()
    from tests.host_runtime import engines

    engine = engines.turbomind(
        checkpoint, language_model_only=language_only, cache_max_entry_count=0.5
    )
    await engines.ask(engine, range(20, 50))
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    runtime = ctypes.CDLL("libcudart.so.12")
    assert runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


def test_without_vision_the_kv_cache_gets_the_memory_of_the_tower(
    vision_checkpoint: Callable[..., Path],
) -> None:
    folder = vision_checkpoint(vision_head=64)
    weights = load_file(folder / "model.safetensors")
    tower = sum(
        weight.nbytes for name, weight in weights.items()
        if name.startswith("model.visual.") and "deepstack" not in name
    )  # fmt: skip
    gained = run(_free_memory, folder, language_only=True) - run(
        _free_memory, folder, language_only=False
    )
    assert gained >= tower / 2, "the other half is the cache's"
