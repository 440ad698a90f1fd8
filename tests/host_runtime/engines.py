"""The stock engine on the host runtime, for code that runs in a child: raw TurboMind, and the
async engine that ``pipeline`` and ``lmdeploy serve`` stand on. Import it only there."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import lmdeploy
from lmdeploy import GenerationConfig, TurbomindEngineConfig
from lmdeploy.turbomind import TurboMind

SMALL: dict[str, Any] = {
    "tp": 1, "session_len": 512, "max_batch_size": 8, "cache_max_entry_count": 0.1,
    "max_prefill_token_num": 256, "dtype": "bfloat16", "enable_metrics": True,
}  # fmt: skip
"""Engine settings for tiny checkpoints."""


_alive: list[TurboMind] = []
_ids = itertools.count(
    1
)  # the engine refuses a second request with the id of one that it still holds


def settings(**changes: Any) -> TurbomindEngineConfig:
    return TurbomindEngineConfig(**{**SMALL, **changes})


def turbomind(checkpoint: str, **changes: Any) -> TurboMind:
    """A started raw engine, which lives until `stop`; keywords change `SMALL`."""
    engine = TurboMind.from_pretrained(checkpoint, engine_config=settings(**changes))
    _alive.append(engine)
    return engine


async def stop(engine: TurboMind) -> None:
    """End an engine that has no request.

    LMDeploy 0.18.0 aborts ("Resource deadlock avoided") when the last reference to an engine goes
    while its own thread still reports a finished request; so this waits a little.
    """
    await idle(engine)
    await asyncio.sleep(0.2)
    _alive.remove(engine)
    engine.close()
    gc.collect()


def pipeline(checkpoint: str, **changes: Any) -> Any:
    """LMDeploy's ``pipeline`` on a checkpoint; its ``async_engine`` is what the server stands on."""
    return lmdeploy.pipeline(checkpoint, backend_config=settings(**changes))


@dataclass
class Answer:
    """What one request on a raw engine gave."""

    tokens: list[int] = field(default_factory=list)
    status: str = ""
    cached_tokens: int | None = None
    """Prompt tokens that came from the prefix cache."""
    chunks: int = 0


async def ask(
    engine: TurboMind,
    prompt: Sequence[int],
    *,
    images: list[dict[str, Any]] | None = None,
    stop_after: int | None = None,
    answer: Answer | None = None,
    **sampling: Any,
) -> Answer:
    """Run one request, greedily unless ``sampling`` says otherwise.

    Args:
        prompt: token ids.
        images: multimodal items as the front end makes them.
        stop_after: close the stream after so many chunks, which cancels the request.
        answer: is filled in; for a caller that may be cancelled.
        sampling: fields of LMDeploy's ``GenerationConfig``.
    """
    config = GenerationConfig(**{"max_new_tokens": 8, "do_sample": False, "top_k": 1, **sampling})
    answer = Answer() if answer is None else answer
    stream: AsyncGenerator[Any, None] = engine.create_instance().async_stream_infer(
        next(_ids), input_ids=list(prompt), multimodal=images, gen_config=config, stream_output=True
    )
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            answer.chunks += 1
            answer.tokens += list(chunk.token_ids)
            answer.status = chunk.status.name
            if chunk.req_metrics is not None:
                answer.cached_tokens = chunk.req_metrics.cached_tokens
            if stop_after is not None and answer.chunks >= stop_after:
                break
    return answer


async def idle(engine: TurboMind, timeout_s: float = 20) -> dict[str, Any]:
    """Wait until the engine holds no request, and return its scheduler's figures.

    Raises:
        TimeoutError: requests are left.
    """
    end = asyncio.get_running_loop().time() + timeout_s
    while True:
        figures = engine.get_schedule_metrics()
        if figures.active_seqs == 0 and figures.waiting_seqs == 0:
            return dict(vars(figures))
        if asyncio.get_running_loop().time() > end:
            raise TimeoutError(f"requests are left in the engine: {figures}")
        await asyncio.sleep(0.005)
