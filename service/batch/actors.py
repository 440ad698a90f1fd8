"""The classes that Ray Data runs in its actors, each with an engine inside."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from service.batch.counts import ShardCounter
from service.batch.engine import BatchEngine, Work
from service.batch.errors import BatchError
from service.batch.outputs import Output, with_answers
from service.batch.request import read_request, work_of
from service.errors import ServiceError
from service.settings import UNSERVED, Settings, load_settings


class ShardActor:
    """Answers shards and writes their files. A batch is one shard, as the bytes of its piece.

    settings: of the engine and the limits; the weights are loaded here, they are never sent.
    board: handle of the `Board` of the run.
    """

    def __init__(self, settings: Settings, work: Work, output: str, count: int, board: Any) -> None:
        self._work, self._output, self._count, self._board = work, Output(output), count, board
        import ray

        self._engine: BatchEngine | None = None
        # An error here would be for the next call: Ray prints errors of constructors.
        if not ray.get(board.start.remote()):
            return
        try:
            self._engine = BatchEngine(settings, lambda note: board.tell.remote(note))
        except ServiceError as error:
            self._fail(error.message)
        except Exception as error:
            traceback.print_exc()  # into the log of this process
            self._fail(f"the engine cannot be started: {type(error).__name__}: {error}")

    def __call__(self, batch: pa.Table) -> pa.Table:
        for shard in batch.to_pylist():
            self._answer(shard["shard"], pickle.loads(shard["piece"]))
        return batch.select(["shard"])

    def _answer(self, number: int, piece: Any) -> None:
        if self._engine is None:
            raise BatchError("the engine could not be started")
        counter = ShardCounter(partial(self._board.report.remote, number))
        try:
            table = self._engine.shard(self._work, piece, counter.row)
            self._output.write(number, self._count, table)
        except BatchError as error:
            self._fail(str(error))
            raise
        except Exception as error:
            traceback.print_exc()  # into the log of this process
            self._fail(f"shard {number} cannot be answered: {type(error).__name__}: {error}")
            raise
        import ray

        ray.get(self._board.finish.remote(number, counter.counts))

    def _fail(self, text: str) -> None:
        import ray

        ray.get(self._board.fail.remote(text))  # the driver reads it there


class Answers:
    """For ``ds.map_batches`` in a pipeline of your own: adds the columns of the answers to a batch.

    Give it to ``map_batches`` with ``batch_format="pyarrow"`` and ``fn_constructor_kwargs``. A row with
    an image that cannot be used gets ``error_reason`` and ``error_message``.

    task: name of a registered task; or a prompt, with or without the text of a JSON Schema.
    image_column: column with the bytes of an image, or with a list of them. It is left out of the
        result.
    settings: settings of `qwen3vl serve`, such as ``{"engine": "lmdeploy"}``; variables
        ``QWEN3VL_…`` of the actor's environment apply, too.
    sampling: options of sampling, such as ``{"max_tokens": 200}``.
    """

    def __init__(
        self,
        *,
        task: str | None = None,
        prompt: str | None = None,
        schema: str | None = None,
        image_column: str = "image",
        settings: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        chosen = load_settings(**UNSERVED, **(settings or {}))
        request = read_request(task=task, prompt=prompt, schema=schema, sampling=sampling or {})
        self._work = work_of(request, chosen)
        self._column = image_column
        self._engine = BatchEngine(chosen, lambda note: None)

    def __call__(self, batch: pa.Table) -> pa.Table:
        images = batch.column(self._column).to_pylist()
        rows = self._engine.rows(self._work, [_loads(image) for image in images])
        return with_answers(batch.drop_columns([self._column]), rows, self._work.columns)

    def close(self) -> None:
        """Close the engine. Ray ends its actors without this."""
        self._engine.close()


def _loads(image: Any) -> list[Any]:
    given = image if isinstance(image, list) else [image]
    return [partial(_bytes, one) for one in given]


def _bytes(data: bytes | None) -> bytes:
    return data or b""
