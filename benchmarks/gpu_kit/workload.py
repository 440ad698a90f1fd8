"""Step g: images in, answers of one length out, as many requests a second as an engine can do.

Each request is a JPEG file that no engine has seen, decoded as the server decodes it, with the text of
AnalyzeImage. Answers have exactly as many tokens as are asked for: random weights never choose the end.
The load with the schema, which may end an answer earlier, is measured beside it.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit import asking
from benchmarks.gpu_kit.plan import SESSIONS
from benchmarks.gpu_kit.worker import StepFailed, Worker
from lmdeploy_ext.images.files import ImageLimits
from service.inference.calls import EncodedImage
from service.inference.decoding import ImageDecoder
from service.settings import Settings
from service.types import FinishReason, GenerateRequest, Image, ImageSource

SINGLE_SHARE = 0.4
"""Of a step's time that is left, for the images one at a time."""
RESERVE_S = 10.0
"""Of a step's time, for what comes behind the load at once."""
END_S = 3.0
"""Of a step's time, for the end of the requests that run when it is up."""
TIE = 0.25
"""How far a token's logit may be behind the best in float32: rounding of 16 bits in a deep model."""


@dataclass(frozen=True)
class Done:
    """One request. first_s: from the encoded image to the first token. begun, ended: by perf_counter."""

    begun: float
    first_s: float
    ended: float
    tokens: int
    prompt: int
    reason: FinishReason | None


async def speed(worker: Worker) -> None:
    """One engine: warm-up, one at a time, many at once, many with the schema, answers to judge."""
    sizes, context = worker.context.sizes, worker.context
    engine = await _engine(worker)
    last = sizes.single + sizes.many + sizes.schema_requests
    warm = range(last, last + sizes.at_once)
    plain, schema = _makers(sizes.tokens)
    end = worker.deadline - END_S
    begun = time.monotonic()
    await _load(worker, engine, warm, sizes.at_once, plain, "warm-up", end)
    await _load(worker, engine, warm[:2], 1, plain, "warm-up", end)
    worker.figures["warm-up"] = {"seconds": round(time.monotonic() - begun, 2)}
    worker.progress()
    numbers = iter(range(last))
    single = list(islice(numbers, sizes.single))
    half = time.monotonic() + SINGLE_SHARE * (end - time.monotonic())
    await _load(worker, engine, single, 1, plain, "one at a time", half)
    many = list(islice(numbers, sizes.many))
    await _load(worker, engine, many, sizes.at_once, plain, "at once", worker.deadline - RESERVE_S)
    judged = [
        await _tokens(engine, plain(Image(_decoded(context.image(n)))))
        for n in single[: sizes.judged]
    ]
    worker.figures["judged"] = judged
    worker.progress()
    if worker.step == "speed-2B":
        some = list(islice(numbers, sizes.schema_requests))
        await _load(worker, engine, some, sizes.at_once, schema, "with the schema", end)
    short = worker.figures["at once"]["answers of another length"]
    worker.check("answers of another length", short, "0", short == 0)


async def _engine(worker: Worker) -> Any:
    """The session's engine. In a dry run the PyTorch engine cannot start: all up to that point runs,
    and the reference engine stands in for it behind that point."""
    pytorch = SESSIONS[worker.session].options.get("backend") == "pytorch"
    if not (pytorch and worker.context.dry):
        return await worker.engine()
    try:
        engine = await worker.engine()
    except Exception as error:
        worker.figures["dry run"] = (
            f"LMDeploy's PyTorch engine cannot start without a GPU ({error}); what follows is the "
            "reference engine's"
        )
        return await _stand_in(worker)
    return engine


async def _stand_in(worker: Worker) -> Any:
    from service.engines.common.loops import LoopGuard
    from service.engines.reference import ReferenceEngine

    folder = worker.context.model(SESSIONS[worker.session].model)
    engine = ReferenceEngine(folder, device="cpu", loop_guard=LoopGuard(window=0))
    await engine.start()
    return engine


def _makers(tokens: int) -> tuple[Any, Any]:
    """Functions that make a request of an image: without and with the schema."""

    def schema(image: ImageSource) -> GenerateRequest:
        return asking.analysis(image, tokens)

    def plain(image: ImageSource) -> GenerateRequest:
        return replace(schema(image), grammar=None)

    return plain, schema


async def _load(
    worker: Worker,
    engine: Any,
    numbers: Sequence[int],
    at_once: int,
    make: Any,
    name: str,
    end: float,
) -> None:
    """Ask about these images, so many at a time, until ``end``; notes the figures."""
    files = [worker.context.image(number).read_bytes() for number in numbers]
    waiting, done = iter(files), []
    decoder = ImageDecoder(ImageLimits(), Settings.model_fields["max_decoding_bytes"].default)
    gc.collect()
    noted = time.monotonic()

    async def caller() -> None:
        nonlocal noted
        for data in waiting:
            if time.monotonic() > end:
                return
            begun = time.perf_counter()
            (image,) = await decoder.open([EncodedImage(asking.FIELD, data)])
            handed = time.perf_counter()
            last = None
            async for chunk in engine.generate(make(image)):
                last = chunk
            assert last is not None
            first_s = handed - begun + last.timings.first_token_s
            usage = last.usage
            done.append(Done(begun, first_s, time.perf_counter(), usage.output_tokens,
                             usage.prompt_tokens, last.finish_reason))  # fmt: skip
            if time.monotonic() > noted + 5:
                noted = time.monotonic()
                worker.figures[name] = {"requests so far": len(done)}
                worker.progress()

    before, begun = _cpu_s(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(min(at_once, len(files)))))
    wall_s = time.perf_counter() - begun
    if not done:
        raise StepFailed(f"{name}: the time was up before the first request")
    worker.figures[name] = _figures(
        done, len(files), wall_s, _cpu_s() - before, worker.context.sizes.tokens
    )
    worker.progress()


def _figures(
    done: Sequence[Done], wanted: int, wall_s: float, cpu_s: float, tokens: int
) -> dict[str, Any]:
    first = sorted(one.first_s for one in done)
    whole = sorted(one.ended - one.begun for one in done)
    produced = sum(one.tokens for one in done)
    return {
        "requests": len(done),
        "wanted": wanted,
        "complete": len(done) == wanted,
        "wall_s": round(wall_s, 3),
        "requests/s": round(len(done) / wall_s, 3),
        "tokens/s": round(produced / wall_s, 1),
        "first token ms": {
            "median": round(1e3 * statistics.median(first), 1),
            "p90": round(1e3 * first[len(first) * 9 // 10], 1),
            "max": round(1e3 * first[-1], 1),
        },
        "request ms, median": round(1e3 * statistics.median(whole), 1),
        "cpu ms per request": round(1e3 * cpu_s / len(done), 2),
        "prompt tokens, mean": round(statistics.mean(one.prompt for one in done), 1),
        "answers of another length": sum(one.tokens != tokens for one in done),
    }


def _cpu_s() -> float:
    """Processor time of this process and its children."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, kinds))


def _decoded(path: Path) -> Any:
    return asking.decoded(path.read_bytes())


async def _tokens(engine: Any, one: GenerateRequest) -> list[int]:
    """Token ids of one answer; none from the engine that stands in for another."""
    from service.engines.lmdeploy import LMDeployEngine

    return (await asking.ask(engine, one)).tokens if isinstance(engine, LMDeployEngine) else []


async def judge(worker: Worker) -> None:
    """transformers in float32 reads each prompt with an engine's answer behind it: each token must be
    the best, or nearly. Then the time of its own ``generate`` in bfloat16."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    sizes, context = worker.context.sizes, worker.context
    size = worker.step.partition("-")[2]
    folder = context.model(size)
    plain, _ = _makers(sizes.tokens)
    prompts = [plain(Image(_decoded(context.image(n)))) for n in range(sizes.judged)]
    packed = await asyncio.to_thread(asking.pack, folder, prompts)
    torch.backends.cudnn.allow_tf32 = False  # it is on for convolutions
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=context.device
    )
    model = (
        model.float().eval()
    )  # on the device: the processor would take long for 8 billion numbers
    judged = 0
    for name in (f"speed-{size}", f"speed-{size}-pytorch"):
        answers = [one for one in context.figures(name).get("judged", []) if one]
        if not answers:
            worker.figures[name] = "no answers to judge"
            continue
        behind = [
            lags(model, folder, one, given) for one, given in zip(packed, answers, strict=False)
        ]
        worker.figures[name] = {
            "answers": len(behind),
            "tokens": sum(len(one) for one in behind),
            "not the best": sum(lag > 0 for one in behind for lag in one),
            "furthest behind the best": round(max(map(max, behind)), 4),
        }
        worker.progress()
        worst = max(range(len(behind)), key=lambda n: max(behind[n]))
        most = max(behind[worst])
        index = behind[worst].index(most)
        first = {"answer": worst, "token": index, "tokens": answers[worst], "behind": behind[worst]}
        what = f"{name}: a token's logit behind the best, at most"
        worker.check(what, round(most, 4), f"< {TIE}", most < TIE, first)
        judged += len(behind)
    worker.check("answers judged", judged, "> 0", judged > 0)
    model = model.to(torch.bfloat16)
    worker.figures["transformers, one at a time"] = _generate(
        model, folder, packed[:2], sizes.tokens
    )


def _inputs(model: Any, folder: Path, one: Any, answer: Sequence[int] = ()) -> dict[str, Any]:
    """A packed prompt, with an answer behind it, as transformers takes it."""
    import torch

    from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, normalise

    config = ImageProcessorConfig.from_checkpoint(folder)
    ids = torch.tensor([[*one.token_ids.tolist(), *answer]])
    kinds = (ids == model.config.image_token_id).int()
    kinds[:, len(one.token_ids) :] = 0
    pixels = [torch.from_numpy(normalise(image.patches, config)) for image in one.images]
    values = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds,
        "pixel_values": torch.cat(pixels).to(model.dtype),
        "image_grid_thw": torch.tensor([list(image.grid) for image in one.images]),
    }  # fmt: skip
    return {name: value.to(model.device) for name, value in values.items()}


def lags(model: Any, folder: Path, one: Any, answer: Sequence[int]) -> list[float]:
    """How far the logit of each token of an answer is behind the best one; 0 for the best.

    Ends with an image token, which transformers cannot have in an answer.
    """
    import torch

    image = model.config.image_token_id
    if image in answer:
        answer = answer[: list(answer).index(image) + 1]
    with torch.inference_mode():
        values = _inputs(model, folder, one, answer[:-1])
        logits = model(**values, logits_to_keep=len(answer)).logits[0].float().cpu()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return [float(lag) for lag in logits.amax(dim=1) - chosen]


def _generate(model: Any, folder: Path, packed: Sequence[Any], tokens: int) -> dict[str, Any]:
    """transformers' own way, the first of two calls to warm up."""
    import torch

    took = []
    for one in packed:
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(**_inputs(model, folder, one), max_new_tokens=tokens,
                           min_new_tokens=tokens, do_sample=False)  # fmt: skip
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
    return {
        "seconds of each": [round(one, 3) for one in took],
        "tokens/s": round(tokens / took[-1], 1),
    }
