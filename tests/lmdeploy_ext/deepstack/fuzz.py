"""Random requests through stock TurboMind with DeepStack, every token checked against transformers.

``python -m tests.lmdeploy_ext.deepstack.fuzz --requests 2000 --seed 1`` from the repository root; `test_fuzz`
runs a part. An engine with random settings gets a round of requests that arrive in bursts: 0 to 4 images of random
sizes, video frames, beginnings of earlier prompts, the same prompt with other pixels, some cancelled at any time.

transformers reads each prompt with the engine's own answer behind it, in float32, once. So what follows a near tie is
checked as well: a token is right when it is the best, or closer to the best than `parity.TIE`.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.host_runtime.cases import Case, _model
from tests.host_runtime.checkpoints import image_token
from tests.host_runtime.parity import TIE
from tests.host_runtime.runner import run
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape
from tests.lmdeploy_ext.deepstack.checkpoints import write_loud_checkpoint
from tests.lmdeploy_ext.deepstack.fuzz_child import Asked, answered

SHAPES = {
    "head64": EngineShape(),
    "head72": EngineShape(vision_head=72, tied=False),
    "experts": EngineShape(moe=True, tied=False),
}
ROUND, ENGINES = 50, 4
"""Requests of one engine, and engines of one process, one after the other."""
TIMEOUT_S = 280
LONGEST = 480
"""Tokens of a prompt; the engine holds 512 with the answer."""
SIDES = range(2, 21, 2)


@dataclass
class Result:
    """What a run found.

    Attributes:
        kinds: how many requests had what; see `kinds_of`, and the kinds of batches of `watching`.
        problems: wrong answers, in words.
        ties: tokens that are not the best, by less than the rounding of 16-bit numbers.
    """

    requests: int = 0
    tokens: int = 0
    ties: int = 0
    cancelled: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


# ---- requests -----------------------------------------------------------------------------------


def settings(source: random.Random) -> dict[str, Any]:
    """Random settings of an engine.

    Memory is never short: stock TurboMind was seen to wait for it for ever, with no request running.
    """
    return {
        "max_prefill_token_num": source.choice([64, 96, 128, 256]),
        "enable_prefix_caching": source.random() < 0.7,
        "async_": source.randrange(2),
        "max_batch_size": source.choice([1, 2, 4, 8, 8]),
    }


def requests(source: random.Random, count: int, token: int) -> list[Asked]:
    """Random requests of one engine, in bursts."""
    asked: list[Asked] = []
    at_s = 0.0
    while len(asked) < count:
        at_s += source.choice([0.0, 0.1, 0.4])
        for _ in range(min(source.randrange(1, 13), count - len(asked))):
            earlier = [one.case for one in asked]
            case = _again(source, earlier, token) if earlier and source.random() < 0.4 else None
            case = case or _new(source, token)
            cancel_s = source.random() * 0.5 if source.random() < 0.15 else None
            asked.append(Asked(case, at_s + source.random() * 0.1, cancel_s))
    return asked


def _new(source: random.Random, token: int) -> Case:
    images = source.choice([0, 0, 1, 1, 1, 2, 2, 3, 4])
    case = Case([], max_new_tokens=source.randrange(1, 8), video=source.random() < 0.2)
    for number in range(images):
        first = number == 0 and source.random() < 0.3
        # transformers would take neighbours for one image.
        case = _longer(source, case, token, words=0 if first else source.randrange(1, 15))
    tail = source.choice([source.randrange(1, 12), source.randrange(1, 150)])
    return replace(
        case, tokens=[*case.tokens, *_words(source, min(tail, LONGEST - len(case.tokens)))]
    )


def _longer(source: random.Random, case: Case, token: int, words: int) -> Case:
    """With some words and an image behind, where there is room."""
    height, width = source.choice(SIDES), source.choice(SIDES)
    size = height * width // 4
    if len(case.tokens) + words + size >= LONGEST:
        return case
    tokens = [*case.tokens, *_words(source, words)]
    begin = len(tokens)
    return replace(
        case,
        tokens=[*tokens, *[token] * size],
        spans=[*case.spans, (begin, begin + size)],
        grids=[*case.grids, (1, height, width)],
        image_seeds=[*case.image_seeds, source.randrange(1 << 30)],
    )


def _again(source: random.Random, earlier: Sequence[Case], token: int) -> Case | None:
    """A prompt that begins as an earlier one did, or that differs from it in an image alone."""
    case = source.choice(earlier)
    how = source.random()
    if how < 0.2:
        return replace(case, max_new_tokens=source.randrange(1, 8))
    if how < 0.4 and case.grids:
        seeds = list(case.image_seeds)
        seeds[source.randrange(len(seeds))] = source.randrange(1 << 30)
        return replace(case, image_seeds=seeds)
    cut = source.randrange(1, len(case.tokens) + 1)
    for begin, end in case.spans:
        if begin < cut < end:  # a prompt has whole images
            cut = end
    kept = sum(end <= cut for _, end in case.spans)
    case = replace(
        case, tokens=case.tokens[:cut], spans=case.spans[:kept], grids=case.grids[:kept],
        image_seeds=case.image_seeds[:kept],
    )  # fmt: skip
    if source.random() < 0.4:
        case = _longer(source, case, token, words=source.randrange(1, 9))
    room = LONGEST - len(case.tokens)
    if room < 1:
        return None
    return replace(
        case, tokens=[*case.tokens, *_words(source, source.randrange(1, min(room, 40) + 1))]
    )


def _words(source: random.Random, count: int) -> list[int]:
    return [source.randrange(10, 300) for _ in range(count)]


# ---- the reference ------------------------------------------------------------------------------


@torch.inference_mode()
def lags(folder: Path, case: Case, answer: Sequence[int]) -> list[float]:
    """How far the logit of each token of an answer is behind the best one; 0 for the best.

    Ends with an image token, which transformers cannot have in an answer.
    """
    model = _model(folder, True)
    image = model.config.image_token_id
    if image in answer:
        answer = answer[: answer.index(image) + 1]
    ids = torch.tensor([[*case.tokens, *answer[:-1]]])
    values: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case.grids:
        values["pixel_values"] = torch.cat(case.pixels()).float()
        values["image_grid_thw"] = torch.tensor(case.grids)
        values["mm_token_type_ids"] = (ids == image).int()
    logits = model(**values, logits_to_keep=len(answer)).logits[0].float()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return [float(lag) for lag in logits.amax(dim=1) - chosen]


def problem(
    case: Case, answer: dict[str, Any], behind: Sequence[float], cancelled: bool
) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    tokens = answer["tokens"]
    for index, lag in enumerate(behind):
        if lag >= TIE:
            return f"token {index} of {tokens} is {lag:.3f} behind the best"
    if cancelled:
        return None
    if answer["status"] != "FINISH" or len(tokens) != case.max_new_tokens:
        return f"{answer['status']} with {len(tokens)} tokens instead of {case.max_new_tokens}"
    return None


def kinds_of(asked: Asked, answer: dict[str, Any]) -> Iterator[str]:
    """What a request was an example of."""
    case, cached = asked.case, answer["cached_tokens"] or 0
    yield f"{len(case.grids)} images"
    if case.video and case.grids:
        yield "video frames"
    if asked.cancel_s is not None:
        yield "cancelled before its first token" if not answer["tokens"] else "cancelled"
    if cached:
        yield "beginning from the prefix cache"
        if any(end <= cached for _, end in case.spans):
            yield "a whole image from the prefix cache"
        if any(begin < cached < end for begin, end in case.spans):
            yield "a part of an image from the prefix cache"


# ---- a run --------------------------------------------------------------------------------------


def fuzz(folder: Path, count: int, seed: int, fault: str = "", say: Any = None) -> Result:
    """Ask ``count`` random requests of a checkpoint.

    Args:
        fault: one of `faults.FAULTS`, to see that the check notices it.
        say: called with a line after each engine.
    """
    source, result = random.Random(seed), Result()
    token = image_token(folder)
    while result.requests < count:
        left = count - result.requests
        rounds: list[tuple[dict[str, Any], list[Asked]]] = []
        while left and len(rounds) < ENGINES:
            rounds.append((settings(source), requests(source, min(ROUND, left), token)))
            left -= len(rounds[-1][1])
        started = time.monotonic()
        _ask_and_judge(folder, rounds, source.choice([0, 2000]), fault, result)
        if say is not None:
            took = time.monotonic() - started
            say(f"{result.requests} requests, {len(result.problems)} wrong, {took:.0f} s")
    return result


def _ask_and_judge(
    folder: Path,
    rounds: Sequence[tuple[dict[str, Any], list[Asked]]],
    pause_us: int,
    fault: str,
    result: Result,
) -> None:
    """One process, in which each round has an engine of its own."""
    given = [(chosen, [one.to_json() for one in asked]) for chosen, asked in rounds]
    answers, batches = run(
        answered, folder, given, fault, mode="numbers", timeout_s=TIMEOUT_S,
        extra={"HOST_RUNTIME_POISON": "1", "HOST_RUNTIME_DELAY_US": str(pause_us)},
    )  # fmt: skip
    result.kinds.update(batches)
    for (chosen, asked), found in zip(rounds, answers, strict=True):
        for number, (one, answer) in enumerate(zip(asked, found, strict=True)):
            _judge(folder, result, one, answer, f"engine {chosen}, request {number}")


def _judge(folder: Path, result: Result, one: Asked, answer: dict[str, Any], name: str) -> None:
    behind = lags(folder, one.case, answer["tokens"]) if answer["tokens"] else []
    wrong = problem(one.case, answer, behind, one.cancel_s is not None)
    if wrong is not None:
        result.problems.append(f"{name}: {wrong}")
    result.requests += 1
    result.tokens += len(behind)
    result.ties += sum(0 < lag < TIE for lag in behind)
    result.cancelled += one.cancel_s is not None
    result.kinds.update(kinds_of(one, answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", choices=SHAPES, default="head64")
    parser.add_argument("--fault", default="", help="one of faults.FAULTS, which must be noticed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_loud_checkpoint(Path(folder) / "model", SHAPES[options.shape])
        found = fuzz(
            path,
            options.requests,
            options.seed,
            options.fault,
            lambda line: print(line, flush=True),
        )
    for kind, count in sorted(found.kinds.items()):
        print(f"{count:>7}  {kind}")
    print(
        f"{found.requests} requests, {found.cancelled} of them cancelled, {found.tokens} tokens, "
        f"{found.ties} near ties, {len(found.problems)} wrong answers"
    )
    for text in found.problems:
        print(text)
    sys.exit(bool(found.problems))


if __name__ == "__main__":
    main()
