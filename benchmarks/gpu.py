"""TurboMind, LMDeploy's PyTorch engine and transformers on one GPU, on a model of the shape of 2B.

``python -m benchmarks.gpu [--quick]`` from the repository root; without a GPU it says so and
measures nothing. The checkpoint has Qwen3-VL-2B's shape and random weights, so that nothing has to
be fetched. One round is N requests at once, each a new picture of 448 x 448 pixels, a short text
and an answer of exactly as many tokens as was asked for, from the pixels to the last token.
transformers gets the N requests as one batch. Each contender runs in a process of its own, one
after the other: two do not fit on one GPU side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import markdown, write_results
from service.types import GenerateRequest, Image, Sampling

CONTENDERS = ("turbomind", "pytorch", "transformers")
CONCURRENT = (1, 8, 64)
SIDE = 448  # pixels; 196 tokens of a picture
PROMPT = "Describe the picture in every detail that you can see."


@dataclass(frozen=True)
class Round:
    """What N requests took.

    wall_s: from handing them over to the last token. first_s: median until the first token.
    tokens: of all answers.
    """

    requests: int
    wall_s: float
    first_s: float
    tokens: int


def picture(number: int) -> Image:
    """A picture that no engine has seen."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image(pixels)


class Contender(ABC):
    """Answers rounds of requests on one checkpoint."""

    @abstractmethod
    def run(self, first: int, count: int, tokens: int) -> Round:
        """Answer ``count`` requests about the pictures from number ``first`` on."""

    @abstractmethod
    def close(self) -> None:
        """Free the GPU."""


class LMDeploy(Contender):
    """The service's engine on one of LMDeploy's backends."""

    def __init__(self, folder: Path, backend: str) -> None:
        from service.engines.lmdeploy import LMDeployEngine

        # Random weights repeat themselves: the guard against loops would end answers early.
        from service.engines.shared.loops import LoopGuard

        self._loop = asyncio.new_event_loop()
        self._engine = LMDeployEngine(
            folder, backend=backend, context_length=4096, max_batch=max(CONCURRENT),
            loop_guard=LoopGuard(window=0),
        )  # fmt: skip
        self._loop.run_until_complete(self._engine.start())

    def run(self, first: int, count: int, tokens: int) -> Round:
        async def one(number: int) -> tuple[float, int]:
            request = GenerateRequest(
                f"bench-{number}", PROMPT, images=(picture(number),),
                sampling=Sampling(max_tokens=tokens),
            )  # fmt: skip
            last = None
            async for chunk in self._engine.generate(request):
                last = chunk
            assert last is not None
            return last.timings.first_token_s, last.usage.output_tokens

        async def all_of_them() -> list[tuple[float, int]]:
            return await asyncio.gather(*(one(first + n) for n in range(count)))

        begun = time.perf_counter()
        found = self._loop.run_until_complete(all_of_them())
        wall_s = time.perf_counter() - begun
        return Round(
            count, wall_s, statistics.median(f for f, _ in found), sum(n for _, n in found)
        )

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.close())


class Transformers(Contender):
    """``generate`` of transformers, one padded batch for each round."""

    def __init__(self, folder: Path) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import Qwen3VLForConditionalGeneration

        from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig

        self._model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        self._model = self._model.to("cuda").eval()
        self._config = ImageProcessorConfig.from_checkpoint(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def run(self, first: int, count: int, tokens: int) -> Round:
        begun = time.perf_counter()
        inputs = self._inputs(first, count)
        self._generate(inputs, 1)
        first_s = time.perf_counter() - begun  # of a call of its own, which is not counted below
        begun = time.perf_counter()
        inputs = self._inputs(first, count)
        produced = self._generate(inputs, tokens)
        return Round(count, time.perf_counter() - begun, first_s, produced * count)

    def _generate(self, inputs: dict[str, Any], tokens: int) -> int:
        import torch

        with torch.inference_mode():
            out = self._model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        torch.cuda.synchronize()
        return int(out.shape[1] - inputs["input_ids"].shape[1])

    def _inputs(self, first: int, count: int) -> dict[str, Any]:
        """Every prompt is equally long: nothing is padded."""
        import torch

        from lmdeploy_ext.encoder.preprocess import normalise, preprocess

        config = self._model.config
        images = [preprocess(picture(first + n).pixels, self._config) for n in range(count)]
        words = self._tokenizer.encode(PROMPT, add_special_tokens=False).ids
        pads = [config.image_token_id] * images[0].num_tokens
        ids = [config.vision_start_token_id, *pads, config.vision_end_token_id, *words]
        row = torch.tensor([ids] * count)
        return {
            "input_ids": row.cuda(),
            "attention_mask": torch.ones_like(row).cuda(),
            "mm_token_type_ids": (row == config.image_token_id).int().cuda(),
            "pixel_values": torch.cat(
                [torch.from_numpy(normalise(image.patches, self._config)) for image in images]
            ).to("cuda", torch.bfloat16),
            "image_grid_thw": torch.tensor([image.grid for image in images]).cuda(),
        }

    def close(self) -> None:
        import torch

        del self._model
        torch.cuda.empty_cache()


def serve(name: str, folder: Path, tokens: int, rounds: int) -> None:
    """Measure one contender and print its rounds as JSON, the last line of stdout."""
    contender = Transformers(folder) if name == "transformers" else LMDeploy(folder, name)
    found, number = [], 0
    for count in CONCURRENT:
        for turn in range(rounds + 1):  # the first warms up
            done = contender.run(number, count, tokens)
            number += count
            if turn:
                found.append(asdict(done))
    contender.close()
    print(json.dumps(found))


def measure(name: str, folder: Path, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one contender: medians of its rounds, with the slowest and the fastest."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--serve", name, "--folder", str(folder),
               "--tokens", str(tokens), "--rounds", str(rounds)]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = [Round(**one) for one in json.loads(done.stdout.strip().splitlines()[-1])]
    rows = []
    for count in CONCURRENT:
        mine = [one for one in found if one.requests == count]
        rates = [one.tokens / one.wall_s for one in mine]
        rows.append(
            {
                "engine": name,
                "requests": count,
                "first token ms": statistics.median(one.first_s for one in mine) * 1e3,
                "tokens/s": statistics.median(rates),
                "slowest": min(rates),
                "fastest": max(rates),
                "images/s": statistics.median(count / one.wall_s for one in mine),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="see that it runs")
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.folder, arguments.tokens, arguments.rounds)
        return
    import torch

    if not torch.cuda.is_available():
        print("gpu: skipped, torch sees no NVIDIA GPU")
        return
    from benchmarks.random_model import write_random_model
    from service.wiring import BUNDLED_MODEL

    tokens, rounds = (16, 1) if arguments.quick else (arguments.tokens, arguments.rounds)
    with tempfile.TemporaryDirectory() as name:
        layers = 4 if arguments.quick else 28
        folder = write_random_model(Path(name) / "model", BUNDLED_MODEL, layers=layers)
        rows = [row for one in CONTENDERS for row in measure(one, folder, tokens, rounds)]
    print(markdown(rows))
    write_results(
        "gpu", rows, f"{torch.cuda.get_device_name(0)}; {layers} layers, {tokens} tokens an answer"
    )


if __name__ == "__main__":
    main()
