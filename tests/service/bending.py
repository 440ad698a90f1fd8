"""A real server whose model wants what a test says, and whose worker processes are those of the service.

The reference engine on the bundled model, whose scores are bent: only the grammar stands between a
wish and the answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from torch import Tensor

from service.client import CHANNEL_OPTIONS, read_error
from service.engines.reference import ReferenceEngine
from service.engines.reference.sampler import Sampler
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.settings import Settings
from service.tasks.registry import load_registry
from service.wiring import build_engine, build_pool
from tests.service.harness import failure, inline, run_request


@dataclass
class Bent:
    """Lets a test say what the model wants.

    script: a text that it wants to write, byte for byte, and then to end. likes: ids that it
    always wants, best first; with both, the script goes first, and it wants no end. wanted, got: how often it wanted
    something, and how often the grammar let it.
    """

    engine: ReferenceEngine
    stub: Any
    table: tuple[bytes, ...]
    special: frozenset[int]
    script: bytes = b""
    likes: list[int] = field(default_factory=list)
    written: dict[int, bytes] = field(default_factory=dict)
    wanted: int = 0
    got: int = 0

    def choose(self, sampler: Sampler, logits: Tensor) -> int:
        """In place of the sampler's choice: a wish that the mask has left, else the best score."""
        written = self.written.get(id(sampler), b"")
        wishes = list(self.likes)
        rest = self.script[len(written) :]
        if rest and self.script.startswith(written):
            fitting = [i for i, piece in enumerate(self.table) if piece and rest.startswith(piece)]
            wishes = sorted(fitting, key=lambda i: -len(self.table[i])) + wishes
        elif self.script and written == self.script and not wishes:
            wishes = sorted(self.special)
        self.wanted += bool(wishes)
        for token in wishes:
            if logits[token] > float("-inf"):
                self.got += 1
                break
        else:
            token = int(logits.argmax())
        self.written[id(sampler)] = written + self.table[token]
        return token

    async def run(self, grammar: Any, max_tokens: int = 120) -> pb.TaskResult:
        return (await self.stub.RunTask(self.request(grammar, max_tokens), timeout=60)).result

    async def failure(self, grammar: Any, max_tokens: int = 120) -> Any:
        return await failure(self.stub.RunTask(self.request(grammar, max_tokens), timeout=60))

    async def outcome(self, grammar: Any, max_tokens: int = 120) -> str | None:
        """The answer as JSON; None for one that was cut, or did not fit."""
        try:
            return (await self.run(grammar, max_tokens)).json
        except grpc.aio.AioRpcError as error:
            assert read_error(error).reason in ("OUTPUT_TRUNCATED", "OUTPUT_INVALID")  # noqa: PT017
            return None

    def request(self, grammar: Any, max_tokens: int) -> pb.RunTaskRequest:
        if not (
            isinstance(grammar, dict) and grammar.keys() <= {"regex", "ebnf", "choice"} and grammar
        ):
            grammar = {"json_schema": json.dumps(grammar)}
        return run_request(inline("Say it.", **grammar), max_tokens=max_tokens)


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[VisionServer, ReferenceEngine, Any]]:
    """A server with all its parts as ``qwen3vl serve`` makes them, its engine, and a stub."""
    chosen = Settings(port=0, **settings)
    engine = build_engine(chosen)
    assert isinstance(engine, ReferenceEngine)
    server = VisionServer(chosen, engine, load_registry(None), pool=build_pool(chosen))
    await server.start()
    try:
        await server.load()
        address = f"127.0.0.1:{server.port}"
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            yield server, engine, VisionServiceStub(channel)
    finally:
        await server.stop(0)


def bent(engine: ReferenceEngine, stub: Any) -> Bent:
    """For an engine that has started."""
    assert engine._model is not None
    chat = engine._model.chat
    return Bent(engine, stub, chat.table, chat.special_ids)
