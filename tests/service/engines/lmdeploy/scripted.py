"""LMDeploy's engine objects without LMDeploy's engines: the reference model behind their face.

`Scripted` has the methods of ``TurboMind`` (or of the PyTorch ``Engine``) that the service uses, and
computes with the reference decoder from nothing but what it is handed: token ids, spans, grids,
pixels, a ``GenerationConfig``, a compiled grammar. So an answer is right only if all of these were.
What LMDeploy does and its documentation does not say is done here, too: a cancelled request still
has a last output, and the end token is among the tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import xgrammar
from lmdeploy._guided_decoding import compile_response_format
from lmdeploy.messages import (
    EngineEvent,
    EngineOutput,
    EventType,
    RequestMetrics,
    ResponseType,
    ScheduleMetrics,
)
from lmdeploy.vl.constants import Modality

from lmdeploy_ext.families import QWEN3_VL
from lmdeploy_ext.mrope import mrope_positions
from lmdeploy_ext.packing import PackedImage, PackedRequest
from service.engines.common.grammar import CompiledGrammar
from service.engines.common.loops import LoopGuard
from service.engines.lmdeploy import LMDeployEngine
from service.engines.lmdeploy.building import turbomind_config
from service.engines.lmdeploy.hosts import Host, PyTorchHost, TurboMindHost
from service.engines.lmdeploy.loading import Loaded, assemble
from service.engines.lmdeploy.options import Options
from service.engines.reference.model import Model, load_model
from service.engines.reference.options import Options as ReferenceOptions
from service.engines.reference.sequence import Event, Sequence
from service.engines.reference.worker import Worker
from service.types import Chunk, FinishReason, Sampling


class Module:
    """The grammar compiler of TurboMind's extension module, with its signatures."""

    @staticmethod
    def TokenizerInfo(
        vocab: list[bytes], kind: int, size: int, stop_ids: list[int], prefix_space: bool
    ) -> Any:
        assert (kind, prefix_space) == (0, False)
        return xgrammar.TokenizerInfo(
            vocab, xgrammar.VocabType.RAW, vocab_size=size, stop_token_ids=stop_ids
        )

    @staticmethod
    def GrammarCompiler(info: Any, threads: int, cache: bool, limit: int) -> Any:
        return xgrammar.GrammarCompiler(info, max_threads=threads, cache_enabled=cache)


class Scripted:
    """An engine of LMDeploy on the reference model.

    deaf: guided decoding is off, as LMDeploy leaves it after an error.
    others: the model is in other processes, so that its guided decoding cannot be reached.
    """

    def __init__(
        self, folder: Path, options: Options, *, deaf: bool = False, others: bool = False
    ) -> None:
        reference = ReferenceOptions(folder, threads=1, vision=options.vision,
                                     context_length=options.context_length)  # fmt: skip
        self.deaf = deaf
        self.alive = True
        self.engine_config = turbomind_config(options, options.context_length or 1024, QWEN3_VL)
        self.instances: list[Instance] = []
        self.tick = 0
        self.active: set[int] = set()
        self.cancelled_at: list[float] = []
        self._woken: set[Callable[[], None]] = set()
        self._worker = Worker(
            lambda: load_model(folder, reference, lambda message: None),
            options.max_batch,
            self._wake,
        )
        self._worker.start()
        self.model: Model = self._worker.loaded.result()
        size = self.model.config.vocab_size
        manager = SimpleNamespace(compiler=None, vocab_size=size)
        agent = None if others else SimpleNamespace(guided_decoding_manager=manager)
        self.executor = SimpleNamespace(model_agent=agent)
        self.stock_compiler = self.model.compiler._compiler

    def create_instance(self) -> Instance:
        self.instances.append(Instance(self))
        return self.instances[-1]

    def start_loop(self) -> bool:
        return True

    async def get_health_status(self) -> dict[str, Any]:
        metrics = ScheduleMetrics(active_seqs=len(self.active), scheduler_tick=self.tick)
        return {"alive": self.alive, "message": "as scripted", "schedule_metrics": metrics}

    def close(self) -> None:
        assert not self.active, "LMDeploy does not end requests when it is closed"
        self._worker.stop()
        self._worker.join()

    def _wake(self) -> None:
        self.tick += 1
        for wake in list(self._woken):
            wake()

    def submit(self, sequence: Sequence, wake: Callable[[], None]) -> None:
        self._woken.add(wake)
        self._worker.submit(sequence)

    def cancel(self, sequence: Sequence) -> None:
        self.cancelled_at.append(time.monotonic())
        self._worker.cancel(sequence)

    def forget(self, wake: Callable[[], None]) -> None:
        self._woken.discard(wake)


class Instance:
    """``TurboMindInstance`` and ``EngineInstance`` in one."""

    def __init__(self, native: Scripted) -> None:
        self._native = native
        self._grammar: Any = None
        self._sequence: Sequence | None = None
        self.arguments: dict[str, Any] = {}
        self.model_inst = SimpleNamespace(set_grammar=self._set_grammar)

    def _set_grammar(self, grammar: Any) -> None:
        self._grammar = grammar

    async def async_cancel(self, session_id: int) -> None:
        assert self._sequence is not None, "cancelled before it was sent"
        self._native.cancel(self._sequence)

    async def async_stream_infer(
        self, session_id: int, **arguments: Any
    ) -> AsyncGenerator[EngineOutput, None]:
        native, config = self._native, arguments["gen_config"]
        self.arguments = arguments
        assert session_id not in native.active, "a session that is repeated"
        native.active.add(session_id)
        events: list[Event] = []
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        try:
            grammar = self._constraint(config)
            sequence = self._new_sequence(arguments, grammar, events.append)
            self._sequence = sequence
            native.submit(sequence, wake)
            sent, first = 0, True
            while True:
                await changed.wait()
                changed.clear()
                end = _end(events)
                ids = sequence.answer[sent:]
                sent += len(ids)
                if end is FinishReason.STOP:
                    ids = [*ids, config.stop_token_ids[0]]
                if ids or end is not None:
                    output = EngineOutput(_status(end), ids)
                    if first:
                        output.req_metrics, first = _metrics(), False
                    yield output
                if end is not None:
                    return
        finally:
            native.forget(wake)
            native.active.discard(session_id)

    def _constraint(self, config: Any) -> Any:
        if self._native.deaf:
            return None
        if config.response_format is None:
            return self._grammar
        agent = self._native.executor.model_agent
        compiler = (
            self._native.stock_compiler if agent is None else agent.guided_decoding_manager.compiler
        )
        return compile_response_format(compiler, config.response_format)

    def _new_sequence(
        self, arguments: dict[str, Any], grammar: Any, emit: Callable[[Event], None]
    ) -> Sequence:
        model, config = self._native.model, arguments["gen_config"]
        assert sorted(config.stop_token_ids) == sorted(model.config.stop_ids)
        prompt = unpacked(arguments["input_ids"], arguments["multimodal"] or [])
        features = model.vision.features(prompt.images) if prompt.images and model.vision else ()
        sampling = Sampling(
            config.max_new_tokens, config.temperature, config.top_p, config.top_k,
            config.repetition_penalty, config.random_seed,
        )  # fmt: skip
        compiled = None if grammar is None else CompiledGrammar(grammar, False, False)
        return model.sequence(
            prompt, features, sampling, compiled,
            max_tokens=config.max_new_tokens, emit=emit, received=0.0, guard=LoopGuard(window=0),
        )  # fmt: skip


def unpacked(ids: list[int], items: list[dict[str, Any]]) -> PackedRequest:
    """The packed request again, from what LMDeploy gets."""
    images, spans = [], []
    for item in items:
        assert item["modality"] is Modality.IMAGE
        pixels = item["pixel_values"].float()
        still = pixels.reshape(len(pixels), 3, 2, -1)
        assert torch.equal(still[:, :, 0], still[:, :, 1]), "both frames of a still image"
        values = ((still[:, :, 0] * 0.5 + 0.5) * 255).round().to(torch.uint8)
        grid = tuple(item["image_grid_thw"].tolist())
        images.append(PackedImage(values.reshape(len(pixels), -1).numpy(), grid))
        spans.append(item["offset"])
        assert set(ids[slice(*item["offset"])]) == {item["image_token_id"]}
    positions, delta = mrope_positions(len(ids), spans, [image.grid for image in images], 2)
    return PackedRequest(np.array(ids, np.int32), tuple(spans), tuple(images), positions, delta)


def _end(events: list[Event]) -> FinishReason | str | None:
    """Why the sequence ended: a finish reason, ``cancelled``, ``failed``; None while it goes on."""
    if None not in events:
        return None
    for event in events:
        if isinstance(event, Chunk) and event.finish_reason is not None:
            return event.finish_reason
        if isinstance(event, Exception):
            return "failed"
    return "cancelled"


def _status(end: FinishReason | str | None) -> ResponseType:
    if end is None:
        return ResponseType.SUCCESS
    if isinstance(end, FinishReason):
        return ResponseType.FINISH
    return ResponseType.CANCEL if end == "cancelled" else ResponseType.INTERNAL_ENGINE_ERROR


def _metrics() -> RequestMetrics:
    now = time.time()
    return RequestMetrics(
        now, [EngineEvent(EventType.QUEUED, now - 0.001), EngineEvent(EventType.SCHEDULED, now)]
    )


def engine(
    folder: Path,
    backend: str = "turbomind",
    *,
    small: bool = False,
    deaf: bool = False,
    others: bool = False,
    **options: Any,
) -> LMDeployEngine:
    """The LMDeploy engine on a scripted one. small: one request runs, one may wait."""
    limits = {"max_batch": 1, "max_queue": 1} if small else {"max_batch": 16}

    def load(chosen: Options, on_progress: Callable[[str], None]) -> Loaded:
        def host(config: Any, chat: Any, length: int) -> Host:
            native = Scripted(folder, chosen, deaf=deaf, others=others)
            if backend == "turbomind":
                return TurboMindHost(native, Module, chat.table, config.stop_ids)
            return PyTorchHost(native, chat.table, config.stop_ids, sorted(chat.special_ids))

        return assemble(folder, chosen, host)

    return LMDeployEngine(folder, load=load, backend=backend, **{**limits, **options})


def native(engine: LMDeployEngine) -> Scripted:
    """What is below a started engine."""
    assert engine._loaded is not None
    found = engine._loaded.host.native
    assert isinstance(found, Scripted)
    return found
