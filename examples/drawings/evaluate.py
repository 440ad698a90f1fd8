"""How many held-out drawings are answered right: `python -m examples.drawings.evaluate`.

Everything goes through a real gRPC server: AnalyzeImage for images and pairs of keyframes, RunTask
for the other questions. `--fault` breaks the engine on purpose and shows what each part is worth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from PIL import Image

from examples.drawings.analysis import LIGHT_TERM, analysis, phrase
from examples.drawings.faults import FAULTS, inject
from examples.drawings.questions import QUESTIONS, Asked, ask
from examples.drawings.scenes import HELD_OUT_SEED, Keyframes, Scene, draw, keyframes, scene
from service.engines.reference import ReferenceEngine
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.settings import load_settings
from service.tasks.registry import load_registry
from service.wiring import BUNDLED_MODEL

CALLERS = 16


@dataclass(frozen=True)
class Score:
    """Right answers out of all, by what was asked."""

    right: Counter[str]
    asked: Counter[str]

    def share(self, name: str) -> float:
        return self.right[name] / self.asked[name]

    def table(self) -> str:
        """Markdown: what, per cent right, number asked."""
        rows = [f"| {name} | {100 * self.share(name):.1f} | {self.asked[name]} |"
                for name in self.asked]  # fmt: skip
        return "\n".join(["| what | right, % | of |", "|---|---|---|", *rows])


def encoded_drawing(facts: Scene, seed: int) -> bytes:
    """A PNG or JPEG file of the drawing, of a size and an aspect ratio that the seed decides."""
    rng = random.Random(f"size {seed}")
    short = rng.randint(128, 640)
    long = round(short * rng.uniform(1.0, 1.8))
    image = draw(facts, seed, (short, long) if rng.random() < 0.5 else (long, short))
    return encoded(image, "PNG" if rng.random() < 0.7 else "JPEG")


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


async def score_analyses(
    stub: Any,
    count: int,
    pairs: bool = False,
    prepare: Callable[[bytes], bytes] = lambda data: data,
) -> Score:
    """AnalyzeImage on `count` held-out drawings, or on as many pairs of keyframes.

    prepare: changes the file of each drawing before it is sent.
    """
    score = Score(Counter(), Counter())

    async def one(seed: int) -> None:
        facts = keyframes(seed) if pairs else scene(seed)
        frames = [facts.first, facts.second] if isinstance(facts, Keyframes) else [facts]
        request = pb.AnalyzeImageRequest(
            images=[pb.Image(data=prepare(encoded_drawing(frame, seed))) for frame in frames]
        )
        seen: Any = pb.ImageAnalysis()
        with contextlib.suppress(grpc.aio.AioRpcError):  # an error is a wrong answer
            seen = (await stub.AnalyzeImage(request)).analysis
        _score_analysis(score, facts, seen)

    await _in_parallel(one, [HELD_OUT_SEED + index for index in range(count)])
    return score


def _score_analysis(score: Score, facts: Scene | Keyframes, seen: Any) -> None:
    expected = analysis(facts)
    first = facts.first if isinstance(facts, Keyframes) else facts
    verdicts = {
        "whole object list": list(seen.objects) == [phrase(thing) for thing in first.objects],
        "scene": seen.scene == first.place,
        "lighting": list(seen.lighting) == [LIGHT_TERM[first.lighting]],
        "description": seen.description == expected["description"],
    }
    if isinstance(facts, Keyframes):
        verdicts["what moved"] = list(seen.actions) == expected["actions"]
    verdicts["every field"] = all(plain(getattr(seen, name)) == expected[name] for name in expected)
    score.asked.update(verdicts.keys())
    score.right.update(name for name, right in verdicts.items() if right)
    found = {phrase_.partition(" at ")[2]: phrase_.split(" ") for phrase_ in seen.objects}
    for thing in first.objects:
        words = found.get(thing.position, ["", "", ""])
        attributes = {
            "position of an object": thing.position in found,
            "size of an object": words[0] == thing.size,
            "color of an object": words[1:2] == [thing.color],
            "shape of an object": words[2:3] == [thing.shape],
        }
        score.asked.update(attributes.keys())
        score.right.update(name for name, right in attributes.items() if right)


def plain(value: Any) -> Any:
    """A field of a message as JSON has it."""
    return value if isinstance(value, str) else list(value)


async def score_questions(stub: Any, count: int) -> Score:
    """RunTask with each kind of question on `count` held-out drawings."""
    score = Score(Counter(), Counter())

    async def one(seed: int) -> None:
        rng = random.Random(f"question {seed}")
        for question in QUESTIONS:
            frames, facts = facts_for(question.name, question.images, seed)
            asked = ask(question, facts, rng)
            score.asked[question.name] += 1
            images = [pb.Image(data=encoded_drawing(frame, look)) for frame, look in frames]
            with contextlib.suppress(grpc.aio.AioRpcError):
                reply = await stub.RunTask(pb.RunTaskRequest(task=task(asked), images=images))
                score.right[question.name] += _same(asked, reply.result)

    await _in_parallel(one, [HELD_OUT_SEED + index for index in range(count)])
    return score


def facts_for(name: str, images: int, seed: int) -> tuple[list[tuple[Scene, int]], Any]:
    """Each image's scene with the seed of its look, and the facts that the question is about."""
    if name == "moved":
        pair = keyframes(seed)
        return [(pair.first, seed), (pair.second, seed)], pair
    scenes = tuple(scene(seed + index) for index in range(images))
    frames = [(facts, seed + index) for index, facts in enumerate(scenes)]
    return frames, scenes if images > 1 else scenes[0]


def task(asked: Asked) -> Any:
    """The question as an inline task with the grammar of its answer."""
    question = asked.question
    if question.schema is None:
        grammar = pb.Grammar(choice=pb.Choice(options=question.choices))
    else:
        grammar = pb.Grammar(json_schema=json.dumps(question.schema))
    return pb.Task(inline=pb.InlineTask(user=asked.prompt, grammar=grammar))


def _same(asked: Asked, result: Any) -> bool:
    if asked.question.schema is None:
        return bool(result.text == asked.answer)
    return bool(json.loads(result.json) == json.loads(asked.answer))


async def _in_parallel(one: Callable[[int], Awaitable[None]], seeds: list[int]) -> None:
    waiting = iter(seeds)
    done = 0

    async def caller() -> None:
        nonlocal done
        for seed in waiting:
            await one(seed)
            done += 1
            if sys.stderr.isatty():
                print(f"\r{done}/{len(seeds)}", end="", file=sys.stderr, flush=True)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    if sys.stderr.isatty():
        print(file=sys.stderr)


@contextlib.asynccontextmanager
async def serving(folder: Path, fault: str | None = None) -> AsyncIterator[Any]:
    """A stub that talks to a server on the checkpoint of `folder`, broken by `fault`."""
    engine = ReferenceEngine(folder)
    server = VisionServer(load_settings(port=0), engine, load_registry(None))
    await server.start()
    try:
        await server.load()
        if fault:
            inject(engine, fault)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield VisionServiceStub(channel)
    finally:
        await server.stop(0)


async def run(options: argparse.Namespace) -> None:
    async with serving(options.model, options.fault) as stub:
        if options.fault:
            print(f"Fault: {options.fault}, {FAULTS[options.fault].meaning}\n")
        print("AnalyzeImage, one image\n")
        print((await score_analyses(stub, options.count)).table())
        if options.fault:
            return
        print("\nAnalyzeImage, two keyframes\n")
        print((await score_analyses(stub, options.count // 2, pairs=True)).table())
        print("\nRunTask\n")
        print((await score_questions(stub, options.count // 2)).table())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL, help="checkpoint folder")
    parser.add_argument("--count", type=int, default=512, help="drawings")
    parser.add_argument("--fault", choices=FAULTS, help="break the engine")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
