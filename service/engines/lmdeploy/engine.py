"""The engine class for LMDeploy. LMDeploy and torch are imported when the engine starts."""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy_ext.deepstack.state import Mode
from lmdeploy_ext.lengths import modes as lengths
from service.engines.common.closing import closed_error, or_closed
from service.engines.lmdeploy.options import LENGTHS_COUNTED, LMDeploySettings, Options
from service.errors import (
    EngineUnavailable,
    InternalError,
    Overloaded,
    TooManyImages,
    VisionDisabled,
)
from service.types import (
    Capabilities,
    Chunk,
    EngineLoad,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Sampling,
)

if TYPE_CHECKING:
    from service.engines.lmdeploy.guidance import Constraint
    from service.engines.lmdeploy.loading import Loaded
    from service.engines.lmdeploy.running import Run

logger = logging.getLogger(__name__)

NOT_INSTALLED = (
    "LMDeploy is not installed. It runs on Linux on x86-64 with NVIDIA GPUs; neither the cpu image nor "
    "an installation on another system has it. Use --engine reference, or the cuda image"
)
HEALTH_LIMIT_S = 5.0
PROBE = Grammar(
    GrammarKind.CHOICE,
    '["guided-decoding-is-on-4711"]',
    ebnf='root ::= "guided-decoding-is-on-4711"',
    forces_little=True,
)
"""What no model says by itself."""
LENGTHS_PROBE = Grammar(
    GrammarKind.JSON_SCHEMA,
    '{"type": "string", "pattern": "^x*$", "minLength": 5, "maxLength": 5}',
    ebnf='root ::= "\\"" "x"* "\\""',
    lengths=struct.pack(
        "<27i",
        *(2, 2, 0, 0, 0, 1, 5),
        *(0, 2**31 - 1, -1, 0, 2**31 - 1, -1, 0, 0, 0, 0),
        *(5, 5, -1, 0, 2**31 - 1, -1, 0, 0, 0, 0),
    ),
)
"""A string of five letters x, of which the grammar allows any number."""
LENGTHS_PROBE_ANSWER = '"xxxxx"'


class LMDeployEngine:
    """Runs Qwen3-VL on LMDeploy's TurboMind or PyTorch engine.

    Args:
        model: a checkpoint folder, or a name on the Hugging Face hub.
        on_progress: called with a short text about the current step of loading, from another
        thread. load: starts the host; tests replace it. options: the
        fields of `Options`. backend: turbomind, pytorch, or auto: TurboMind, but
            PyTorch where TurboMind cannot be given DeepStack, which images need. deepstack: auto,
            require or off, see `lmdeploy_ext.deepstack`. string_lengths: the same for lengths of
            strings, see `lmdeploy_ext.lengths`. vision: False loads no tower.
            tensor_parallel: GPUs. context_length: tokens of prompt and answer; None is the model's
            own. max_batch: requests decoded together. max_queue: requests that may wait for that.
            cache_share: of the memory that the weights leave free, for keys and values.
            cache_type: none (the model's own), int8, int4 or fp8. prefill_chunk: prompt tokens in
            one pass. image_pixels: most pixels of an image after resizing. vision_batch:
            images in the engine that have not been looked at yet. grammar_cache_bytes: bound of
            the compiled grammars, by estimate. check_guidance: prove at the start that grammars
            are obeyed. stall_s: silence after which a working engine counts as stalled.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        on_progress: Callable[[str], None] | None = None,
        load: Callable[[Options, Callable[[str], None]], Loaded] | None = None,
        **options: Any,
    ) -> None:
        self._options = Options(model=model, **options)
        self._on_progress = on_progress or (lambda message: None)
        self._load = load
        self._starting = asyncio.Lock()
        self._closed = asyncio.Event()
        self._loaded: Loaded | None = None
        self._capabilities: Capabilities | None = None
        self._front = _front()
        self._ids = itertools.count(1)
        self._live: dict[int, Run | None] = {}
        self._seen = (0, 0)
        self._progress_at = time.monotonic()
        self._tokens = 0

    @property
    def active_requests(self) -> int:
        """Number of requests in the queue or inside LMDeploy."""
        return len(self._live)

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the engine. Raises EngineUnavailable before ``start`` has
        returned."""
        if self._capabilities is None:
            raise EngineUnavailable("the engine is not ready yet", reason="ENGINE_LOADING")
        return self._capabilities

    async def start(self) -> None:
        """Load the model and verify that it obeys grammars. A second call returns at once."""
        async with self._starting:
            if self._capabilities is not None:
                return
            self._loaded = loaded = await self._load_in_thread()
            try:
                await loaded.host.start()
                if self._options.check_guidance:
                    self._on_progress("checking guided decoding")
                    await self._check_guidance(loaded)
                    if loaded.capabilities.limits_lengths:
                        await self._check_lengths(loaded)
            except BaseException:
                self._loaded = None
                self._front.shutdown(wait=False)
                self._front = _front()  # the caller may start the engine again
                await loaded.close()
                raise
            self._capabilities = loaded.capabilities
            self._on_progress("ready")

    async def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar outside the event loop, or find it in the cache."""
        loaded = self._ready()
        await or_closed(loaded.grammars.get(grammar), self._closed)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Run one request; see `service.engine.Engine.generate`."""
        loaded = self._ready()
        self._check(request, loaded)
        async with aclosing(self._answer(request, loaded)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def check_health(self) -> None:
        """Return while LMDeploy is alive and makes progress; raise EngineUnavailable otherwise."""
        native = self._ready().host.native
        try:
            status = await asyncio.wait_for(native.get_health_status(), HEALTH_LIMIT_S)
        except asyncio.TimeoutError:
            raise EngineUnavailable("the engine does not answer", reason="ENGINE_STALLED") from None
        if not status["alive"]:
            logger.error("LMDeploy is not alive: %s", status["message"])
            raise EngineUnavailable("the engine has stopped", reason="ENGINE_DEAD")
        metrics = status["schedule_metrics"]
        seen = (self._tokens, 0 if metrics is None else metrics.scheduler_tick)
        now = time.monotonic()
        working = any(run is not None for run in self._live.values())
        if seen != self._seen or not working:
            self._seen, self._progress_at = seen, now
        silence = now - self._progress_at
        if silence > self._options.stall_s:
            raise EngineUnavailable(
                f"the engine has made no progress for {silence:.0f} s", reason="ENGINE_STALLED"
            )

    async def load(self) -> EngineLoad | None:
        """See `service.engine.TellsLoad`; as LMDeploy's scheduler tells it."""
        loaded = self._loaded
        if loaded is None:
            return None
        status = await loaded.host.native.get_health_status()
        found = status["schedule_metrics"]
        if found is None:
            return None
        model = loaded.capabilities.model
        return EngineLoad(model, found.active_seqs, found.waiting_seqs, found.cache_usage)

    async def close(self) -> None:
        """Stop the engine and free its memory. Requests in flight end with EngineUnavailable."""
        if self._closed.is_set():
            return
        self._closed.set()
        runs = [run for run in self._live.values() if run is not None]
        await asyncio.gather(*(run.stop() for run in runs))
        self._front.shutdown(wait=False)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            await loaded.close()

    async def _load_in_thread(self) -> Loaded:
        """Load in a daemon thread, which does not delay the exit of the process."""
        loading: Future[Loaded] = Future()
        loading.set_running_or_notify_cancel()

        def work() -> None:
            try:
                loading.set_result((self._load or _load)(self._options, self._on_progress))
            except BaseException as error:  # passed to the caller that waits for the model
                loading.set_exception(error)

        threading.Thread(target=work, name="lmdeploy-loading", daemon=True).start()
        try:
            return await or_closed(asyncio.wrap_future(loading), self._closed)
        except BaseException:
            loading.add_done_callback(_free)
            raise

    def _ready(self) -> Loaded:
        if self._closed.is_set():
            raise closed_error()
        if self._loaded is None or self._capabilities is None:
            raise EngineUnavailable("the engine is not ready yet", reason="ENGINE_LOADING")
        return self._loaded

    def _check(self, request: GenerateRequest, loaded: Loaded) -> None:
        """Checks that need neither the images nor the texts of the request."""
        options = self._options
        if request.all_images and not options.vision:
            raise VisionDisabled("this server was started without vision; send text only")
        if len(request.all_images) > options.max_images:
            raise TooManyImages(len(request.all_images), options.max_images)
        loaded.check_sampling(request.sampling)
        if len(self._live) >= options.max_queue + options.max_batch:
            raise Overloaded("too many requests are waiting; try again later", retry_after_s=1.0)

    async def _answer(
        self, request: GenerateRequest, loaded: Loaded
    ) -> AsyncGenerator[Chunk, None]:
        """Prepare a request, run it inside LMDeploy, and remove it from LMDeploy at the end."""
        number = next(self._ids)
        reader = loaded.reader(request, time.monotonic())
        place = loaded.gate.place(len(request.all_images))
        run: Run | None = None
        self._live[number] = None
        try:
            constraint = await self._constraint(loaded, request.grammar)
            packed = await or_closed(loaded.pack(request, self._front), self._closed)
            limit = loaded.answer_limit(packed, request)
            await or_closed(place.enter(), self._closed)
            run = loaded.run(number, packed, request, constraint, limit)
            self._live[number] = run
            reader.begin(packed.prompt, limit)
            del packed  # the engine has its own copy of the pixels
            async with aclosing(run.outputs()) as outputs:
                async for output in outputs:
                    place.leave()
                    self._tokens += len(output.token_ids)
                    chunk = reader.read(output)
                    if chunk is None:
                        continue
                    if chunk.finish_reason is not None:
                        await run.stop()
                        yield chunk
                        return
                    yield chunk
            raise EngineUnavailable("the engine ended a request without an answer; try again")
        except Exception:
            if self._closed.is_set():
                raise closed_error() from None
            raise
        finally:
            place.leave()
            await self._leave(loaded, number, run)

    async def _leave(self, loaded: Loaded, number: int, run: Run | None) -> None:
        """End a request inside LMDeploy. The request counts as active until LMDeploy has released
        it."""

        def gone() -> None:
            self._live.pop(number, None)
            loaded.host.drop(number)

        if run is None:
            gone()
            return
        try:
            await run.stop()
        finally:
            run.when_ended(gone)

    async def _constraint(self, loaded: Loaded, grammar: Grammar | None) -> Constraint | None:
        """The compiled grammar. A request with a grammar never runs without its grammar."""
        if grammar is None:
            return None
        return await or_closed(loaded.grammars.get(grammar), self._closed)

    async def _check_guidance(self, loaded: Loaded) -> None:
        """Run one request under a grammar that allows only one answer.

        Raises EngineUnavailable when the answer is a different one.
        """
        request = GenerateRequest(
            "guidance", "Say no.", grammar=PROBE, sampling=Sampling(max_tokens=64)
        )
        async with aclosing(self._answer(request, loaded)) as chunks:
            text = "".join([chunk.text async for chunk in chunks])
        if f'["{text}"]' != PROBE.source:
            logger.error("guided decoding is off: a forced answer came out as %r", text[:80])
            raise EngineUnavailable(
                "LMDeploy does not obey grammars on this machine, so answers could not be trusted "
                "to fit; its log may say why"
            )

    async def _check_lengths(self, loaded: Loaded) -> None:
        """Run one request for a string of a length that only the limits beside its grammar know.

        Where the answer has another length, lengths are counted in grammars from now on.

        Raises EngineUnavailable where the options require limits.
        """
        request = GenerateRequest(
            "lengths", "Say no.", grammar=LENGTHS_PROBE, sampling=Sampling(max_tokens=64)
        )
        try:
            async with aclosing(self._answer(request, loaded)) as chunks:
                text = "".join([chunk.text async for chunk in chunks])
        except InternalError as error:
            text = f"({error})"
        if text == LENGTHS_PROBE_ANSWER:
            return
        logger.error("limits of strings are not kept: a string of 5 came out as %r", text[:80])
        problem = "an answer of 5 characters came out with another length"
        try:
            lengths.give_up(Mode(self._options.string_lengths), problem)
        except lengths.LengthsUnavailable as error:
            raise EngineUnavailable(str(error)) from error
        details = {**loaded.capabilities.details, "string_lengths": LENGTHS_COUNTED}
        loaded.capabilities = replace(loaded.capabilities, limits_lengths=False, details=details)


def _front() -> ThreadPoolExecutor:
    """The threads that prepare prompts; started with the first request."""
    return ThreadPoolExecutor(2, thread_name_prefix="front")


def _load(options: Options, on_progress: Callable[[str], None]) -> Loaded:
    # LMDeploy's import sets every stream handler of the root logger to ERROR.
    levels = [(handler, handler.level) for handler in logging.getLogger().handlers]
    from service.engines.lmdeploy.loading import load

    for handler, level in levels:
        handler.setLevel(level)
    return load(options, on_progress)


def _free(loading: Future[Loaded]) -> None:
    """Free a model that finished loading after the engine was closed."""
    if loading.exception() is None:
        loading.result().host.native.close()


def build(
    model: str | Path,
    settings: LMDeploySettings,
    *,
    revision: str | None,
    max_images: int,
    on_progress: Callable[[str], None] | None,
) -> LMDeployEngine:
    """Build the engine for the registry; see `service.engines.kind.Build`.

    Raises ValueError if LMDeploy is not installed.
    """
    if find_spec("lmdeploy") is None:
        raise ValueError(f"engine: {NOT_INSTALLED}")
    return LMDeployEngine(
        model,
        revision=revision,
        max_images=max_images,
        on_progress=on_progress,
        **settings.model_dump(),
    )
