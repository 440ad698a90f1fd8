"""Our real server in front of scripted ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import Settings
from service.wiring import build_engine
from tests.service.engines.remote.scripted import MODEL, Script, Scripted, saying, scripted
from tests.service.harness import Running, running

OBJECT = '{"type":"object","properties":{"count":{"type":"integer"}},"required":["count"],"additionalProperties":false}'
GOOD = '{"count": 3}'


def remote(url: str, **settings: Any) -> Any:
    """The engine that the settings build."""
    options = {"remote_start_s": 0, "remote_connect_s": 5, **settings}
    return build_engine(Settings(engine="remote", remote_url=url, **options))


@asynccontextmanager
async def in_front_of(
    back: Scripted, *, server: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Running]:
    """Our server. settings: of the engine. server: of the server."""
    async with running(remote(back.url, **settings), **(server or {})) as front:
        back.asked.clear()  # those of the warm-up
        yield front


@asynccontextmanager
async def pair(
    script: Script,
    *,
    server: dict[str, Any] | None = None,
    others: dict[str, Script] | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[Running, Scripted]]:
    """Our server, and behind it a scripted one, which answers the warm-up well."""
    async with (
        scripted(saying("Hello"), others=others or {}) as back,
        in_front_of(back, server=server, **settings) as front,
    ):
        back.chat = script
        yield front, back


def question(
    user: str = "How many?", *, schema: str | None = OBJECT, **fields: Any
) -> pb.RunTaskRequest:
    grammar = None if schema is None else pb.Grammar(json_schema=schema)
    task = pb.Task(inline=pb.InlineTask(user=user, grammar=grammar))
    return pb.RunTaskRequest(task=task, **fields)


__all__ = ["GOOD", "MODEL", "OBJECT", "in_front_of", "pair", "question", "remote"]
