"""Answers rows in this process: the engine and the pipeline of a server, without its ports.

A row is a call like any other. It takes the same path through ``service.runtime`` and
``service.inference`` as a call over gRPC, so its answer and its errors are the same.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from service import heap
from service.batch.errors import BatchError
from service.batch.outputs import AnswerColumns, with_answers
from service.batch.sources import Load, Piece
from service.errors import (
    BackEndFailed,
    EngineUnavailable,
    GrammarError,
    Overloaded,
    UnknownModel,
    UnknownTask,
    VisionDisabled,
)
from service.grpc_api.image_codec import decode_images
from service.inference.calls import Answer, Call
from service.inference.memory import MemoryBudget
from service.lifecycle import Phase
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.refusals import refusal_of
from service.runtime import Runtime
from service.settings import Settings
from service.tasks.image_analysis import ImageAnalysis
from service.types import EncodedImage
from service.wiring import build_engines, build_registry

READERS = 16
"""Threads that read image files."""
RETRY_S = 1.0
TRIES = 5
"""How often a row is tried while the engine cannot be used."""
OF_THE_RUN = (GrammarError, UnknownTask, UnknownModel, VisionDisabled, BackEndFailed)
REASONS_OF_THE_RUN = frozenset(
    ("INVALID_FIELD", "UNKNOWN_FIELD", "SAMPLING_OPTION_INVALID", "TEXT_EMPTY", "TEXT_TOO_LONG")
)
"""Errors that every row would have: of the task, the options or the set-up. They end the run."""


@dataclass(frozen=True)
class Work:
    """What is done with every row.

    call: its last image stands for the images of the row; those before it are of examples.
    columns: the columns of the answers.
    """

    call: Call
    columns: AnswerColumns


Row = dict[str, Any]
"""The columns of one answer; those that are missing are null."""
OnRow = Callable[[Row], None]


class BatchEngine:
    """An engine that answers rows, with an event loop in a thread of its own. Its methods may be
    called from several threads at the same time; their rows then share the engine.

    on_progress: told about the steps of loading, from any thread.
    """

    def __init__(self, settings: Settings, on_progress: Callable[[str], None]) -> None:
        heap.limit()
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="batch", daemon=True)
        self._thread.start()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read-image")
        try:
            self._wait(self._start(on_progress))
        except BaseException:
            self._end_thread()
            raise

    def shard(self, work: Work, piece: Piece, on_row: OnRow) -> pa.Table:
        """Answer the rows of a piece, in order. Raises ``BatchError`` if the run cannot go on."""
        return self._wait(self._shard(work, piece, on_row))

    def rows(self, work: Work, images: Sequence[Sequence[Load]]) -> list[Row]:
        """Answer rows. images: those of each row."""
        answered: list[Row] = self._wait(self._rows(work, images))
        return answered

    def close(self) -> None:
        """Close the engine and end the thread."""
        self._wait(self._stop())
        self._end_thread()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._readers.shutdown()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, on_progress: Callable[[str], None]) -> None:
        settings = self._settings
        engines = build_engines(settings, on_progress)
        self._runtime = Runtime(settings, engines, build_registry(settings))
        # A few more than the engine has slots, so that their images are read and checked meanwhile.
        self._room = asyncio.Semaphore(settings.slots + max(2, settings.slots // 4))
        self._bytes = MemoryBudget(settings.max_encoded_bytes)
        ready = asyncio.Event()
        self._running = asyncio.create_task(self._runtime.run([], ready.set))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait((self._running, waiting), return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            waiting.cancel()
            await self._runtime.stop(0)
            self._running.result()
        self._running.add_done_callback(_end)

    async def _stop(self) -> None:
        self._running.cancel()
        await self._runtime.stop(0)

    async def _shard(self, work: Work, piece: Piece, on_row: OnRow) -> pa.Table:
        keys: list[pa.Table] = []
        answering: list[asyncio.Task[Row]] = []
        unseen = deque[asyncio.Task[Row]]()
        rows = piece.read(self._settings.max_image_bytes)
        try:
            while (some := await asyncio.to_thread(next, rows, None)) is not None:
                keys.append(some.keys)
                for loads in some.images:
                    answering.append(await self._begin(work, loads, on_row))
                    unseen.append(answering[-1])
                    while unseen and unseen[0].done():
                        unseen.popleft().result()
            answers = await asyncio.gather(*answering)
        except (pa.ArrowInvalid, OSError) as error:
            raise BatchError(f"the input cannot be read: {error}") from None
        finally:
            for one in answering:
                one.cancel()
        return await asyncio.to_thread(with_answers, pa.concat_tables(keys), answers, work.columns)

    async def _rows(self, work: Work, images: Sequence[Sequence[Load]]) -> list[Row]:
        answering = [await self._begin(work, loads, lambda row: None) for loads in images]
        try:
            return list(await asyncio.gather(*answering))
        finally:
            for one in answering:
                one.cancel()

    async def _begin(self, work: Work, loads: Sequence[Load], on_row: OnRow) -> asyncio.Task[Row]:
        """Begin to answer a row when there is room for it."""
        await self._room.acquire()
        task = asyncio.create_task(self._row(work, loads, on_row))
        task.add_done_callback(lambda _: self._room.release())
        return task

    async def _row(self, work: Work, loads: Sequence[Load], on_row: OnRow) -> Row:
        for left in reversed(range(TRIES)):
            try:
                row = _row_of(await self._answer(work.call, loads), work.columns)
                break
            except Exception as error:
                refused = refusal_of(error, "batch")
                if isinstance(refused, OF_THE_RUN) or refused.reason in REASONS_OF_THE_RUN:
                    raise BatchError(f"{refused.reason}: {refused.message}") from None
                if isinstance(refused, (EngineUnavailable, Overloaded)):
                    if not left:
                        raise BatchError(f"{refused.reason}: {refused.message}") from None
                    await self._until_usable()
                    continue
                row = {"error_reason": refused.reason, "error_message": refused.message}
                break
        on_row(row)
        return row

    async def _answer(self, template: Call, loads: Sequence[Load]) -> Answer:
        read = self._loop.run_in_executor
        data = [await read(self._readers, load) for load in loads]
        async with self._bytes.hold(min(sum(map(len, data)), self._bytes.largest)):
            examples = template.images[:-1]
            most = self._settings.max_images
            shown = decode_images([pb.Image(data=one) for one in data], most)
            if examples:  # the row's images come after them, in the last message
                field = template.images[-1].field
                shown = tuple(replace(one, field=field) for one in shown)
            call = replace(template, images=(*map(_copy, examples), *shown))
            with self._runtime.observation.call("batch", "batch"):
                return await self._runtime.inference_for().answer(call, None)

    async def _until_usable(self) -> None:
        """Wait while the engine is unhealthy. If it does not recover, the process ends."""
        await asyncio.sleep(RETRY_S)
        while self._runtime.lifecycle.phase is not Phase.SERVING:  # noqa: ASYNC110
            await asyncio.sleep(RETRY_S)


def _row_of(answer: Answer, columns: AnswerColumns) -> Row:
    row: Row = {"json": answer.json} if columns.json else {"text": answer.text}
    if columns.analysis and isinstance(answer.value, ImageAnalysis):
        row |= {name: _plain(value) for name, value in asdict(answer.value).items()}
    usage = answer.usage
    return row | {
        "prompt_tokens": usage.prompt_tokens,
        "image_tokens": usage.image_tokens,
        "output_tokens": usage.output_tokens,
        "attempts": answer.attempts,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _copy(image: EncodedImage) -> EncodedImage:
    """A copy, because the bytes of a call are released when it ends."""
    return replace(image)


def _end(running: asyncio.Task[None]) -> None:
    """The engine does not recover: end this process, so that Ray starts another one. Of a run that
    is stopped, the task was cancelled."""
    if running.cancelled():
        return
    print(f"the engine does not recover: {running.exception()}", file=sys.stderr, flush=True)
    os._exit(1)
