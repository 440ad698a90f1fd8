"""What the steps need and the processor makes.

Each runs in a process of its own beside the first steps. Nothing here needs LMDeploy or a GPU, so
that it can begin while parts are still on their way.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from benchmarks.gpu_kit.context import Context, write

CHECKPOINTS = ("2B", "8B")


def checkpoint(name: str, context: Context) -> dict[str, Any]:
    """Random weights of a published shape."""
    from benchmarks.random_model import write_random_model

    folder, partial_folder = context.model(name), context.made / f"{name}.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    shape = context.sizes.shapes[name]
    write_random_model(partial_folder, context.model("bundled"), size=shape)
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)
    return {"bytes": (folder / "model.safetensors").stat().st_size, "shape": shape}


def images(context: Context) -> dict[str, Any]:
    """The JPEG files of the workload, the warm-up's behind the others, on all cores."""
    sizes = context.sizes
    folder = context.image(0).parent
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(image_count(context))
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_image, context), numbers, chunksize=max(1, len(numbers) // 64)))
    written = [context.image(number).stat().st_size for number in numbers]
    return {"images": len(written), "bytes": sum(written), "sides": sizes.sides}


def image_count(context: Context) -> int:
    """Images of the workload."""
    sizes = context.sizes
    return sizes.single + sizes.many + sizes.schema_requests + sizes.at_once


def _image(context: Context, number: int) -> None:
    from benchmarks.gpu_kit.asking import write_jpeg

    path = context.image(number)
    partial_path = path.with_suffix(".partial")
    write_jpeg(partial_path, number, context.sizes.sides)
    partial_path.rename(path)


def truth(context: Context) -> dict[str, Any]:
    """Greedy tokens of the reference engine, in float32 on the processor, and their leads."""
    from benchmarks.gpu_kit import asking
    from tests.service.engines.reference import oracle

    sizes, folder = context.sizes, context.model("bundled")

    def greedy(requests: list[Any], deepstack: bool = True) -> list[dict[str, Any]]:
        model = oracle.loaded(folder, threads=_threads(), deepstack=deepstack)
        found = []
        for one in asking.pack(folder, requests):
            tokens = oracle.engine_greedy(model, one, sizes.answer)
            best = oracle.engine_logits(model, one, tokens).float().topk(2, dim=-1).values
            leads = (best[:, 0] - best[:, 1]).tolist()
            # The last lead is that of what would have come next: where the answer ends by itself,
            # an end token.
            found.append({"tokens": tokens, "leads": leads})
        return found

    shown = asking.with_images(sizes.images, sizes.answer)
    result = {
        "texts": greedy(asking.texts(sizes.texts, sizes.answer)),
        "images": greedy(shown),
        "images without DeepStack": greedy(shown, deepstack=False),
    }
    write(context.made / "truth.json", result)
    return {name: len(found) for name, found in result.items()}


def truth_guided(context: Context) -> dict[str, Any]:
    """The reference engine's AnalyzeImage answers."""
    import asyncio

    from benchmarks.gpu_kit import asking
    from service.engines.reference import ReferenceEngine
    from tests.service.engines.conformance import answer

    async def answers() -> list[str]:
        engine = ReferenceEngine(
            context.model("bundled"), device="cpu", dtype="float32", threads=_threads()
        )
        await engine.start()
        try:
            requests = asking.analyses(context.sizes.guided)
            found = await asyncio.gather(*(answer(engine, one) for one in requests))
            return [text for text, _, _ in found]
        finally:
            await engine.close()

    texts = asyncio.run(answers())
    write(context.made / "truth-guided.json", {"guided": texts})
    return {"guided": len(texts)}


def _threads() -> int:
    """For one of several processes; the model is small."""
    return max(1, min(4, (os.cpu_count() or 1) // 4))


MAKERS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "truth": truth,
    "truth-guided": truth_guided,
    "2B": partial(checkpoint, "2B"),
    "images": images,
    "8B": partial(checkpoint, "8B"),
}  # fmt: skip
"""In the order of need."""


def main(name: str, context: Context) -> None:
    """The process's whole life."""
    from benchmarks.gpu_kit.facts import failure
    from tests.host_runtime.child import end_with_parent

    end_with_parent()
    begun = time.monotonic()
    try:
        found = MAKERS[name](context)
    except BaseException as error:
        write(context.done(name).with_suffix(".error"), failure(error))
        raise
    write(context.done(name), found | {"seconds": round(time.monotonic() - begun, 1)})
