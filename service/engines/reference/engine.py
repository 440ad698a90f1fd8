"""The reference engine class. torch is imported when the engine starts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.engines.common.closing import closed_error, or_closed
from service.engines.common.context import answer_limit
from service.engines.reference.options import Options, ReferenceSettings
from service.errors import (
    EngineUnavailable,
    Overloaded,
    TooManyImages,
    VisionDisabled,
)
from service.types import (
    TEXT_AND_IMAGES,
    TEXT_ONLY,
    Capabilities,
    Chunk,
    EngineLoad,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Modality,
    Usage,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lmdeploy_ext.packing import PackedRequest
    from service.engines.common.grammar import CompiledGrammar, GrammarCache
    from service.engines.reference.model import Model
    from service.engines.reference.sequence import Event, Piece, Sequence
    from service.engines.reference.worker import Worker

logger = logging.getLogger(__name__)

SAMPLING = frozenset({"max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"})
SHORTEST_DELAY_S = 0.001
"""Text is not kept back for less, in seconds: a timer would do nothing but wake the event loop, and uvloop,
which Ray Serve runs, makes none of it."""


class ReferenceEngine:
    """Runs Qwen3-VL, dense or mixture of experts, in torch, with continuous batching.

    Tokenisation and pre-processing run in a small thread pool, the vision tower and the decoder in
    one thread each. The event loop only passes values between them.

    Args:
        model: a checkpoint folder, or a name on the Hugging Face hub.
        revision: commit, tag or branch on the hub.
        on_progress: called with a short text about the current step of loading, from another
        thread. options: the fields of `Options`. dtype: auto, float32 or bfloat16; auto is the
            checkpoint's own type, but float32 for models up to 1 GiB on a CPU without bfloat16
            instructions. device: auto, cpu or cuda.
            max_batch: requests decoded together. max_queue: requests that may wait for that.
            context_length: tokens of prompt and answer; None takes what the model and the memory
            allow. threads: of the decoder; None takes one for small models, else all cores.
            deepstack: False leaves the DeepStack features away, to see what they are worth.
            vision: False loads no vision tower. prefill_piece: prompt tokens computed between two
            decode steps. cache_bytes: bound of the key-value memory. stall_s: silence of a working
            decoder after which it counts as stalled. loop_guard: see `LoopGuard`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        on_progress: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        self._options = Options(model=model, revision=revision, **options)
        self._on_progress = on_progress or (lambda message: None)
        self._starting = asyncio.Lock()
        self._worker: Worker | None = None
        self._model: Model | None = None
        self._grammars: GrammarCache[CompiledGrammar] | None = None
        self._capabilities: Capabilities | None = None
        self._front = ThreadPoolExecutor(2, thread_name_prefix="front")
        self._sight = ThreadPoolExecutor(1, thread_name_prefix="vision")
        self._closed = asyncio.Event()
        self._live: set[_Answer] = set()
        self._urgent: deque[_Answer] = deque()
        """Answers with an event that may not be kept back."""
        self._text_delay_s = 0.0
        self._releasing: asyncio.TimerHandle | None = None
        self._waking = False
        self._loop: asyncio.AbstractEventLoop

    @property
    def active_requests(self) -> int:
        """Number of requests that are queued or running."""
        return len(self._live)

    @property
    def reserved_rows(self) -> int:
        """Number of key-value cache rows that requests have reserved."""
        return 0 if self._model is None else self._model.cache.runs.used

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the engine. Raises EngineUnavailable before ``start`` has
        returned."""
        if self._capabilities is None:
            raise EngineUnavailable("the engine is not ready yet", reason="ENGINE_LOADING")
        return self._capabilities

    def collect_text(self, delay_s: float) -> None:
        """See `service.engine.CollectsText`."""
        self._text_delay_s = delay_s if delay_s >= SHORTEST_DELAY_S else 0.0

    async def start(self) -> None:
        """Load the model. A second call returns at once."""
        async with self._starting:
            if self._model is not None:
                return
            self._loop = asyncio.get_running_loop()
            self._worker = worker = self._new_worker()
            worker.start()
            model = await or_closed(asyncio.wrap_future(worker.loaded), self._closed)
            self._grammars = self._new_cache(model)
            self._capabilities = self._describe(model)
            self._model = model

    async def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar outside the event loop, or find it in the cache."""
        self._ready()
        await self._compiled(grammar)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Run one request; see `service.engine.Engine.generate`."""
        received = time.monotonic()
        model, worker = self._ready()
        self._check(request)
        joined = self._text_delay_s > 0 and request.joinable
        answer = _Answer(piecewise=request.piecewise, joined=joined)
        self._live.add(answer)
        if self._text_delay_s and self._releasing is None:
            self._releasing = self._loop.call_later(self._text_delay_s, self._release)
        sequence: Sequence | None = None
        try:
            compiled = None if request.grammar is None else await self._compiled(request.grammar)
            prompt, features = await self._prompt(model, request)
            self._ready()
            sampling = request.sampling
            sequence = model.sequence(
                prompt,
                features,
                sampling,
                compiled,
                max_tokens=answer_limit(len(prompt.token_ids), sampling, model.context_length),
                emit=self._emitter(answer),
                received=received,
                guard=self._options.loop_guard,
            )
            worker.submit(sequence)
            while True:
                event = await answer.events.get()
                if isinstance(event, Exception):
                    try:
                        raise event
                    finally:
                        del event  # its traceback references this frame
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            if sequence is None:
                self._live.discard(answer)
            elif not sequence.finished:
                worker.cancel(sequence)

    async def check_health(self) -> None:
        """Return if the decoder makes progress; raise EngineUnavailable otherwise."""
        _, worker = self._ready()
        worker.check(self._options.stall_s)

    async def load(self) -> EngineLoad | None:
        """See `service.engine.TellsLoad`. A request reserves its part of the memory when it begins."""
        if self._model is None or self._worker is None:
            return None
        running, waiting = self._worker.counts
        used = self.reserved_rows / self._model.cache.runs.size
        return EngineLoad(self.capabilities.model, running, waiting, used)

    async def close(self) -> None:
        """Stop the engine and free its memory. Requests in flight end with EngineUnavailable."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._worker is not None:
            self._worker.stop()
            await asyncio.get_running_loop().run_in_executor(None, self._worker.join)
        self._deliver()
        if self._releasing is not None:
            self._releasing.cancel()
        for answer in self._live:
            answer.end(closed_error())
        self._live.clear()
        self._model = self._worker = None
        self._front.shutdown(wait=False)
        self._sight.shutdown(wait=False)
        if self._grammars is not None:
            self._grammars.close()

    def _new_worker(self) -> Worker:
        from service.engines.reference.worker import Worker

        def load() -> Model:
            from service.engines.common.config import resolve_model
            from service.engines.reference.model import load_model

            folder = resolve_model(self._options.model, self._options.revision)
            return load_model(folder, self._options, self._on_progress)

        return Worker(load, self._options.max_batch, self._flush)

    def _new_cache(self, model: Model) -> GrammarCache[CompiledGrammar]:
        from service.engines.common.grammar import GrammarCache

        options = self._options
        return GrammarCache(model.compiler, options.grammar_cache_bytes, options.grammar_threads)

    def _describe(self, model: Model) -> Capabilities:
        options = self._options
        return Capabilities(
            model=Path(options.model).name,
            engine="reference",
            modalities=TEXT_ONLY if model.vision is None else TEXT_AND_IMAGES,
            grammar_kinds=frozenset(GrammarKind),
            sampling_options=SAMPLING,
            context_length=model.context_length,
            max_images=options.max_images if model.vision is not None else 0,
            schema_in_prompt=model.config.schema_in_prompt,
            limits_lengths=True,
            details=model.details() | {"max_batch": str(options.max_batch)},
        )

    def _ready(self) -> tuple[Model, Worker]:
        if self._closed.is_set():
            raise closed_error()
        if self._model is None or self._worker is None:
            raise EngineUnavailable("the engine is not ready yet", reason="ENGINE_LOADING")
        return self._model, self._worker

    def _check(self, request: GenerateRequest) -> None:
        """Checks that need neither the images nor the texts of the request."""
        options = self._options
        if request.all_images and Modality.IMAGE not in self.capabilities.modalities:
            raise VisionDisabled("this server was started without vision; send text only")
        if len(request.all_images) > options.max_images:
            raise TooManyImages(len(request.all_images), options.max_images)
        if len(self._live) >= options.max_queue + options.max_batch:
            raise Overloaded("too many requests are waiting; try again later", retry_after_s=1.0)

    async def _compiled(self, grammar: Grammar) -> CompiledGrammar:
        if self._grammars is None:
            raise closed_error()
        return await or_closed(self._grammars.get(grammar), self._closed)

    async def _prompt(
        self, model: Model, request: GenerateRequest
    ) -> tuple[PackedRequest, tuple[Tensor, ...]]:
        """Pack the prompt and encode its images, in separate threads, then release the images."""
        prompt = await or_closed(model.prompts.pack(request, self._front), self._closed)
        if not prompt.images or model.vision is None:
            return prompt, ()
        encode = asyncio.get_running_loop().run_in_executor(
            self._sight, model.vision.features, prompt.images
        )
        features = await or_closed(encode, self._closed)
        return replace(prompt, images=()), features

    def _emitter(self, answer: _Answer) -> Callable[[Event], None]:
        """What the worker calls with the events of a request."""
        arrived, outbox = answer.arrived, self._urgent
        collects = self._text_delay_s > 0
        first = answer.piecewise

        def emit(event: Event) -> None:
            nonlocal first
            arrived.append(event)
            if first or not collects or not isinstance(event, tuple):
                first = False
                outbox.append(answer)

        return emit

    def _flush(self) -> None:
        """Called by the worker after every turn: let the event loop deliver the emitted events."""
        if not self._urgent or self._waking:
            return
        self._waking = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            logger.debug("the event loop is closed; an answer is dropped")

    def _deliver(self) -> None:
        """Deliver the answers with an event that may not be kept back; with them, to wake nobody twice,
        also text of which the delay has half passed."""
        self._waking = False
        while self._urgent:
            answer = self._urgent.popleft()
            if answer in self._live and answer.release():
                self._live.discard(answer)
        due = self._releasing
        if due is not None and due.when() - self._loop.time() < self._text_delay_s / 2:
            due.cancel()
            self._release()

    def _release(self) -> None:
        """Deliver the text that was kept back, again and again while there are requests."""
        self._releasing = None
        freed = [one for one in self._live if one.piecewise and one.release()]
        self._live.difference_update(freed)
        if self._live:
            self._releasing = self._loop.call_later(self._text_delay_s, self._release)


class _Answer:
    """Events of a request that are not read, and behind them those that have arrived from the worker
    and are not delivered.

    piecewise: text is delivered before the end. joined: text that is delivered together is one chunk,
    because every chunk costs each layer above time.
    """

    def __init__(self, *, piecewise: bool, joined: bool) -> None:
        self.piecewise = piecewise
        self.arrived: deque[Event] = deque()
        self.events: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self._joined = joined

    def release(self) -> bool:
        """Deliver what has arrived. Returns whether the memory of the request is free."""
        texts: list[str] = []
        last: Piece
        freed = False
        while self.arrived:  # the worker may append at any time
            event = self.arrived.popleft()
            if isinstance(event, tuple):
                texts.append(event[0])
                last = event
                if self._joined:
                    continue
            if texts and isinstance(event, Chunk):
                event = replace(event, text="".join((*texts, event.text)))
            elif texts:
                self.events.put_nowait(_chunk(texts, last))
            texts.clear()
            if event is None:
                freed = True
            elif not isinstance(event, tuple):
                self.events.put_nowait(event)
        if texts:
            self.events.put_nowait(_chunk(texts, last))
        return freed

    def end(self, error: Exception) -> None:
        """Deliver what has arrived, and behind it the error."""
        self.release()
        self.events.put_nowait(error)


def _chunk(texts: list[str], last: Piece) -> Chunk:
    return Chunk("".join(texts), usage=Usage(*last[1:]))


def build(
    model: str | Path,
    settings: ReferenceSettings,
    *,
    revision: str | None,
    max_images: int,
    on_progress: Callable[[str], None] | None,
) -> ReferenceEngine:
    """Build the engine for the registry; see `service.engines.kind.Build`."""
    return ReferenceEngine(
        model,
        revision=revision,
        max_images=max_images,
        on_progress=on_progress,
        **settings.model_dump(),
    )
