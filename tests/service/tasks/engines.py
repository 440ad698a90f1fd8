"""A scripted engine: says what it is told and remembers what was done to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, fields

from service.types import (
    TEXT_AND_IMAGES,
    TEXT_ONLY,
    Capabilities,
    Chunk,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Sampling,
    Timings,
    Usage,
)

USAGE = Usage(prompt_tokens=7, image_tokens=4, output_tokens=3)
TIMINGS = Timings(0.1, 0.2, 0.3)


def capabilities(
    *,
    vision: bool = True,
    kinds: frozenset[GrammarKind] = frozenset(GrammarKind),
    options: frozenset[str] = frozenset(f.name for f in fields(Sampling)),
    max_images: int = 8,
) -> Capabilities:
    return Capabilities(
        model="m",
        engine="scripted",
        modalities=TEXT_AND_IMAGES if vision else TEXT_ONLY,
        grammar_kinds=kinds,
        sampling_options=options,
        context_length=4096,
        max_images=max_images,
    )


@dataclass
class ScriptedEngine:
    pieces: Sequence[str] = ("{}",)
    finish: FinishReason | None = FinishReason.STOP
    capabilities: Capabilities = field(default_factory=capabilities)
    prepare_s: float = 0.0
    piece_s: float = 0.0
    error: Exception | None = None
    log: list[str] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)

    async def start(self) -> None: ...

    async def check_health(self) -> None: ...

    async def close(self) -> None: ...

    async def prepare(self, grammar: Grammar) -> None:
        self.log.append("prepare")
        await asyncio.sleep(self.prepare_s)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.log.append("generate")
        self.requests.append(request)
        try:
            for piece in self.pieces:
                await asyncio.sleep(self.piece_s)
                yield Chunk(piece)
            if self.error is not None:
                raise self.error
            yield Chunk("", self.finish, USAGE, TIMINGS)
        finally:
            self.log.append("closed")
