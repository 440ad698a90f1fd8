"""Loads a checkpoint into LMDeploy and builds everything that requests need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig
from lmdeploy_ext.packing import PackedRequest
from service.engines.common.chat import Chat
from service.engines.common.config import CheckpointError, TextConfig, commit_of, resolve_model
from service.engines.common.context import answer_limit
from service.engines.common.grammar import GrammarCache
from service.engines.common.images import ImagePreprocessor
from service.engines.common.prompts import Prompts
from service.engines.lmdeploy import sampling
from service.engines.lmdeploy.building import (
    build_host,
    describe,
    feature_dtype,
    hush_logs,
    join_logs,
)
from service.engines.lmdeploy.guidance import Constraint
from service.engines.lmdeploy.hosts import Host
from service.engines.lmdeploy.items import multimodal_items
from service.engines.lmdeploy.options import Options
from service.engines.lmdeploy.reading import Reader
from service.engines.lmdeploy.running import ImageGate, Run
from service.errors import EngineUnavailable
from service.types import (
    TEXT_AND_IMAGES,
    TEXT_ONLY,
    Capabilities,
    GenerateRequest,
    GrammarKind,
    Sampling,
)


@dataclass(frozen=True, slots=True)
class Packed:
    """A tokenised prompt and its images in LMDeploy's form."""

    prompt: PackedRequest
    items: list[dict[str, Any]]


class Loaded:
    """A started engine of LMDeploy with its tokenizer, image processor and grammar compiler."""

    def __init__(self, folder: Path, options: Options, config: TextConfig, host: Host) -> None:
        self.host = host
        self._options, self._config = options, config
        self._chat = Chat(folder, config)
        self._dtype: torch.dtype = feature_dtype(host, config)
        self._images = ImageProcessorConfig.from_checkpoint(folder) if options.vision else None
        preprocess = ImagePreprocessor(folder, options.image_pixels) if options.vision else None
        length = min(wanted_context(options, config), host.session_len or 1 << 31)
        self._prompts = Prompts(self._chat, preprocess, length)
        self.grammars: GrammarCache[Constraint] = GrammarCache(
            host.compiler, options.grammar_cache_bytes, options.grammar_threads
        )
        self.gate = ImageGate(options.vision_batch)
        commit = commit_of(folder)
        origin = {} if commit is None else {"commit": commit}
        self.capabilities = Capabilities(
            model=Path(options.model).name,
            engine="lmdeploy",
            modalities=TEXT_AND_IMAGES if options.vision else TEXT_ONLY,
            grammar_kinds=frozenset(GrammarKind),
            sampling_options=sampling.honoured(config.family),
            context_length=length,
            max_images=options.max_images if options.vision else 0,
            schema_in_prompt=config.schema_in_prompt,
            limits_lengths=host.limits_lengths,
            details=describe(host, options, config) | origin,
        )

    def check_sampling(self, options: Sampling) -> None:
        """Raises InvalidRequest for a value that the backend would change silently."""
        sampling.check(options, self.host.backend)

    def reader(self, request: GenerateRequest, received: float) -> Reader:
        """A reader for the answer of a request."""
        return Reader(
            self._chat.table,
            frozenset(self._config.stop_ids),
            self._options.loop_guard,
            received,
            thinks=self._config.thinks(
                constrained=request.grammar is not None, thinking=request.sampling.thinking
            ),
        )

    async def pack(self, request: GenerateRequest, executor: Executor) -> Packed:
        """Prepare tokens, spans and pixels in other threads. Raises ImageError or
        ContextTooLong."""
        prompt = await self._prompts.pack(request, executor)
        if not prompt.images or self._images is None:
            return Packed(prompt, [])
        items = await asyncio.get_running_loop().run_in_executor(
            executor,
            multimodal_items,
            prompt,
            self._images,
            self._config.image_token_id,
            self._dtype,
        )
        return Packed(replace(prompt, images=()), items)

    def answer_limit(self, packed: Packed, request: GenerateRequest) -> int:
        """Maximum number of answer tokens. Raises ContextTooLong."""
        return answer_limit(
            len(packed.prompt.token_ids),
            request.sampling,
            self.capabilities.context_length,
        )

    def run(
        self,
        number: int,
        packed: Packed,
        request: GenerateRequest,
        constraint: Constraint | None,
        limit: int,
    ) -> Run:
        """Send a request to LMDeploy. number: the id of its session in LMDeploy.

        limit: maximum number of answer tokens. With a grammar, LMDeploy computes one more token if
        there is room, so that an answer of exactly ``limit`` tokens is recognised as complete.
        """
        instance, response_format = self.host.open(number, constraint)
        ids: list[int] = packed.prompt.token_ids.tolist()
        room = self.capabilities.context_length - len(ids) - limit + self.host.spare_tokens
        config = sampling.generation_config(
            request.sampling,
            self.host.backend,
            max_new_tokens=limit + (min(1, room) if constraint is not None else 0),
            stop_ids=self._config.stop_ids,
            bad_ids=self.host.bad_ids(constraint),
            response_format=response_format,
        )
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "gen_config": config,
            "multimodal": packed.items or None,
            "stream_output": True,
        }
        return Run(instance, number, arguments)

    async def close(self) -> None:
        """Free the engine. No request may be in flight."""
        self.grammars.close()
        await self.host.close()


def load(options: Options, on_progress: Callable[[str], None]) -> Loaded:
    """Download, read and start a checkpoint. Raises EngineUnavailable."""
    join_logs()
    on_progress("looking for the checkpoint")
    folder = resolve_model(options.model, options.revision)

    def build(config: TextConfig, chat: Chat, length: int) -> Host:
        return build_host(folder, options, config, chat, length, on_progress)

    loaded = assemble(folder, options, build)
    hush_logs()
    return loaded


def assemble(
    folder: Path, options: Options, build: Callable[[TextConfig, Chat, int], Host]
) -> Loaded:
    """Read the small files of a checkpoint, start the host and combine both."""
    try:
        config = TextConfig.from_checkpoint(folder, quantised=True)
        wanted = wanted_context(options, config)
        host = build(config, Chat(folder, config), wanted)
        try:
            return Loaded(folder, options, config, host)
        except BaseException:
            host.native.close()  # no one else has a reference to the host
            raise
    except (CheckpointError, FileNotFoundError, KeyError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise EngineUnavailable(f"{folder.name!r} cannot be loaded: {cause}") from error


def wanted_context(options: Options, config: TextConfig) -> int:
    """The context length, in tokens. Raises CheckpointError if the model has less."""
    most = config.max_position_embeddings
    wanted = options.context_length or most
    if wanted > most:
        raise CheckpointError(f"context_length {wanted} exceeds the model's {most}")
    return wanted
