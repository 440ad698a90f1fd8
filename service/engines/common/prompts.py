"""Turns a request into its packed prompt, and checks that the context has room for the answer."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

from lmdeploy_ext.packing import PackedRequest
from service.engines.common.chat import Chat
from service.engines.common.context import answer_limit
from service.engines.common.images import ImagePreprocessor
from service.types import GenerateRequest


class Prompts:
    """Packs requests for one checkpoint. Thread-safe.

    preprocess: None for an engine without vision.
    context_length: maximum number of tokens of prompt and answer together.
    """

    def __init__(
        self, chat: Chat, preprocess: ImagePreprocessor | None, context_length: int
    ) -> None:
        self._chat = chat
        self._preprocess = preprocess
        self._context_length = context_length

    async def pack(self, request: GenerateRequest, executor: Executor) -> PackedRequest:
        """Tokenise and count in a thread of the executor; decode images only if there is room.

        Raises:
            ImageError: an image cannot be used.
            ContextTooLong: prompt and answer do not fit into the context.
        """
        loop = asyncio.get_running_loop()
        if self._preprocess is None or not request.all_images:
            return await loop.run_in_executor(executor, self._pack_text, request)
        turns = await loop.run_in_executor(executor, self._turns, request)
        images = await self._preprocess.pack(request.all_images)
        return await loop.run_in_executor(executor, self._chat.pack, turns, images)

    def _pack_text(self, request: GenerateRequest) -> PackedRequest:
        return self._chat.pack(self._turns(request), ())

    def _turns(self, request: GenerateRequest) -> list[list[int] | None]:
        """The prompt without its images. Raises if prompt and images do not fit into the
        context."""
        counts: list[int] = []
        if self._preprocess is not None:
            counts = [self._preprocess.num_tokens(*one) for one in enumerate(request.all_images)]
        turns = self._chat.turns(
            request.conversation,
            request.tools,
            constrained=request.grammar is not None,
            thinking=request.sampling.thinking,
        )
        prompt = sum(counts) + sum(len(run) for run in turns if run is not None)
        answer_limit(
            prompt,
            request.sampling,
            self._context_length,
            image_tokens=0 if request.messages else sum(counts),
        )
        return turns
