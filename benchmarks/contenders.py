"""Engines that answer the same requests, for `benchmarks.reference_engine`."""

from __future__ import annotations

import asyncio
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.drawings.scenes import HELD_OUT_SEED, draw, scene
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.tasks.image_analysis import IMAGE_ANALYSIS
from service.types import GenerateRequest, Image, Sampling

IMAGE_SIZE = (192, 192)  # width, height in pixels
TASK = IMAGE_ANALYSIS
assert TASK.grammar is not None
GRAMMAR = analyse(TASK.grammar, DEFAULT_LIMITS).grammar


@dataclass(frozen=True)
class Round:
    """What N requests took.

    wall_s: from handing them over to the last token of the last one. first_s: median over the
    requests until the first token. answering_s: from the first token of all to the last.
    tokens: of all answers. texts: the answers. cpu_s: of all threads of the process.
    """

    wall_s: float
    first_s: float
    answering_s: float
    tokens: int
    texts: list[str]
    cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second, everything included."""
        return self.tokens / self.wall_s

    @property
    def answer_rate(self) -> float:
        """Tokens a second behind the first token, of all requests together."""
        return (self.tokens - len(self.texts)) / self.answering_s


def drawings(first: int, count: int) -> list[np.ndarray]:
    """Drawings (height, width, 3), uint8, that no model has been trained on."""
    seeds = range(HELD_OUT_SEED + first, HELD_OUT_SEED + first + count)
    return [np.array(draw(scene(seed), seed, IMAGE_SIZE)) for seed in seeds]


class Contender(ABC):
    """An engine that answers a batch of requests. Lives in its own process."""

    @abstractmethod
    def __init__(self, folder: Path, dtype: str, max_tokens: int) -> None: ...

    @abstractmethod
    def run(self, shown: Sequence[np.ndarray]) -> Round: ...


class Ours(Contender):
    """`ReferenceEngine`."""

    def __init__(self, folder: Path, dtype: str, max_tokens: int) -> None:
        from service.engines.reference import ReferenceEngine

        self._engine = ReferenceEngine(folder, dtype=dtype, vision_cache_bytes=0)
        self._max_tokens = max_tokens
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.start())

    def run(self, shown: Sequence[np.ndarray]) -> Round:
        return self._loop.run_until_complete(self._all(shown))

    async def _all(self, shown: Sequence[np.ndarray]) -> Round:
        begun = time.perf_counter()
        answers = await asyncio.gather(*(self._one(pixels) for pixels in shown))
        wall_s = time.perf_counter() - begun
        first_s = [one[1].timings.first_token_s for one in answers]
        return Round(
            wall_s,
            statistics.median(first_s),
            wall_s - min(first_s),
            sum(one[1].usage.output_tokens for one in answers),
            [one[0] for one in answers],
        )

    async def _one(self, pixels: np.ndarray) -> tuple[str, Any]:
        request = GenerateRequest(
            "benchmark", TASK.user, TASK.system, (Image(pixels),), GRAMMAR,
            Sampling(max_tokens=self._max_tokens),
        )  # fmt: skip
        chunks = [chunk async for chunk in self._engine.generate(request)]
        return "".join(chunk.text for chunk in chunks), chunks[-1]


class Transformers(Contender):
    """``generate`` with xgrammar's LogitsProcessor."""

    def __init__(self, folder: Path, dtype: str, max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from service.engines.common.chat import Chat
        from service.engines.common.config import TextConfig
        from service.engines.common.grammar import GrammarCompiler

        self._torch = torch
        self._processor = AutoProcessor.from_pretrained(folder)
        self._processor.tokenizer.padding_side = "left"
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        config = TextConfig.from_checkpoint(folder)
        chat = Chat(folder, config)
        compiler = GrammarCompiler(chat.table, config.stop_ids)
        self._grammar = compiler.compile(GRAMMAR).automaton
        self._stop = set(config.stop_ids) | {self._processor.tokenizer.pad_token_id}
        self._max_tokens = max_tokens

    def run(self, shown: Sequence[np.ndarray]) -> Round:
        from xgrammar.contrib.hf import LogitsProcessor

        times: list[float] = []

        def clock(ids: Any, scores: Any) -> Any:
            times.append(time.perf_counter())
            return scores

        begun = time.perf_counter()
        inputs = self._processor.apply_chat_template(
            [self._messages(pixels) for pixels in shown],
            tokenize=True, add_generation_prompt=True, return_dict=True,
            processor_kwargs={"return_tensors": "pt", "padding": True},
        )  # fmt: skip
        masks = LogitsProcessor([self._grammar] * len(shown))
        with self._torch.inference_mode():
            out = self._model.generate(
                **inputs, max_new_tokens=self._max_tokens, do_sample=False,
                logits_processor=[masks, clock],
            )  # fmt: skip
        end = time.perf_counter()
        answers = [[token for token in row if token not in self._stop]
                   for row in out[:, inputs["input_ids"].shape[1] :].tolist()]  # fmt: skip
        texts = self._processor.tokenizer.batch_decode(answers)
        wall_s, first_s = end - begun, times[0] - begun
        return Round(wall_s, first_s, wall_s - first_s, sum(map(len, answers)), texts)

    def _messages(self, pixels: np.ndarray) -> list[dict[str, Any]]:
        user = [{"type": "image", "image": pixels}, {"type": "text", "text": TASK.user}]
        system = [{"type": "text", "text": TASK.system}]
        turns = [{"role": "system", "content": system}] if TASK.system else []
        return [*turns, {"role": "user", "content": user}]
