"""Steps a to f: what is checked. Each takes the `Worker`, notes figures, and fails by raising."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks.gpu_kit import asking
from benchmarks.gpu_kit.context import read
from benchmarks.gpu_kit.plan import SESSIONS
from benchmarks.gpu_kit.worker import StepFailed, Worker
from service.types import FinishReason, GenerateRequest
from tests.host_runtime.parity import TIE, Expected, parting
from tests.service.engines.conformance import (
    answer,
    first_chunk,
    fits,
    random_image,
    request,
    until,
)
from tests.service.engines.conformance import mixed as mixed_requests

SAME_AS_TRUTH, SAME_AT_ONCE = 0.7, 0.85
"""Least shares of answers that are the very same tokens. Numbers of 16 bits, and kernels for batches of
another size, round differently: where two logits nearly tie, either is right."""
GUIDED_SAME = 0.95
PREFILL_OVERHEAD, DECODE_OVERHEAD = 0.05, 0.005
LEAK_BYTES, LEAK_PROCESS_BYTES = 64 << 20, 256 << 20


# ---- a, b, c: answers ----------------------------------------------------------------------------


async def load(worker: Worker) -> None:
    """Start the engine, which proves that grammars are obeyed, and ask it something."""
    engine = await worker.engine()
    details = engine.capabilities.details
    worker.check("DeepStack", details["deepstack"], "on", details["deepstack"] == "on")
    text, reason, usage = await answer(engine, request("Describe the image.", random_image(1)))
    worker.figures |= {"answer": text, "finish_reason": reason, "usage": usage}
    worker.check("tokens of an answer", usage.output_tokens, "> 0", usage.output_tokens > 0)


async def text(worker: Worker) -> None:
    """Greedy tokens of texts against the truth, one after the other and all at once."""
    sizes = worker.context.sizes
    await _against_truth(worker, asking.texts(sizes.texts, sizes.answer), "texts")


async def images(worker: Worker) -> None:
    """The same with images; DeepStack must have run in each forward with images."""
    from lmdeploy_ext.deepstack import state

    sizes, before = worker.context.sizes, state.forwards()
    await _against_truth(worker, asking.with_images(sizes.images, sizes.answer), "images")
    forwards = state.forwards() - before
    worker.check("forwards with DeepStack", forwards, "> 0", forwards > 0)


async def off(worker: Worker) -> None:
    """Without DeepStack: other tokens than with it, and those of the reference engine without it."""
    sizes = worker.context.sizes
    shown = asking.with_images(sizes.images, sizes.answer)
    found = await _against_truth(worker, shown, "images without DeepStack")
    with_it = _truth(worker)["images"]
    parted = [n for n, pair in enumerate(zip(found, with_it, strict=True)) if difference(*pair)]
    worker.figures["answers that differ from those with DeepStack"] = len(parted)
    worker.check(
        "answers that differ clearly from those with DeepStack", len(parted), "> 0", bool(parted)
    )


async def guided(worker: Worker) -> None:
    """AnalyzeImage at once: every answer fits the schema; nearly all are the reference engine's."""
    from service.tasks.image_analysis import parse, schema

    engine, sizes = await worker.engine(), worker.context.sizes
    requests = await asyncio.to_thread(asking.analyses, sizes.guided)
    begun = time.perf_counter()
    found = await asyncio.gather(*(answer(engine, one) for one in requests))
    worker.figures["seconds"] = round(time.perf_counter() - begun, 2)
    worker.figures["tokens"] = sum(usage.output_tokens for _, _, usage in found)
    validator = jsonschema.Draft202012Validator(schema())
    for number, (given, reason, _) in enumerate(found):
        wrong = {"request": number, "answer": given, "finish_reason": reason}
        if reason is not FinishReason.STOP:
            raise StepFailed(f"answer {number} of {len(found)} did not end", wrong)
        try:
            validator.validate(json.loads(given))
            parse(given)
        except Exception as error:
            raise StepFailed(f"answer {number} does not fit the schema: {error}", wrong) from error
    worker.check("answers that fit the schema", len(found), f"{sizes.guided}", True)
    texts = [given for given, _, _ in found]
    wanted = _truth(worker, "truth-guided")["guided"]
    _check_same(worker, "answers equal to the reference engine's", texts, wanted, GUIDED_SAME)


async def _against_truth(
    worker: Worker, requests: Sequence[GenerateRequest], name: str
) -> list[list[int]]:
    """Alone and at once: the tokens of the truth, or those up to a tie; most are the very same."""
    engine, wanted = await worker.engine(), _truth(worker)[name]
    alone = [(await asking.ask(engine, one)).tokens for one in requests]
    together = [
        one.tokens for one in await asyncio.gather(*(asking.ask(engine, o) for o in requests))
    ]
    for how, found in (("alone", alone), ("at once", together)):
        for number, (got, want) in enumerate(zip(found, wanted, strict=True)):
            wrong = difference(got, want)
            if wrong is not None:
                raise StepFailed(
                    f"{name}, {how}: request {number} of {len(found)}: {wrong}",
                    {"request": number, "how": how, "tokens": got, "wanted": want},
                )
        same = sum(got == want["tokens"] for got, want in zip(found, wanted, strict=True))
        worker.figures[f"{name}, {how}: the very same"] = f"{same} of {len(found)}"
        worker.check(
            f"{name}, {how}: the very same tokens", f"{same} of {len(found)}",
            f"at least {SAME_AS_TRUTH:.0%}", same >= SAME_AS_TRUTH * len(found),
        )  # fmt: skip
    return alone


def difference(got: Sequence[int], wanted: dict[str, Any], tie: float = TIE) -> str | None:
    """Where tokens part from the truth by more than rounding; None where they do not.

    wanted: tokens, and the lead of each over the second best, and that of the end behind them.
    """
    index = parting(got, Expected(wanted["tokens"], wanted["leads"]))
    if index is None or wanted["leads"][index] < tie:
        return None
    mine = got[index] if index < len(got) else "the end"
    theirs = wanted["tokens"][index] if index < len(wanted["tokens"]) else "the end"
    return (
        f"token {index} is {mine} instead of {theirs}, which leads by {wanted['leads'][index]:.3f}"
    )


def _check_same(
    worker: Worker, what: str, found: Sequence[Any], wanted: Sequence[Any], share: float
) -> None:
    """At least so many are equal; the first that is not is kept in any case."""
    pairs = enumerate(zip(found, wanted, strict=True))
    parted = [
        {"request": n, "found": one, "wanted": other} for n, (one, other) in pairs if one != other
    ]
    same = len(found) - len(parted)
    worker.figures[what] = f"{same} of {len(found)}"
    worker.figures[f"{what}: first that is not"] = parted[0] if parted else None
    worker.check(
        what, f"{same} of {len(found)}", f"at least {share:.0%}", same >= share * len(found),
        parted[0] if parted else None,
    )  # fmt: skip


def _truth(worker: Worker, name: str = "truth") -> dict[str, Any]:
    found = read(worker.context.made / f"{name}.json")
    assert found is not None
    return found


# ---- e: many requests ----------------------------------------------------------------------------


async def mixed(worker: Worker) -> None:
    """Requests of all kinds at once and alone, a prefix from the cache, prompts in chunks."""
    engine, sizes = await worker.engine(), worker.context.sizes
    await check_mixed(worker, engine, sizes.mixed)
    await check_prefix_cache(worker, engine, "word " * min(400, 60 * sizes.turns))
    await check_chunks(worker, engine, min(6, sizes.turns))


async def check_mixed(worker: Worker, engine: Any, count: int) -> None:
    """As many requests that differ in everything: at once as alone, within limits and grammars."""
    requests = mixed_requests(count)
    alone = [await answer(engine, one) for one in requests]
    together = list(await asyncio.gather(*(answer(engine, one) for one in requests)))
    _check_same(worker, "mixed requests at once as alone", together, alone, SAME_AT_ONCE)
    for number, (one, (given, reason, usage)) in enumerate(zip(requests, together, strict=True)):
        wrong = {"request": number, "answer": given, "finish_reason": reason}
        if usage.output_tokens > one.sampling.max_tokens:
            raise StepFailed(f"{usage.output_tokens} tokens of {one.sampling.max_tokens}", wrong)
        if one.grammar is not None and reason is FinishReason.STOP and not fits(one.grammar, given):
            raise StepFailed(f"answer {number} does not fit its grammar", wrong)
    worker.check(
        "requests left in the engine", engine.active_requests, "0", engine.active_requests == 0
    )


async def check_prefix_cache(worker: Worker, engine: Any, words: str) -> None:
    """The same prompt again gives the same answer, with a part from the cache; another image does not
    take that image's part."""
    native = engine._ready().host.native
    one = request(words, random_image(3, 256, 256), max_tokens=4)
    first = await answer(engine, one)
    before = native.get_schedule_metrics().prefix_cache_hit_rate
    again = await answer(engine, one)
    after = native.get_schedule_metrics().prefix_cache_hit_rate
    worker.check("an answer from the prefix cache", again[0], first[0], again == first)
    worker.check("hit rate of the prefix cache", after, f"> {before}", after > before)
    other = await answer(engine, request(words, random_image(4, 256, 256), max_tokens=4))
    worker.check("tokens of a prompt with another image", other[2].prompt_tokens,
                 f"{first[2].prompt_tokens}", other[2].prompt_tokens == first[2].prompt_tokens)  # fmt: skip


async def check_chunks(worker: Worker, engine: Any, count: int) -> None:
    """Prompts longer than a prefill chunk, with images on both sides of the cuts: at once as alone."""
    requests = [
        request(
            "word " * 300, random_image(n, 224, 224), random_image(n + 1, 160, 96), max_tokens=16
        )
        for n in range(count)
    ]
    alone = [(await asking.ask(engine, one)).tokens for one in requests]
    together = [
        one.tokens for one in await asyncio.gather(*(asking.ask(engine, o) for o in requests))
    ]
    _check_same(worker, "prompts in chunks, at once as alone", together, alone, 0.5)


async def cancel(worker: Worker) -> None:
    """Requests that are closed after their first token leave nothing, and disturb nothing."""
    engine, sizes = await worker.engine(), worker.context.sizes
    await check_cancellations(worker, engine, sizes.cancels, 20)


async def check_cancellations(worker: Worker, engine: Any, count: int, at_once: int) -> None:
    """So many cancellations, some at once."""
    native, took = engine._ready().host.native, []
    sane = request("word number 1?", max_tokens=24)
    expected = await answer(engine, sane)

    async def cancelled(number: int) -> None:
        one = request("word " * 50, random_image(number % 5), max_tokens=800)
        chunks = await first_chunk(engine, one)
        begun = time.monotonic()
        await chunks.aclose()
        took.append(time.monotonic() - begun)

    for begin in range(0, count, at_once):
        await asyncio.gather(*(cancelled(n) for n in range(begin, min(begin + at_once, count))))

    def idle() -> bool:
        metrics = native.get_schedule_metrics()
        return int(metrics.active_seqs + metrics.waiting_seqs) == 0

    await until(idle)
    worker.check(
        "requests left in the engine", engine.active_requests, "0", engine.active_requests == 0
    )
    again = await answer(engine, sane)
    worker.check(
        "the answer to another request afterwards", again[0], expected[0], again == expected
    )
    slow = sorted(took)[len(took) * 9 // 10]
    worker.check(
        "90 % of cancellations within", f"{slow:.3f} s", "< 0.25 s", slow < 0.25, speed=True
    )


async def memory(worker: Worker) -> None:
    """Memory of the GPU and of the process after many requests."""
    engine, sizes = await worker.engine(), worker.context.sizes
    await check_memory(worker, engine, sizes.warm_requests, sizes.leak_requests)


async def check_memory(worker: Worker, engine: Any, warm: int, count: int) -> None:
    """Requests with images, after as many that fill caches of every kind."""
    import psutil
    import torch

    process = psutil.Process()

    async def some(first: int, number: int) -> tuple[int, int]:
        for begin in range(first, first + number, 25):
            numbers = range(begin, min(begin + 25, first + number))
            ones = (
                request("What?", random_image(n, 64 + n % 200, 96), max_tokens=4) for n in numbers
            )
            await asyncio.gather(*(answer(engine, one) for one in ones))
        return torch.cuda.mem_get_info()[0], process.memory_info().rss

    free, resident = await some(0, warm)
    free_after, resident_after = await some(warm, count)
    for what, grown, most in (
        ("GPU", free - free_after, LEAK_BYTES),
        ("process", resident_after - resident, LEAK_PROCESS_BYTES),
    ):
        worker.check(f"{count} requests, memory of the {what}", f"{grown >> 20} MiB more",
                     f"< {most >> 20} MiB", grown < most)  # fmt: skip
    worker.check(
        "requests left in the engine", engine.active_requests, "0", engine.active_requests == 0
    )


# ---- d: DeepStack --------------------------------------------------------------------------------


async def selftest(worker: Worker) -> None:
    """The test of the first start, which the other sessions leave out."""
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import selftest as test

    lmdeploy_ext.install("require")
    begun = time.monotonic()
    problem = await asyncio.to_thread(test.run)
    worker.figures["seconds of the self-test"] = round(time.monotonic() - begun, 1)
    worker.check("the self-test", problem or "passes", "passes", problem is None)


async def overhead(worker: Worker) -> None:
    """Prefill with images and decode steps, hooked and not, in turns on one engine."""
    engine, sizes = await worker.engine(), worker.context.sizes
    slots = _hook().bound()
    worker.check("calls of TurboMind that lead to the hook", slots, "> 0", slots > 0)
    worker.figures["text tokens"] = [
        (await asking.ask(engine, one)).tokens for one in asking.texts(4, sizes.answer)
    ]
    await check_overhead(worker, engine, sizes.turns)


async def check_overhead(worker: Worker, engine: Any, turns: int) -> None:
    """So many rounds of both ways; the order alternates."""
    sizes = worker.context.sizes
    side = sizes.prefill_side
    found: dict[tuple[str, bool], list[float]] = {
        (what, on): [] for what in ("prefill", "decode") for on in (True, False)
    }
    numbers = iter(range(10_000, 1 << 30))

    async def round_of(on: bool, counted: bool) -> None:
        with _hooked(on):
            shown = [random_image(next(numbers), side, side) for _ in range(4)]
            took = {
                "prefill": await _took(engine, request("What?", *shown, max_tokens=1)),
                "decode": await _took(
                    engine,
                    request("What?", random_image(next(numbers), 64, 64), max_tokens=sizes.decode),
                ),
            }
        if counted:
            found["prefill", on].append(took["prefill"].first_s)
            steps = max(1, len(took["decode"].tokens) - 1)
            found["decode", on].append((took["decode"].total_s - took["decode"].first_s) / steps)

    for turn in range(-2, turns):  # the first two warm up
        for on in (True, False) if turn % 2 else (False, True):
            await round_of(on, turn >= 0)
    for what, most in (("prefill", PREFILL_OVERHEAD), ("decode", DECODE_OVERHEAD)):
        hooked, plain = (statistics.median(found[what, on]) for on in (True, False))
        worker.figures[f"{what}, ms"] = {
            "hooked": [round(1e3 * one, 4) for one in found[what, True]],
            "not hooked": [round(1e3 * one, 4) for one in found[what, False]],
        }
        ratio = hooked / plain - 1
        worker.check(f"overhead of DeepStack, {what}", f"{100 * ratio:.2f} %",
                     f"<= {100 * most:g} %", ratio <= most, speed=True)  # fmt: skip


async def _took(engine: Any, one: GenerateRequest) -> asking.Answer:
    """One request alone, packed before the clock runs."""
    return await asking.ask(engine, one, await asking.packed(engine, one))


class _hooked:
    """Within it, TurboMind's calls lead to the hook or not. Only while no request runs."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def __enter__(self) -> None:
        if not self._on:
            _hook().detach()

    def __exit__(self, *_: object) -> None:
        from lmdeploy import turbomind

        problem = _hook().attach(turbomind._tm.__file__)
        if problem is not None:
            raise StepFailed(f"the hook cannot be attached again: {problem}")


def _hook() -> Any:
    from lmdeploy_ext.deepstack.binding import hook

    return hook()


# ---- f: without vision ---------------------------------------------------------------------------


async def no_vision(worker: Worker) -> None:
    """Memory and text answers of the same checkpoint without its tower."""
    engine, sizes = await worker.engine(), worker.context.sizes
    mine = [(await asking.ask(engine, one)).tokens for one in asking.texts(4, sizes.answer)]
    other = worker.context.figures("overhead")
    if not other.get("engine"):
        raise StepFailed("there is nothing to compare with: the step `overhead` has no result")
    # The cache takes its share of what the weights leave free, so the rest shrinks with it.
    share = sizes.options.get("cache_share", SESSIONS[worker.session].options["cache_share"])
    kept = other["engine"]["gpu_bytes"] - worker.figures["engine"]["gpu_bytes"]
    freed = kept / (1 - share)
    tower = _tower_bytes(worker.context.model("2B"))
    worker.figures |= {
        "bytes of the vision tower": tower,
        "bytes that the weights take less": round(freed),
        "bytes that keys and values gain": round(share * freed),
    }
    worker.check("memory gained, of the tower's", f"{freed / tower:.0%}", "> 50%",
                 freed > 0.5 * tower, speed=True)  # fmt: skip
    _check_same(worker, "text answers as with vision", mine, other["text tokens"], 0.75)


def _tower_bytes(folder: Path) -> int:
    """What the weights of the vision tower take in a checkpoint of one file."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    places = [one["data_offsets"] for name, one in header.items() if ".visual." in name]
    return sum(end - begin for begin, end in places)
