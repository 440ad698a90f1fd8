"""Requests of the kit, and how they are asked: the service's engine, with token ids as the answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.types import GenerateRequest, Image, ImageSource, Sampling
from tests.service.engines.conformance import random_image as noise
from tests.service.engines.conformance import request

FIELD = "images[0].data"


@dataclass
class Answer:
    """tokens: up to the end token, without it. first_s, total_s: from handing over the packed prompt."""

    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0
    total_s: float = 0.0


def texts(count: int, tokens: int) -> list[GenerateRequest]:
    """Prompts of 10 to 1,200 tokens; the long ones take several prefill chunks."""
    return [
        request(f"{'word ' * (1 + 11 * n)} number {n}?", max_tokens=tokens) for n in range(count)
    ]


def with_images(count: int, tokens: int) -> list[GenerateRequest]:
    """One to three images each, of odd sizes."""
    return [
        request(
            "What?", *(noise(9 * n + k, 48 + 37 * (n % 12), 90 + 41 * k) for k in range(1 + n % 3)),
            max_tokens=tokens,
        )
        for n in range(count)
    ]  # fmt: skip


def analyses(count: int) -> list[GenerateRequest]:
    """AnalyzeImage on drawings that the bundled model was not trained on."""
    from examples.drawings.evaluate import encoded_drawing
    from examples.drawings.scenes import HELD_OUT_SEED, scene

    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + count)
    return [analysis(Image(decoded(encoded_drawing(scene(seed), seed)))) for seed in seeds]


def analysis(image: ImageSource, tokens: int = 512) -> GenerateRequest:
    """What AnalyzeImage sends to the engine for one image."""
    from service.schema_compiler.api import analyse
    from service.schema_compiler.limits import DEFAULT_LIMITS
    from service.tasks.image_analysis import IMAGE_ANALYSIS

    assert IMAGE_ANALYSIS.grammar is not None
    grammar = analyse(IMAGE_ANALYSIS.grammar, DEFAULT_LIMITS).grammar
    return GenerateRequest(
        "gpu-kit", IMAGE_ANALYSIS.user, IMAGE_ANALYSIS.system, (image,), grammar,
        Sampling(max_tokens=tokens),
    )  # fmt: skip


def decoded(data: bytes) -> Any:
    """Pixels of an encoded image, as the server decodes it."""
    from lmdeploy_ext.images.files import ImageLimits
    from service.inference.images import decode_image

    return decode_image(data, FIELD, ImageLimits())


def pack(folder: Path, requests: Sequence[GenerateRequest]) -> list[Any]:
    """Packed prompts, without an engine."""
    from service.engines.common.chat import Chat
    from service.engines.common.config import TextConfig
    from service.engines.common.images import ImagePreprocessor
    from service.engines.common.prompts import Prompts

    config = TextConfig.from_checkpoint(folder)
    prompts = Prompts(Chat(folder, config), ImagePreprocessor(folder), 4096)

    async def all_of_them() -> list[Any]:
        with ThreadPoolExecutor(2) as executor:
            return [await prompts.pack(one, executor) for one in requests]

    return asyncio.run(all_of_them())


async def packed(engine: Any, one: GenerateRequest) -> Any:
    """A prompt as `LMDeployEngine` packs it, for `ask`: outside of what is timed."""
    return await engine._ready().pack(one, engine._front)


async def ask(engine: Any, one: GenerateRequest, ready: Any = None) -> Answer:
    """Run one request without a grammar inside an `LMDeployEngine`, and return its token ids."""
    from service.engines.lmdeploy.outcomes import error_of

    ready = await packed(engine, one) if ready is None else ready
    loaded, number = engine._ready(), next(engine._ids)
    ends = set(loaded._config.stop_ids)
    answer, begun = Answer(), time.perf_counter()
    run = loaded.run(number, ready, one, None, loaded.answer_limit(ready, one))
    try:
        async for output in run.outputs():
            error = error_of(output.status)
            if error is not None:
                raise error
            if output.token_ids and not answer.tokens:
                answer.first_s = time.perf_counter() - begun
            answer.tokens += [int(token) for token in output.token_ids]
    finally:
        await run.stop()
        loaded.host.drop(number)
    answer.total_s = time.perf_counter() - begun
    kept = answer.tokens[: one.sampling.max_tokens]
    end = next((index for index, token in enumerate(kept) if token in ends), len(kept))
    answer.tokens = kept[:end]
    return answer


def write_jpeg(path: Path, number: int, sides: tuple[int, int]) -> None:
    """A JPEG file that no engine has seen: smooth colours, edges and some noise, by its number."""
    import numpy as np
    from PIL import Image as Pillow

    source, choose = np.random.default_rng(number), random.Random(number)
    width, height = (choose.randint(*sides) for _ in range(2))
    coarse = source.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    drawn = Pillow.fromarray(coarse).resize((width, height), Pillow.Resampling.BICUBIC)
    pixels = np.asarray(drawn).astype(np.int16)
    for _ in range(6):
        top, left = choose.randrange(height), choose.randrange(width)
        pixels[top : top + height // 4, left : left + width // 4] = source.integers(0, 256, 3)
    pixels += source.integers(-12, 13, (height, width, 1), dtype=np.int16)
    Pillow.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=88)
