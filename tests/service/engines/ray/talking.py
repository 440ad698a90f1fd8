"""An engine for replicas under test, which does what the text of the request says."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from service.engines.fake import FakeEngine
from service.errors import EngineUnavailable
from service.types import Chunk, GenerateRequest

CRASH, PROCESS, LONG, HOLD, BEGIN = "crash", "process", "long", "hold", "begin"
WORDS = 400


class TalkingEngine(FakeEngine):
    """``crash``: a defect. ``process``: the id of its process. ``long``: the same, then many words.
    ``hold PATH``: as ``process``, but only once there is such a file. ``begin PATH``: as ``process``,
    and ends once there is such a file."""

    def __init__(self) -> None:
        super().__init__(talk, token_delay_s=0.01)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        verb, _, rest = request.user.partition(" ")
        while verb == HOLD and not Path(rest).exists():  # noqa: ASYNC110  # another process makes it
            await asyncio.sleep(0.02)
        async for chunk in super().generate(request):
            yield chunk
            while verb == BEGIN and not Path(rest).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.02)


def talk(request: GenerateRequest) -> str:
    verb = request.user.split(" ")[0]
    if verb == CRASH:
        raise RuntimeError("a defect in /secret/path at 0x7f0000000000")
    if verb in (PROCESS, LONG, HOLD, BEGIN):
        return str(os.getpid()) + " word" * (WORDS if verb == LONG else 0)
    return "This is a replica."


def broken() -> FakeEngine:
    raise EngineUnavailable("there is no model in the folder tests made up")
